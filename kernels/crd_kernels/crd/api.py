"""crd_loss: centered reward distillation in one call."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks, dispatch, fused
from ..centering.api import crd_settings
from ..centering.distributed import everyone_has_samples
from ..finish import ops
from ..output import Output
from ..problem import Kind, Latents, Scalars
from ..velocity.stats import KL_LOSS, POLICY_LOSS

if TYPE_CHECKING:  # absent from a torch without torch.distributed
    from torch.distributed import ProcessGroup


class CRDOutput(Output):
    """What `crd_loss` returns. Only `loss` carries a gradient, and to `policy` alone; the rest is detached.

    All in fp32, or fp64 when an input was fp64. The rest are rows of a table that backward reads: `clone()`
    before one is changed in place.

    loss             scalar, policy_loss + kl_loss
    policy_loss      scalar
    kl_loss          scalar
    implicit_reward  (B,)
    kl               (B,) mean((policy - reference)^2)
    old_kl           (B,) mean((old - reference)^2)
    old_deviation    (B,) mean((policy - old)^2)
    """

    NAMES = ("policy_loss", "kl_loss", "implicit_reward", "kl", "old_kl", "old_deviation")

    policy_loss = property(lambda self: self._table[POLICY_LOSS, 0])
    kl_loss = property(lambda self: self._table[KL_LOSS, 0])
    implicit_reward = property(lambda self: self._stats.implicit_reward)
    kl = property(lambda self: self._stats.kl)
    old_kl = property(lambda self: self._stats.old_kl)
    old_deviation = property(lambda self: self._stats.old_deviation)


def crd_loss(
    policy: Tensor,  # (B, ...)
    old: Tensor,  # (B, ...)
    ref_cond: Tensor | None,  # (B, ...)
    x0: Tensor,  # (B, ...)
    noise: Tensor | None,  # (B, ...)
    advantage: Tensor,  # (B,) float
    group: Tensor,  # (B,) int
    *,
    seed: Tensor | None = None,  # (B,) int64
    ref_uncond: Tensor | None = None,  # (B, ...)
    guidance_scale: float = 1.0,
    mask: Tensor | None = None,  # broadcasts to (B, ...)
    beta: float = 1.0,
    kl_beta: float = 0.1,
    kl_min: float = 1e-4,
    adaptive_weighting: bool = True,
    reward_adaptive_kl: bool = True,
    loss_type: str = "mse",
    temperature: float = float("inf"),
    centering: str = "prompt",
    advantage_clip: float = 5.0,
    kl_weight: Tensor | None = None,  # (B,) float
    denominator: float | None = None,
    process_group: "ProcessGroup | None" = None,
    impl: str = "auto",
) -> CRDOutput:
    """The loss of centered reward distillation and its gradient, over whole groups. Returns a `CRDOutput`.

    `measure`, then `center` (whose docstrings have the formulas and the other arguments), then on
    `out.loss.backward()` the gradient pass of `velocity_grad`. No full-size temporary but the gradient is
    ever allocated; every sample of a group must be in the call. Where they do not fit, use the three steps.

    policy, old: velocity predictions of the trained weights and of their moving snapshot; ref_cond and
    ref_uncond: of the frozen weights with the prompt and with the empty one; x0, noise: what the noised
    latent was made of. One shape (B, ...), bf16, fp16, fp32 or fp64 in any mix, strided views uncopied.
    advantage: raw A_i; clipping and the map to [0, 1] happen here. group: one id per (prompt, timestep).
    Nothing is copied for the backward pass: tensors made in inference mode, whose changes autograd cannot
    see, must stay as they are until then.

    impl: "triton" (GPU), "cpu", "reference" (the readable definition), "auto" (triton on a GPU, else cpu).
    Raises TypeError or ValueError naming the argument, what was wanted and what came.
    Source: arXiv 2603.14128.
    """
    checks.tensor("policy", policy)
    kind, numbers = crd_settings(
        beta,
        kl_beta,
        kl_min,
        reward_adaptive_kl,
        loss_type,
        temperature,
        centering,
        advantage_clip,
        denominator,
        guidance_scale,
        adaptive_weighting,
    )
    ref_uncond = checks.guidance(policy, ref_cond, ref_uncond, guidance_scale)
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, checks.mask(mask, policy))
    scalars = Scalars(advantage, group, None, kl_weight)

    def check():
        latents.check()
        checks.given(old=old, advantage=advantage, group=group)
        scalars.check(policy.shape[0], policy.device)

    if process_group is not None:
        return _over_ranks(check, latents, scalars, kind, numbers, process_group, impl)
    return CRDOutput(*fused.loss(check, latents, scalars, kind, numbers, impl, "crd_loss"))


def _over_ranks(check, latents, scalars, kind, numbers, process_group, impl):
    """The three steps, with an exchange of scalars between the ranks in the middle."""
    policy = latents.policy
    if policy.shape[0] == 0:
        everyone_has_samples(process_group, 0, policy.device)
    impl = dispatch.choose(impl, policy.device)
    check()  # each time: what `measure` remembers of a call says nothing of the scalars
    with torch.no_grad():
        measuring = Kind("measure", adaptive_weighting=kind.adaptive_weighting)
        table = fused.measure(check, latents, measuring, numbers, impl, "crd_loss")
        loss, outcome = ops.finish(table, scalars, kind, numbers, impl, process_group)
        table = torch.cat([table, outcome])
    return CRDOutput(fused.attach(loss, table, latents, kind, numbers, impl), table)


class CRDLoss(torch.nn.Module):
    """`crd_loss` as a module with its settings fixed: `CRDLoss(beta=30.0)`.

    Takes every keyword of `crd_loss`; keywords of the call override those of the constructor.
    """

    def __init__(self, **settings: Any):
        super().__init__()
        known = crd_loss.__kwdefaults__ or {}
        unknown = settings.keys() - known.keys()
        if unknown:
            names = ", ".join(known)
            raise TypeError(f"{min(unknown)}: expected one of {names}, got an unknown setting")
        self.settings = settings

    def forward(
        self,
        policy: Tensor,
        old: Tensor,
        ref_cond: Tensor | None,
        x0: Tensor,
        noise: Tensor | None,
        advantage: Tensor,
        group: Tensor,
        **settings: Any,
    ) -> CRDOutput:
        return crd_loss(policy, old, ref_cond, x0, noise, advantage, group, **{**self.settings, **settings})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
