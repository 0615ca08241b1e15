"""What the commands share: the terminal, and options that several of them have."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from crd_fast.errors import UserError


class Terminal(Console):
    def on_broken_pipe(self) -> None:
        """As whatever else is printed to a pipe that is read no further; rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


# nothing that is printed is markup or an emoji's name: names, prompts and paths come as they are
console = Terminal(markup=False, emoji=False)
errors = Terminal(stderr=True, markup=False, emoji=False)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the recipe. Repeatable."),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run rewards of your own, or ask servers, that the run or checkpoint names.",
    ),
]


def plain(text: str) -> str:
    """Without line breaks and what else would steer a terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def say(line: str) -> None:
    """Prints one line as it is: not broken where the terminal ends, so that paths in it can be used."""
    console.print(plain(line), highlight=False, soft_wrap=True)


def say_error(line: str) -> None:
    """One line on standard error."""
    line = " ".join(plain(line).split())
    errors.print(Text.assemble(("error:", "red"), f" {line}"), soft_wrap=True)


def say_warning(line: str) -> None:
    """One line on standard error."""
    errors.print(Text.assemble(("warning:", "yellow"), f" {plain(line)}"), soft_wrap=True)


@contextmanager
def with_consent() -> Iterator[None]:
    """Where a loaded file names code: the command that allows it, as it can be typed."""
    from crd_fast.rewards.consent import OPTION, NeedsConsent

    try:
        yield
    except NeedsConsent as error:
        raise NeedsConsent(f"{error}: {shlex.join(['crd-fast', *sys.argv[1:], OPTION])}") from None


def parse_settings(pairs: list[str]) -> dict:
    """`KEY=VALUE`, the value as YAML, as recipes have it."""
    from crd_fast.yaml_files import parse_yaml

    settings = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not key or not separator:
            raise UserError(f"--set: expected KEY=VALUE, got {pair!r}")
        settings[key] = parse_yaml(text, f"--set {pair}")
    return settings
