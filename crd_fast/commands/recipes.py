"""crd-fast recipes."""

from __future__ import annotations

from crd_fast.commands.terminal import console


def recipes() -> None:
    """List the recipes that ship: train or plan them by name, or extend them."""
    from rich.table import Table
    from rich.text import Text

    from crd_fast.config import recipe_names, what_it_is

    table = Table("recipe", "what it is")
    for name in recipe_names():
        table.add_row(name, Text(what_it_is(name)))
    console.print(table)
