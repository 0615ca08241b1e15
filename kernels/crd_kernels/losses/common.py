"""What the losses beside CRD share: one output type, and the way from their arguments to it."""

from collections.abc import Callable

import torch

from .. import fused
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
        self.loss, self._table = loss, table  # its other tensors are rows, made when they are asked for

    error = property(lambda self: Stats(self._table, 0).policy_error)
    kl = property(lambda self: Stats(self._table, 0).kl)
    old_deviation = property(lambda self: Stats(self._table, 0).old_deviation)


def loss_of(
    name: str,
    latents: Latents,
    scalars: Scalars,
    kind: Kind,
    numbers: Numbers,
    impl: str,
    first: Callable[[], None] = lambda: None,
) -> LossOutput:
    """What the public function `name` returns. first: what it asks of its tensors before all losses do."""

    def check():
        first()
        latents.check()
        scalars.check(latents.policy.shape[0], latents.policy.device)

    return LossOutput(*fused.loss(check, latents, scalars, kind, numbers, impl, name))
