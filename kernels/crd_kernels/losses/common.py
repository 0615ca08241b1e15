"""What the losses beside CRD share: one output type, and the way from their arguments to it."""

from collections.abc import Callable

import torch

from .. import checks, dispatch, fused
from ..centering.coefficients import Coefficients
from ..finish import ops
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
        scalars.check(latents.policy)

    return LossOutput(*fused.loss(check, latents, scalars, kind, numbers, impl, name))


def coefficients_of(stats: Stats, scalars: Scalars, kind: Kind, numbers: Numbers, impl: str) -> Coefficients:
    """What a loss of `kind` makes of measured statistics. Raises TypeError or ValueError."""
    batch, device = len(stats), stats.table.device
    if batch == 0:
        raise ValueError("stats: expected at least one sample, got none")
    for name, value in scalars._asdict().items():
        if value is not None:
            checks.per_sample(name, value, batch, device)
    with torch.no_grad():
        impl, table = dispatch.choose(impl, device), stats.table
        if kind.method == "nft":
            table = table.clone()  # what finishes NFT leaves the policy's own error in it
        if fused.traced(table):
            loss, outcome = ops.finish_op(table, *scalars, fused.pack(numbers), str(kind), impl)
        else:
            loss, outcome = ops.finish(table, scalars, kind, numbers, impl)
    c1, c2, c3, policy_loss, kl_loss = outcome.unbind(0)
    return Coefficients(loss, policy_loss[0], kl_loss[0], c1, c2, c3 if kind.third else None)
