"""An exact detector for the synthetic world of `crd_fast.prompts.world`.

It finds shapes, colours and places anywhere in any image: foreground pixels form connected components,
and each component is compared with every shape stretched to the component's own bounding box.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from crd_fast.prompts import world

FOREGROUND_DISTANCE = 0.35  # Euclidean distance from the background in sRGB, about half of any colour's
MIN_SIDE, MAX_SIDE = 7, 20  # pixels of a bounding box
SHARPNESS = 20.0  # of the softmax over overlaps that gives the score
MIN_OVERLAP, FULL_OVERLAP = 0.55, 0.75  # intersection over union at which the score is 0 and undiminished
MIN_COLOR_SHARE = 0.5  # of a component's pixels that must agree for it to have a colour
MAX_COLOR_DISTANCE = (
    0.45  # of a component's median pixel from the nearest palette colour, else it is no shape
)
_CONNECT_8 = np.ones((3, 3), dtype=bool)


def detect(image: np.ndarray) -> list[dict]:
    """Finds the shapes in one image.

    image: float, (height, width, 3), in [0, 1].
    Returns detections as `crd_fast.rewards.geneval` takes them: label, box, score, color.
    """
    distance = np.linalg.norm(image - np.asarray(world.BACKGROUND, dtype=image.dtype), axis=-1)
    foreground = ndimage.median_filter(distance, size=3) > FOREGROUND_DISTANCE
    components, _ = ndimage.label(foreground, structure=_CONNECT_8)
    detections = []
    for index, window in enumerate(ndimage.find_objects(components), start=1):
        rows, columns = window
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
            continue
        mask = components[window] == index
        label, score = classify(mask)
        color, color_distance = dominant_color(image[window][mask])
        if score > 0 and color_distance < MAX_COLOR_DISTANCE:
            detections.append(
                {
                    "label": label,
                    "box": [columns.start, rows.start, columns.stop, rows.stop],
                    "score": score,
                    "color": color,
                }
            )
    return detections


def classify(mask: np.ndarray) -> tuple[str, float]:
    """The shape whose stretched mask overlaps best, and a score in [0, 1].

    The score is the softmax over the overlaps, faded out where even the best overlap is poor.
    """
    templates = [world.shape_mask(shape, *mask.shape) for shape in world.SHAPES]
    overlaps = np.array([(mask & each).sum() / (mask | each).sum() for each in templates])
    weights = np.exp(SHARPNESS * (overlaps - overlaps.max()))
    best = int(overlaps.argmax())
    fade = np.clip((overlaps[best] - MIN_OVERLAP) / (FULL_OVERLAP - MIN_OVERLAP), 0.0, 1.0)
    return world.SHAPES[best], float(weights[best] / weights.sum() * fade)


def dominant_color(pixels: np.ndarray) -> tuple[str | None, float]:
    """The palette colour that most pixels are nearest to, None without a majority; the median distance.

    pixels: float, (N, 3), in [0, 1]. The distance is Euclidean, to each pixel's nearest palette colour.
    """
    distances = np.linalg.norm(pixels[:, None] - world.PALETTE[None], axis=-1)
    votes = np.bincount(distances.argmin(axis=1), minlength=len(world.PALETTE))
    best = int(votes.argmax())
    color = world.COLOR_NAMES[best] if votes[best] >= MIN_COLOR_SHARE * len(pixels) else None
    return color, float(np.median(distances.min(axis=1)))
