"""What is measured of each sample, and how sums over its elements become that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral

import torch

from ..checks import INTEGERS

SCALE_FLOOR = 1e-5
SUMS = 8  # what the passes add up of each sample
ROWS = 10  # of the table of `Stats`, which every implementation writes
# What a loss makes of them: c1, c2, c3, and a row each of the policy's part of the loss and the anchor's.
# They stand behind the statistics in the table that a loss leaves.
OUTCOME = 5
POLICY_LOSS, KL_LOSS = ROWS + 3, ROWS + 4


def _row(index: int) -> property:
    return property(lambda self: self.table[index])


@dataclass(frozen=True)
class Stats:
    """Per-sample statistics of a batch: tensors of shape (B,), fp32, or fp64 when an input was fp64.

    `stats[i:j]`, `stats[mask]` and `stats[[3, 1]]` select samples, `stats[i]` is one of them, iteration goes
    sample by sample, and `Stats.cat` joins micro-batches. All means are over the elements of one sample's
    latent, weighted by the mask where there is one.

    implicit_reward  r = -(policy_error / policy_scale - old_error / old_scale)
    policy_scale     s(policy) = max(mean|policy - target|, 1e-5); 1 without adaptive weighting
    old_scale        s(old)
    policy_error     mean((policy - target)^2): the flow-matching loss of the policy
    old_error        mean((old - target)^2)
    kl               mean((policy - reference)^2); 0 without a reference
    old_kl           mean((old - reference)^2); 0 without a reference
    old_deviation    mean((policy - old)^2)
    anchored         1 where a reference was given, else 0
    elements         what the means are divided by: n, or the sum of the mask
    """

    table: torch.Tensor  # (ROWS, B), the rows above in order
    n: int  # elements of one sample

    implicit_reward, policy_scale, old_scale = _row(0), _row(1), _row(2)
    policy_error, old_error = _row(3), _row(4)
    kl, old_kl, old_deviation = _row(5), _row(6), _row(7)
    anchored, elements = _row(8), _row(9)

    def __len__(self) -> int:
        return self.table.shape[1]

    def __getitem__(self, index) -> Stats:
        return Stats(self.table[:, samples(index, len(self))], self.n)

    def __iter__(self) -> Iterator[Stats]:
        return (self[i] for i in range(len(self)))

    def to(self, *args, **kwargs) -> Stats:
        """`Tensor.to` on every tensor."""
        return Stats(self.table.to(*args, **kwargs), self.n)

    @staticmethod
    def cat(parts: Iterable[Stats]) -> Stats:
        """The samples of all parts in order. Raises ValueError on an empty list or unequal n."""
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one Stats, got none")
        if len({part.n for part in parts}) > 1:
            raise ValueError(f"parts: expected one latent size, got {sorted({part.n for part in parts})}")
        return Stats(torch.cat([part.table for part in parts], 1), parts[0].n)


def samples(index, size: int):
    """An index of samples that keeps their dimension. Raises IndexError for an integer out of range."""
    if isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype in INTEGERS:
        index = index.item()
    if isinstance(index, Integral):  # numpy's too
        index = int(index)
        if not -size <= index < size:
            raise IndexError(f"index: expected a sample of {size}, got {index}")
        return slice(index, index + 1 or None)
    return index
