"""What the losses beside CRD share: one output type, and the way from their arguments to it."""

from collections.abc import Callable

from .. import fused
from ..output import Output
from ..problem import Kind, Latents, Numbers, Scalars


class LossOutput(Output):
    """Only `loss` carries a gradient, and to `policy` alone; the rest is detached.

    All in fp32, or fp64 when an input was fp64. The rest are rows of a table that backward reads: `clone()`
    before one is changed in place.

    loss           scalar
    error          (B,) mean((policy - target)^2); of `nft_loss`, which divides by 2 beta to find it, to
                   about 1e-7 / beta of its size
    kl             (B,) mean((policy - reference)^2); 0 without a reference
    old_deviation  (B,) mean((policy - old)^2); 0 for losses without `old`
    """

    NAMES = ("error", "kl", "old_deviation")

    error = property(lambda self: self._stats.policy_error)
    kl = property(lambda self: self._stats.kl)
    old_deviation = property(lambda self: self._stats.old_deviation)


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
