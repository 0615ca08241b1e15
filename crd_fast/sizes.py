"""Sizes of pictures: a side in pixels, or height and width."""

from __future__ import annotations

import re
from typing import Any

Resolution = int | tuple[int, int]
SMALLEST, LARGEST = 8, 2**15


def height_width(resolution: Resolution) -> tuple[int, int]:
    """In pixels."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def at_most(resolution: Resolution, largest: int | None) -> Resolution:
    """The same size, or with each side that is longer cut to the largest, where there is one."""
    if largest is None:
        return resolution
    return parse_size([min(side, largest) for side in height_width(resolution)])


def pixels(resolution: Resolution) -> int:
    height, width = height_width(resolution)
    return height * width


def parse_size(value: Any) -> Resolution:
    """A side, or [height, width]; the side alone where both are the same. ValueError for anything else."""
    sides = value if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise ValueError(f"expected a side in pixels or [height, width], got {value}")
    if min(sides) < SMALLEST:
        raise ValueError(f"expected sides of at least {SMALLEST} pixels, got {value}")
    if max(sides) > LARGEST:
        raise ValueError(f"expected sides of at most {LARGEST} pixels, got {value}")
    height, width = sides
    return height if height == width else (height, width)


def parse_sizes(value: Any) -> Resolution | list[Resolution]:
    """The same, or a list of several, which has a size in brackets among them or more than two."""
    listed = isinstance(value, (list, tuple))
    if not listed or not (len(value) > 2 or any(isinstance(size, (list, tuple)) for size in value)):
        return parse_size(value)
    sizes = list(dict.fromkeys(map(parse_size, value)))
    return sizes if len(sizes) > 1 else sizes[0]


def size_of_text(text: str) -> Resolution:
    """As on a command line: `512`, or height and width as `768x512`. ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9})(?:\s*x\s*(\d{1,9}))?\s*", text, re.ASCII | re.IGNORECASE)
    if found is None:
        raise ValueError(f"expected a side in pixels or HEIGHTxWIDTH, like 512 or 768x512, got {text[:40]!r}")
    height, width = found.groups()
    return parse_size(int(height) if width is None else [int(height), int(width)])
