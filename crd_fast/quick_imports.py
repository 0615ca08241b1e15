"""Imports of large libraries by a command that computes nothing with them."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within this context the garbage collector rests, and `torch.compile` compiles nothing.

    What is imported stays, but the collector goes through it time and again; from the context's end to the
    process's it leaves out what is there then. bitsandbytes, which diffusers imports, has two of its
    functions compiled, for which torch loads its whole compiler; here they stay as they are written. So this
    is not for a process that trains.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch

        with mock.patch.object(torch, "compile", _as_written):
            yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # what is freed last would be taken for leaked
        if enabled:
            gc.enable()


def _as_written(model: Callable | None = None, **settings: Any) -> Callable:
    return _as_written if model is None else model
