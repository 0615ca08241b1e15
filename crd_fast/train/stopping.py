"""Being told to stop: Ctrl-C, SIGTERM, SIGHUP. A run ends with a checkpoint of its last whole state."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from crd_fast.run.observer import Observer

logger = logging.getLogger("crd_fast")
AT_ONCE = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
SCORING = ("rewards", "scoring")  # phases that wait for rewards


class StopNow(Exception):
    """Raised between two micro-batches, where weights and optimizer are those of the last whole iteration."""


class Stopping(Observer):
    """Notes signals while it is `listening`.

    The first Ctrl-C lets the iteration end; `requested` says so. The second, and the first SIGTERM or SIGHUP,
    raise `StopNow` after the present micro-batch, or at once while rewards are waited for, unless the
    optimizer has made a step in this iteration: then it ends first. A further Ctrl-C is KeyboardInterrupt.

    alone: no other process waits for this one within an iteration. Otherwise every stop is that of the first
    Ctrl-C. say: whether this is the one of several processes that says so.
    """

    def __init__(self, alone: bool, say: bool = True):
        self.alone, self._say = alone, say
        self.requested = self._now = self._waiting = False
        self.whole = True  # weights and optimizer are those of an iteration's end

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread hears signals; in another one this does nothing.

        What a process was begun to ignore it goes on ignoring: SIGHUP by nohup, SIGINT where a script's `&`
        began it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, *AT_ONCE)
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        interrupted = number == signal.SIGINT
        if self._now and interrupted:
            raise KeyboardInterrupt
        if interrupted and not self.requested and self._say:
            again = "; Ctrl-C again to stop after the present micro-batch" if self.alone else ""
            logger.warning("finishing this iteration%s", again)
        self._now = self.requested or not interrupted
        self.requested = True
        if self._waiting:
            self._stop()

    def _stop(self) -> None:
        if self._now and self.alone and self.whole:
            raise StopNow

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        if name == "optimizer":
            self.whole = False
        outer, self._waiting = self._waiting, name in SCORING
        try:
            if self._waiting:
                self._stop()
            yield
            if name == "iteration":
                self.whole = True
        finally:
            self._waiting = outer

    def advance(self, count: int) -> None:
        self._stop()
