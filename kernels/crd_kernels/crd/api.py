"""crd_loss: centered reward distillation in one call."""

from dataclasses import dataclass

import torch

from .. import checks, dispatch
from ..centering import center
from ..velocity import measure
from ..velocity.api import attach_gradient


@dataclass(frozen=True)
class CRDOutput:
    """What `crd_loss` returns. Only `loss` carries a gradient, and to `policy` alone."""

    loss: torch.Tensor  # scalar, policy_loss + kl_loss
    policy_loss: torch.Tensor  # scalar, detached
    kl_loss: torch.Tensor  # scalar, detached
    implicit_reward: torch.Tensor  # (B,), detached like the rest
    kl: torch.Tensor  # (B,) mean((policy - reference)^2)
    old_kl: torch.Tensor  # (B,) mean((old - reference)^2)
    old_deviation: torch.Tensor  # (B,) mean((policy - old)^2)


def crd_loss(
    policy,  # (B, ...)
    old,  # (B, ...)
    ref_cond,  # (B, ...) or None
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    advantage,  # (B,) float
    group,  # (B,) int
    *,
    seed=None,  # (B,) int64
    ref_uncond=None,  # (B, ...)
    guidance_scale=1.0,
    beta=1.0,
    kl_beta=0.1,
    kl_min=1e-4,
    adaptive_weighting=True,
    reward_adaptive_kl=True,
    loss_type="mse",
    temperature=float("inf"),
    centering="prompt",
    advantage_clip=5.0,
    kl_weight=None,  # (B,) float
    denominator=None,
    process_group=None,
    impl="auto",
):
    """The loss of centered reward distillation and its gradient, over whole groups. Returns a `CRDOutput`.

    `measure`, then `center` (whose docstrings have the formulas and the other arguments), then on
    `out.loss.backward()` the gradient pass of `velocity_grad`. No full-size temporary but the gradient is
    ever allocated; every sample of a group must be in the call. Where they do not fit, use the three steps.

    policy, old: velocity predictions of the trained weights and of their moving snapshot; ref_cond and
    ref_uncond: of the frozen weights with the prompt and with the empty one; x0, noise: what the noised
    latent was made of. One shape (B, ...), bf16, fp16, fp32 or fp64 in any mix, strided views uncopied.
    advantage: raw A_i; clipping and the map to [0, 1] happen here. group: one id per (prompt, timestep).

    impl: "triton" (GPU), "cpu", "reference" (the readable definition), "auto" (triton on a GPU, else cpu).
    Raises TypeError or ValueError naming the argument, what was wanted and what came.
    Source: arXiv 2603.14128.
    """
    checks.tensor("policy", policy)
    impl = dispatch.choose(impl, policy.device)
    with torch.no_grad():
        stats = measure(
            policy,
            old,
            ref_cond,
            x0,
            noise,
            seed=seed,
            ref_uncond=ref_uncond,
            guidance_scale=guidance_scale,
            adaptive_weighting=adaptive_weighting,
            impl=impl,
        )
        coefficients = center(
            stats,
            advantage,
            group,
            beta=beta,
            kl_beta=kl_beta,
            kl_min=kl_min,
            reward_adaptive_kl=reward_adaptive_kl,
            loss_type=loss_type,
            temperature=temperature,
            centering=centering,
            advantage_clip=advantage_clip,
            kl_weight=kl_weight,
            denominator=denominator,
            process_group=process_group,
            impl=impl,
        )
    return CRDOutput(
        loss=attach_gradient(
            coefficients.loss,
            coefficients.c1,
            coefficients.c2,
            policy,
            ref_cond,
            x0,
            noise,
            seed=seed,
            ref_uncond=ref_uncond,
            guidance_scale=guidance_scale,
            impl=impl,
        ),
        policy_loss=coefficients.policy_loss,
        kl_loss=coefficients.kl_loss,
        implicit_reward=stats.implicit_reward,
        kl=stats.kl,
        old_kl=stats.old_kl,
        old_deviation=stats.old_deviation,
    )


class CRDLoss(torch.nn.Module):
    """`crd_loss` as a module with its settings fixed: `CRDLoss(beta=30.0)`.

    Takes every keyword of `crd_loss`; keywords of the call override those of the constructor.
    """

    def __init__(self, **settings):
        super().__init__()
        unknown = settings.keys() - crd_loss.__kwdefaults__.keys()
        if unknown:
            known = ", ".join(crd_loss.__kwdefaults__)
            raise TypeError(f"{min(unknown)}: expected one of {known}, got an unknown setting")
        self.settings = settings

    def forward(self, policy, old, ref_cond, x0, noise, advantage, group, **settings):
        return crd_loss(policy, old, ref_cond, x0, noise, advantage, group, **{**self.settings, **settings})

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
