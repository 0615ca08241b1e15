"""How many rows went through the network, which is what a run costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crd_fast.run.observer import Observer


class RowCounts(Observer):
    """`rows` of forwards by the weights they used and whether autograd recorded them.

    Evaluations do not count. They cost the same whatever is trained between them.
    """

    def __init__(self):
        self.rows: Counter[tuple[str, bool]] = Counter()
        self._evaluating = False

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        outer, self._evaluating = self._evaluating, self._evaluating or name == "evaluation"
        try:
            yield
        finally:
            self._evaluating = outer

    @contextmanager
    def branch(self, name: str, rows: int) -> Iterator[None]:
        if not self._evaluating:
            self.rows[name, torch.is_grad_enabled()] += rows
        yield
