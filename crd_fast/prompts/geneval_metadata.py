"""Prompts in GenEval's categories: what one asks for, in the metadata format of GenEval's own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}


def objects(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    """A clause: so many of a class, more being their `color` or `position`."""
    return {"class": name, "count": count, **more}


def draw_prompts(by_tag: Mapping[str, Sequence[dict]], rng: np.random.Generator, count: int) -> list[dict]:
    """`count` prompts, those of the categories that there are in turn, without repeats as far as a category
    has enough of them."""
    tags = [TAGS[i] for i in rng.permutation(len(TAGS)) if TAGS[i] in by_tag]
    queues: dict[str, list[dict]] = {tag: [] for tag in tags}
    drawn = []
    for i in range(count):
        tag = tags[i % len(tags)]
        if not queues[tag]:
            queues[tag] = [by_tag[tag][j] for j in rng.permutation(len(by_tag[tag]))]
        drawn.append(queues[tag].pop())
    return drawn


def check_metadata(metadata: Mapping) -> list[Mapping]:
    """The `include` clauses, after checking that GenEval's rules can be applied to them.

    Raises ValueError naming the key if `include` is missing or a clause is malformed.
    """
    if not isinstance(metadata.get("tag", ""), str):
        raise ValueError(f"tag: expected a string, got {metadata['tag']!r}")
    clauses = metadata.get("include")
    if not isinstance(clauses, list) or not clauses:
        raise ValueError(f"include: expected a list of at least one clause, got {clauses!r}")
    if not isinstance(metadata.get("exclude") or [], list):
        raise ValueError(f"exclude: expected a list of clauses, got {metadata['exclude']!r}")
    for name in ("include", "exclude"):
        for clause in metadata.get(name) or ():
            if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
                raise ValueError(f"{name}: expected clauses with a `class`, got {clause!r}")
            count = clause.get("count")
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(
                    f"{name}: `count` of {clause['class']!r}: expected an integer >= 1, got {count!r}"
                )
            if not isinstance(clause.get("color"), (str, type(None))):
                raise ValueError(f"{name}: `color`: expected a string, got {clause['color']!r}")
    for i, clause in enumerate(clauses):
        if clause.get("position") is None:
            continue
        position = clause["position"]
        if not isinstance(position, (list, tuple)) or len(position) != 2 or position[0] not in RELATIONS:
            raise ValueError(f"include: `position`: expected [one of {RELATIONS}, clause], got {position!r}")
        if not isinstance(position[1], int) or not 0 <= position[1] < i:
            raise ValueError(
                f"include: `position`: expected an earlier clause (0 to {i - 1}), got {position[1]!r}"
            )
    return clauses
