"""How many rows went through the network, by the weights that they used and whether gradient was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from crd_fast.run.observer import Observer

BACKWARD = "backward"  # the kind of what follows a forward with gradient; with what checkpointing runs again


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


def kind_of(branch: str, gradient: bool) -> str:
    """The name of a kind of forward: the weights that it uses, and whether gradient is recorded."""
    return f"{branch}_with_gradient" if gradient else branch


def flops_of(counted: Mapping[tuple[str, bool], float], row_flops: Mapping[str, float]) -> float:
    """FLOPs of counted forwards (`RowCounts.rows`), and of the backward pass of those with gradient.

    row_flops: of one row by `kind_of` and `BACKWARD`, as a plan has them.
    """
    total = 0.0
    for (branch, gradient), rows in counted.items():
        total += rows * row_flops.get(kind_of(branch, gradient), 0.0)
        total += rows * row_flops.get(BACKWARD, 0.0) * gradient
    return total


class Throughput(RowCounts):
    """What an iteration achieves: rows of the present iteration, and their FLOPs over its seconds.

    row_flops: of one row by kind, and `decode` of a picture, as a plan has them; None: FLOPs are not known.
    """

    def __init__(self, row_flops: Mapping[str, float] | None = None):
        super().__init__()
        self.row_flops = row_flops

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        if name == "iteration":
            self.rows.clear()
        yield

    def metrics(self, pictures: int, own: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """`images_per_second` over the whole iteration; `tflops` over rollout and update, of this process.

        pictures: that all processes generated; own: this one. seconds: by phase, as they are logged.
        """
        found = {"images_per_second": pictures / sum(seconds.values())}
        if self.row_flops is not None:
            flops = flops_of(self.rows, self.row_flops) + own * self.row_flops.get("decode", 0.0)
            found["tflops"] = flops / (seconds["seconds_rollout"] + seconds["seconds_update"]) / 1e12
        return found
