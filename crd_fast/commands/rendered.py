"""Text that commands write from templates. Python among these ends in .py.txt: it is no module of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("templates")


def rendered(template: str, values: dict[str, Any]) -> str:
    """A template with its values. Raises jinja2's UndefinedError for one that lacks."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return templates.get_template(template).render(values)
