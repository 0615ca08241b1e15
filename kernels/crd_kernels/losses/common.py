"""What the losses beside CRD share: one output type, and the way from their arguments to it."""

import torch

from .. import checks, fused
from ..problem import Kind, Latents, Numbers, Scalars
from ..velocity.stats import Stats


class LossOutput:
    """Only `loss` carries a gradient, and to `policy` alone; the rest is detached.

    loss           scalar
    error          (B,) mean((policy - target)^2)
    kl             (B,) mean((policy - reference)^2); 0 without a reference
    old_deviation  (B,) mean((policy - old)^2); 0 for losses without `old`
    """

    def __init__(self, loss: torch.Tensor, table: torch.Tensor):
        self.loss, self._stats = loss, Stats(table, 0)

    error = property(lambda self: self._stats.policy_error)
    kl = property(lambda self: self._stats.kl)
    old_deviation = property(lambda self: self._stats.old_deviation)


def loss_of(
    name: str, latents: Latents, scalars: Scalars, kind: Kind, numbers: Numbers, impl: str, needed=()
) -> LossOutput:
    """What the public function `name` returns. needed: scalars that may not be None."""

    def check():
        latents.check()
        for scalar in needed:
            checks.tensor(scalar, getattr(scalars, scalar))
        scalars.check(latents.policy)

    return LossOutput(*fused.loss(check, latents, scalars, kind, numbers, impl, name))
