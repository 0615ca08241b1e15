"""What the commands share: the terminal, and options that several of them have."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from crd_fast.errors import UserError

console = Console()
errors = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the recipe. Repeatable."),
]


def say(line: str) -> None:
    """Prints one line as it is: not broken where the terminal ends, so that paths in it can be used."""
    console.print(escape(line), highlight=False, soft_wrap=True)


def parse_settings(pairs: list[str]) -> dict:
    """`KEY=VALUE`, the value as YAML."""
    import yaml

    settings = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        try:
            settings[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            separator = ""
        if not key or not separator:
            raise UserError(f"--set: expected KEY=VALUE, got {pair!r}")
    return settings
