"""The synthetic world of the built-in model: coloured shapes on a dark background, 32 x 32 pixels.

A scene is a 2 x 2 grid of slots; a slot is empty or holds one shape in one colour. Prompts come in
GenEval's six categories and in GenEval's metadata format (`tag`, `include`, `exclude`, `prompt`).
Training and held-out prompts are disjoint: see `prompts`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from crd_fast.prompts.geneval_metadata import NUMBERS, RELATIONS, TAGS, objects

HEIGHT = WIDTH = 32
SLOT = 16  # pixels; 2 x 2 slots
SHAPE_SIZE = 12  # pixels; a shape fills this square, centred in its slot
NUM_SLOTS = 4
MAX_TOKENS = 12  # of a prompt, with the one that ends it

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {  # sRGB in [0, 1]
    "red": (0.92, 0.14, 0.14),
    "green": (0.12, 0.76, 0.20),
    "blue": (0.16, 0.32, 0.98),
    "yellow": (0.96, 0.88, 0.14),
    "purple": (0.80, 0.20, 0.92),
    "white": (0.98, 0.98, 0.98),
}
BACKGROUND = (0.09, 0.09, 0.11)
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
COLOR_NAMES = tuple(COLORS)

LEADS = ("a photo of", "a picture of", "a drawing of", "an image of")
PLURALS = {"cross": "crosses"} | {shape: shape + "s" for shape in SHAPES if shape != "cross"}


@functools.lru_cache(maxsize=4096)
def shape_mask(shape: str, height: int, width: int) -> np.ndarray:
    """The shape stretched to fill a box: bool, (height, width)."""
    y = (np.arange(height)[:, None] + 0.5) / height * 2 - 1
    x = (np.arange(width)[None, :] + 0.5) / width * 2 - 1
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "ring":
        radius = x**2 + y**2
        return (radius <= 1) & (radius >= 0.3)
    if shape == "square":
        return np.ones((height, width), dtype=bool)
    if shape == "triangle":
        return np.abs(x) <= (y + 1) / 2 + 0.5 / width
    if shape == "cross":
        return (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)
    raise ValueError(f"shape: expected one of {SHAPES}, got {shape!r}")


def render(shapes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Draws scenes.

    shapes: int, (B, 4), an index into SHAPES for each slot in row-major order, -1 for an empty slot.
    colors: int, (B, 4), an index into COLORS.
    Returns float32, (B, 32, 32, 3), in [0, 1].
    """
    masks = np.stack([shape_mask(shape, SHAPE_SIZE, SHAPE_SIZE) for shape in SHAPES])
    masks = np.concatenate([masks, np.zeros_like(masks[:1])])  # index -1: nothing
    images = np.empty((len(shapes), HEIGHT, WIDTH, 3), dtype=np.float32)
    images[:] = BACKGROUND
    margin = (SLOT - SHAPE_SIZE) // 2
    for slot in range(NUM_SLOTS):
        top, left = slot // 2 * SLOT + margin, slot % 2 * SLOT + margin
        window = images[:, top : top + SHAPE_SIZE, left : left + SHAPE_SIZE]
        window[...] = np.where(
            masks[shapes[:, slot]][..., None], PALETTE[colors[:, slot], None, None], window
        )
    return images


def single_object(lead: int, shape: str) -> dict:
    return _entry("single_object", lead, f"a {shape}", objects(shape))


def two_object(lead: int, first: str, second: str) -> dict:
    return _entry("two_object", lead, f"a {first} and a {second}", objects(first), objects(second))


def counting(lead: int, shape: str, count: int) -> dict:
    more = [objects(shape, count + 1)]
    return _entry("counting", lead, f"{NUMBERS[count]} {PLURALS[shape]}", objects(shape, count), exclude=more)


def colors(lead: int, color: str, shape: str) -> dict:
    return _entry("colors", lead, f"a {color} {shape}", objects(shape, color=color))


def position(lead: int, shape: str, relation: str, other: str) -> dict:
    clauses = objects(other), objects(shape, position=[relation, 0])
    return _entry("position", lead, f"a {shape} {relation} a {other}", *clauses)


def color_attr(lead: int, color: str, shape: str, other_color: str, other: str) -> dict:
    clauses = objects(shape, color=color), objects(other, color=other_color)
    return _entry("color_attr", lead, f"a {color} {shape} and a {other_color} {other}", *clauses)


def _entry(tag: str, lead: int, what: str, *include: dict, **more: list[dict]) -> dict:
    return {"tag": tag, "include": list(include), **more, "prompt": f"{LEADS[lead]} {what}"}


def is_novel_pair(color: str, shape: str) -> bool:
    """Colour and shape pairs that no training prompt names together: 5 of 30."""
    return (COLOR_NAMES.index(color) + SHAPES.index(shape)) % len(COLORS) == 0


def is_novel_combination(color: str, shape: str, other_color: str, other: str) -> bool:
    """Two coloured shapes, in either order, that no training prompt names together: one in five.

    Each of the two is named by training prompts unless it is a novel pair itself.
    """
    pairs = ((color, shape), (other_color, other))
    return sum(COLOR_NAMES.index(c) + SHAPES.index(s) for c, s in pairs) % 5 == 0


@functools.lru_cache(maxsize=2)
def prompts(held_out: bool) -> dict[str, tuple[dict, ...]]:
    """Every prompt of the world by tag: the training prompts, or the held-out ones.

    Held out are: pairs of a colour and a shape in `colors` (5 of 30), combinations of two such pairs in
    `color_attr` (1 of 5; none of the two is itself a novel pair), (shape, relation, shape) triples in
    `position` (1 of 5), ordered pairs in `two_object` (1 of 4), and, where the world is too small for that,
    wordings of `single_object` and `counting` (1 of 4).
    """
    leads, shapes = range(len(LEADS)), range(len(SHAPES))
    ordered_pairs = [(a, b) for a, b in itertools.product(shapes, shapes) if a != b]
    by_tag: dict[str, list[dict]] = {tag: [] for tag in TAGS}

    def add(entry: dict, novel: bool) -> None:
        if novel == held_out:
            by_tag[entry["tag"]].append(entry)

    for lead in leads:
        for a in shapes:
            add(single_object(lead, SHAPES[a]), (lead + a) % 4 == 0)
            for count in NUMBERS:
                add(counting(lead, SHAPES[a], count), (lead + a + count) % 4 == 0)
            for color in COLOR_NAMES:
                add(colors(lead, color, SHAPES[a]), is_novel_pair(color, SHAPES[a]))
        for a, b in ordered_pairs:
            add(two_object(lead, SHAPES[a], SHAPES[b]), (b - a) % len(SHAPES) == 1)
            for r, relation in enumerate(RELATIONS):
                add(position(lead, SHAPES[a], relation, SHAPES[b]), (a + 2 * b + r) % 5 == 0)
            for color, other_color in itertools.permutations(COLOR_NAMES, 2):
                pairs = (color, SHAPES[a]), (other_color, SHAPES[b])
                if not any(itertools.starmap(is_novel_pair, pairs)):
                    add(color_attr(lead, *pairs[0], *pairs[1]), is_novel_combination(*pairs[0], *pairs[1]))
    return {tag: tuple(entries) for tag, entries in by_tag.items()}


def vocabulary() -> set[str]:
    """The words of every prompt, held out or not."""
    words = {"and", "a", "an"}
    for held_out in (False, True):
        for entries in prompts(held_out).values():
            words.update(word for entry in entries for word in entry["prompt"].split())
    return words


def spell(text: str) -> str:
    """The prompt itself: its tokens are its words."""
    return text


@dataclass(frozen=True)
class Scene:
    """What a picture contains: shape and colour index of each slot, -1 for an empty one."""

    shapes: np.ndarray
    colors: np.ndarray


# (first slot, second slot) pairs for which the first object stands in the relation to the second
_SLOT_PAIRS = {
    "left of": [(a, b) for a in range(4) for b in range(4) if a % 2 < b % 2],
    "right of": [(a, b) for a in range(4) for b in range(4) if a % 2 > b % 2],
    "above": [(a, b) for a in range(4) for b in range(4) if a // 2 < b // 2],
    "below": [(a, b) for a in range(4) for b in range(4) if a // 2 > b // 2],
}


def scene(metadata: dict, rng: np.random.Generator) -> Scene:
    """A random scene that shows the prompt and nothing else; what the prompt leaves open is uniform."""
    shapes = np.full(NUM_SLOTS, -1)
    colors_ = rng.integers(len(COLORS), size=NUM_SLOTS)
    slots = list(rng.permutation(NUM_SLOTS))
    clauses = metadata["include"]
    relation = clauses[-1].get("position")
    if relation is not None:
        pairs = _SLOT_PAIRS[relation[0]]
        first, second = pairs[rng.integers(len(pairs))]
        slots = [second, first]  # clause 0 is what the relation refers to
    for clause in clauses:
        for _ in range(clause["count"]):
            slot = slots.pop(0)
            shapes[slot] = SHAPES.index(clause["class"])
            if "color" in clause:
                colors_[slot] = COLOR_NAMES.index(clause["color"])
    return Scene(shapes, colors_)


def render_scenes(scenes: list[Scene]) -> np.ndarray:
    """float32, (len(scenes), 32, 32, 3), in [0, 1]."""
    return render(np.stack([s.shapes for s in scenes]), np.stack([s.colors for s in scenes]))
