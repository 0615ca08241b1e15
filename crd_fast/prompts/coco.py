"""Prompts in GenEval's six categories over the 80 COCO classes, in the benchmark's metadata format.

Wording, articles and plurals are the benchmark's (Ghosh et al., arXiv 2310.11513, prompts/create_prompts.py
of djghosh13/geneval). What is held out never occurs in training in any order or wording: a class
(`single_object`), a class with a number, a colour with a class, an unordered pair of classes, a pair with its
relation ("a dog left of a cat" and "a cat right of a dog" are one), two coloured classes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools

import numpy as np

from crd_fast.prompts.geneval_metadata import NUMBERS, TAGS, objects

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase"),
    *("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard"),
    *("surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    *("chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse"),
    *("tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)  # in COCO's order, with the benchmark's names
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLORED = tuple(name for name in CLASSES if name != "person")  # the benchmark asks for no coloured people
OPPOSITES = {"left of": "right of", "above": "below"}
HELD_OUT = 0.2  # of what there is in a category
COLOR_ATTR = 20_000  # of the 554,580 there are


def single_object(name: str) -> dict:
    return _entry("single_object", [objects(name)], _a(name))


def two_object(first: str, second: str) -> dict:
    return _entry("two_object", [objects(first), objects(second)], f"{_a(first)} and {_a(second)}")


def counting(name: str, count: int) -> dict:
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    entry = _entry("counting", [objects(name, count)], f"{NUMBERS[count]} {plural}")
    return entry | {"exclude": [objects(name, count + 1)]}


def colors(color: str, name: str) -> dict:
    return _entry("colors", [objects(name, color=color)], f"{_a(color)} {name}")


def position(name: str, relation: str, other: str) -> dict:
    clauses = [objects(other), objects(name, position=[relation, 0])]
    return _entry("position", clauses, f"{_a(name)} {relation} {_a(other)}")


def color_attr(color: str, name: str, other_color: str, other: str) -> dict:
    clauses = [objects(name, color=color), objects(other, color=other_color)]
    return _entry("color_attr", clauses, f"{_a(color)} {name} and {_a(other_color)} {other}")


def prompts(held_out: bool) -> dict[str, tuple[dict, ...]]:
    """Every prompt by tag, for training or held out: about 42,000 and 10,600."""
    return _split()[held_out]


@functools.cache
def _split() -> tuple[dict[str, tuple[dict, ...]], dict[str, tuple[dict, ...]]]:
    by_tag: tuple[dict[str, list[dict]], ...] = tuple({tag: [] for tag in TAGS} for _ in range(2))

    def add(entry: dict, *content) -> None:
        by_tag[_is_held_out(entry["tag"], content)][entry["tag"]].append(entry)

    for name in CLASSES:
        add(single_object(name), name)
        for count in NUMBERS:
            add(counting(name, count), name, count)
    for name, color in itertools.product(COLORED, COLORS):
        add(colors(color, name), name, color)
    for name, other in itertools.permutations(CLASSES, 2):
        add(two_object(name, other), *sorted((name, other)))
        for relation, opposite in OPPOSITES.items():
            add(position(name, relation, other), name, relation, other)
            add(position(name, opposite, other), other, relation, name)
    for (color, name), (other_color, other) in _colored_pairs():
        add(color_attr(color, name, other_color, other), *sorted([(color, name), (other_color, other)]))
    train, test = ({tag: tuple(entries) for tag, entries in side.items()} for side in by_tag)
    return train, test


def _colored_pairs() -> list[tuple]:
    """COLOR_ATTR different ones, of two classes and two colours, always the same."""
    rng = np.random.default_rng(2310_11513)
    pairs: dict[tuple, None] = {}
    while len(pairs) < COLOR_ATTR:
        names, shades = (rng.choice(len(these), 2, replace=False) for these in (COLORED, COLORS))
        pairs[tuple((COLORS[c], COLORED[n]) for c, n in zip(shades, names))] = None
    return list(pairs)


def _is_held_out(tag: str, content: tuple) -> bool:
    digest = hashlib.sha256(repr((tag, content)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _entry(tag: str, include: list[dict], what: str) -> dict:
    return {"tag": tag, "include": include, "prompt": f"a photo of {what}"}


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
