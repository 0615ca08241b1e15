"""How many rows went through the network, by the weights that they used and whether gradient was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crd_fast.run.observer import Observer


class RowCounts(Observer):
    """Counts what it is told of forwards.

    rows: keyed (branch, with gradient). A row with gradient is one whose graph was recorded, and so went
    backward or will. What activation checkpointing runs again is not counted.
    """

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, bool]] = Counter()

    @contextmanager
    def branch(self, name: str, rows: int) -> Iterator[None]:
        self.rows[name, torch.is_grad_enabled()] += rows
        yield
