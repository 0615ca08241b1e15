"""What a loss makes of measured statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..velocity.stats import samples


@dataclass(frozen=True)
class Coefficients:
    """Losses of the whole batch and each sample's gradient coefficients, from `center` and its like.

    `coefficients[i:j]` selects samples for a micro-batch: c1, c2 and c3 are sliced, the losses stay those of
    the whole. Iteration goes sample by sample.
    """

    loss: torch.Tensor  # scalar, policy_loss + kl_loss
    policy_loss: torch.Tensor  # scalar
    kl_loss: torch.Tensor  # scalar
    c1: torch.Tensor  # (B,): d loss / d policy = c1 (policy - target) + c2 (policy - reference)
    c2: torch.Tensor  # (B,)
    c3: torch.Tensor | None = None  # (B,): + c3 (policy - old), in losses that have such a term

    def __len__(self) -> int:
        return self.c1.shape[0]

    def __getitem__(self, index) -> Coefficients:
        index = samples(index, len(self))
        c3 = None if self.c3 is None else self.c3[index]
        return Coefficients(self.loss, self.policy_loss, self.kl_loss, self.c1[index], self.c2[index], c3)

    def __iter__(self) -> Iterator[Coefficients]:
        return (self[i] for i in range(len(self)))
