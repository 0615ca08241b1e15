"""What torchrun and `accelerate launch` tell the processes that they start, read without torch."""

from __future__ import annotations

import os


def launched_rank() -> int | None:
    """This process's rank; None where nothing of the kind started it."""
    rank = os.environ.get("RANK")
    return None if rank is None else int(rank)


def processes_here() -> int:
    """How many of them there are on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
