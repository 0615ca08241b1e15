"""docs/settings.md, from the recipe's schema: `python -m tools.settings_page`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from crd_fast.config import Recipe
from crd_fast.sections import Section

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Every key of a recipe. `crd-fast train my.yaml --print-config` prints what a recipe comes to,
`--set section.key=value` changes one key. An unknown key is refused, with the nearest known one.

A recipe can say `extends: NAME`, of one that ships (`crd-fast recipes`) or a file; then it says what differs.
`rewards` and `eval_rewards` replace those of the recipe that is extended.

This page is made from the schema by `python -m tools.settings_page`.
"""


def page() -> str:
    parts = [HEAD]
    for section, field in Recipe.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            rows = [row(name, inner) for name, inner in kind.model_fields.items()]
        else:
            rows = [row(section, field)]
        parts.append(
            "\n".join([f"## {section}\n", "| key | values | default | |", "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def row(name: str, field: FieldInfo) -> str:
    description = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {values(field)} | `{shown(field.default)}` | {description} |"


def values(field: FieldInfo) -> str:
    """What may be written."""
    return ", ".join(dict.fromkeys([*kinds(field.annotation), *bounds(field)]))


def kinds(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [f"`{shown(value)}`" for value in get_args(annotation)]
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", type(None): "`null`"}
    if annotation in names:
        return [names[annotation]]
    if get_origin(annotation) is list:
        return ["a list"]
    if get_origin(annotation) is dict:
        return ["a mapping"]
    return [kind for inner in get_args(annotation) for kind in kinds(inner)]


def bounds(field: FieldInfo) -> list[str]:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        f"{words} {getattr(limit, sign):g}"
        for limit in field.metadata
        for sign, words in signs.items()
        if hasattr(limit, sign)
    ]


def shown(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return ".inf" if math.isinf(value) else f"{value:g}"
    return (
        str(value)
        if not isinstance(value, dict)
        else "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
