"""What libraries warn of: what comes with every picture or prompt is said once and counted."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST = 300  # characters


class Once(logging.Filter):
    """Lets the first warning of each place in a library through and counts the others.

    A place is a line of code: what it says may differ with every item. Errors are always said.
    """

    def __init__(self) -> None:
        super().__init__()
        self.libraries: set[str] = set()
        self.counts: dict[tuple[str, int], int] = {}
        self._first: dict[tuple[str, int], str] = {}

    def seen(self, place: tuple[str, int], text: str) -> bool:
        """Whether the place has warned before. Counts this time."""
        self.counts[place] = self.counts.get(place, 0) + 1
        self._first.setdefault(place, text)
        return self.counts[place] > 1

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR or record.name.partition(".")[0] not in self.libraries:
            return True
        known = vars(record)  # several handlers see one record
        if "said_before" not in known:
            known["said_before"] = self.seen((record.pathname, record.lineno), record.getMessage())
        return not known["said_before"]

    def forget(self) -> None:
        self.counts.clear()
        self._first.clear()

    def summary(self) -> list[str]:
        """A line for each place that warned more than once."""
        return [
            f"warned {count} times: {shortened(self._first[place])}"
            for place, count in self.counts.items()
            if count > 1
        ]


once = Once()  # of this process


def hush(*libraries: str) -> None:
    """Libraries whose loggers have handlers of their own, once they are imported."""
    once.libraries.update(libraries)
    for library in libraries:
        for handler in logging.getLogger(library).handlers:
            if once not in handler.filters:
                handler.addFilter(once)


@contextmanager
def warnings_once(say: Callable[[str], None]) -> Iterator[None]:
    """Python's warnings inside as one line each, the first of each place; at the end how often they came."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if not once.seen((filename, lineno), str(message)):
            say(f"{category.__name__}: {shortened(str(message))} ({filename} line {lineno})")

    once.forget()
    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
        for line in once.summary():
            say(line)


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
