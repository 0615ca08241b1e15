"""The one exception that the command line turns into a single line and exit code 2, and a hint in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: what came, what was wanted, and where. The message is one line.

    Also where what came has several: line breaks become spaces.
    """

    def __str__(self) -> str:
        return " ".join(line.strip() for line in super().__str__().splitlines() if line.strip())


class RaisedByAll(UserError):
    """What each of several processes raises alike: the first one says it."""


class MissingPackage(UserError):
    """A package of an extra is not installed."""


def reason_of(error: BaseException) -> str:
    """What an exception of another library says, in one line of at most 200 characters; its type's name where
    it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'loss'?` for `lsos`; nothing where no known word is near."""
    from rapidfuzz import fuzz, process

    near = process.extractOne(word, list(known), scorer=fuzz.ratio, score_cutoff=50)
    return f", did you mean {near[0]!r}?" if near else ""


def unreadable(path: Path, error: OSError, kinds: Collection[str]) -> str:
    """Why a file cannot be read, and of one that is not there the nearest name beside it.

    kinds: the suffixes of files that would do, in small letters.
    """
    if not isinstance(error, FileNotFoundError):
        return f"{path}: cannot be read: {error.strerror}"
    try:
        beside = [file.name for file in path.parent.iterdir() if file.suffix.lower() in kinds]
    except OSError:
        beside = []
    return f"{path}: no such file{did_you_mean(path.name, beside)}"
