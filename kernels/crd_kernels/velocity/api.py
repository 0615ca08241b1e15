"""measure and velocity_grad: the two passes over the latents, for trainers that work in micro-batches."""

from typing import Protocol

import torch
from torch import Tensor

from .. import checks, fused
from ..problem import Kind, Latents, Numbers, Scalars, settings
from .stats import Stats


def measure(
    policy: Tensor,  # (B, ...)
    old: Tensor,  # (B, ...)
    ref_cond: Tensor | None,  # (B, ...)
    x0: Tensor,  # (B, ...)
    noise: Tensor | None,  # (B, ...)
    *,
    seed: Tensor | None = None,  # (B,) int64
    ref_uncond: Tensor | None = None,  # (B, ...)
    guidance_scale: float = 1.0,
    mask: Tensor | None = None,  # broadcasts to (B, ...)
    adaptive_weighting: bool = True,
    mix: float = 0.0,
    impl: str = "auto",
) -> Stats:
    """Per-sample statistics of velocity predictions: one read of each input, no gradient.

    With target = noise - x0, s(v) = max(mean|v - target|, 1e-5) (1 without `adaptive_weighting`) and
    reference = ref_uncond + guidance_scale (ref_cond - ref_uncond), or ref_cond where guidance_scale <= 1:

        implicit_reward = -(mean((policy - target)^2) / s(policy) - mean((old - target)^2) / s(old))
        kl              = mean((policy - reference)^2)

    and the other means listed in `Stats`. The implicit reward is exactly 0 where policy equals old, but with
    `mix` to rounding.
    A sample's statistics do not depend on the other samples, so micro-batches can be measured one by one and
    joined with `Stats.cat`.

    Latents have any rank >= 2, one shape, and bf16, fp16, fp32 or fp64 in any mix; strided views are not
    copied. `noise=None` with one `seed` per sample makes the noise inside the pass, the same numbers as
    `interpolate` made x_sigma from. `ref_cond=None` means no reference: kl and old_kl are 0, and the
    anchor's coefficient will be. Computed in fp32, or fp64 when an input is fp64.

    mix: at m > 0, as NFT with beta = m needs them, policy stands for (1 - m) old + m policy and old for
    (1 + m) old - m policy in the implicit reward, the errors and the scales; not in the other statistics.

    mask: a weight per element, bool or float, of the latents' rank with sizes of 1 where it is broadcast,
    (B, tokens, 1) for packed tokens with padding. Every mean over elements is then sum(mask x) / sum(mask);
    an element of weight 0 is not looked at, be it NaN. A sample without any weight has NaN for its means.

    Raises TypeError or ValueError naming the argument. NaN goes through.
    Source: Centered Reward Distillation, arXiv 2603.14128; adaptive weighting as in DiffusionNFT, 2509.16117.
    """
    checks.tensor("policy", policy)
    kind, numbers = _measure_settings(guidance_scale, adaptive_weighting, mix)
    ref_uncond = checks.guidance(policy, ref_cond, ref_uncond, guidance_scale)
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, checks.mask(mask, policy))

    def check():
        latents.check()
        checks.given(old=old)

    return Stats(fused.measure(check, latents, kind, numbers, impl), policy.shape[1:].numel())


@settings
def _measure_settings(guidance_scale, adaptive_weighting, mix):
    checks.number("guidance_scale", guidance_scale)
    checks.number("mix", mix, at_least=0)
    checks.flag("adaptive_weighting", adaptive_weighting)
    numbers = Numbers(guidance_scale=float(guidance_scale), mix=float(mix))
    return Kind("measure", adaptive_weighting=bool(adaptive_weighting), old_term=mix > 0), numbers


class HasCoefficients(Protocol):
    """`Coefficients`, or anything with these."""

    @property
    def c1(self) -> Tensor: ...  # (B,)
    @property
    def c2(self) -> Tensor: ...  # (B,)

    # and optionally c3: Tensor | None, (B,)


def velocity_grad(
    policy: Tensor,  # (B, ...)
    ref_cond: Tensor | None,  # (B, ...)
    x0: Tensor,  # (B, ...)
    noise: Tensor | None,  # (B, ...)
    coefficients: HasCoefficients,  # of these B samples
    *,
    old: Tensor | None = None,  # (B, ...)
    seed: Tensor | None = None,  # (B,) int64
    ref_uncond: Tensor | None = None,  # (B, ...)
    guidance_scale: float = 1.0,
    mask: Tensor | None = None,  # broadcasts to (B, ...)
    impl: str = "auto",
) -> Tensor:
    """c1 (policy - target) + c2 (policy - reference) + c3 (policy - old), (B, ...) in policy's dtype.

    That is d loss / d policy. `coefficients` comes from `center`, `nft_coefficients` or `awm_coefficients`,
    sliced to the samples given: any object with tensors `c1` and `c2` of shape (B,), and `c3` where the loss
    has that term, which then needs `old`. target, reference and mask (which multiplies the sum) are those of
    `measure`; with `ref_cond=None` the second term is absent. Hand the result to `policy.backward(...)`.

    Raises TypeError or ValueError naming the argument.
    """
    checks.tensor("policy", policy)
    _, numbers = _measure_settings(guidance_scale, False, 0.0)
    c1, c2, c3 = (getattr(coefficients, name, None) for name in ("c1", "c2", "c3"))
    if c1 is None or c2 is None:
        raise TypeError(f"coefficients: expected tensors c1 and c2, got {type(coefficients).__name__}")
    if c3 is None:
        old = None
    ref_uncond = checks.guidance(policy, ref_cond, ref_uncond, guidance_scale)
    latents = Latents(policy, old, ref_cond, ref_uncond, x0, noise, seed, checks.mask(mask, policy))

    def check():
        latents.check()
        checks.per_sample("c1", c1, policy.shape[0], policy.device)
        checks.per_sample("c2", c2, policy.shape[0], policy.device)
        if c3 is not None:
            checks.given(old=old)
            checks.per_sample("c3", c3, policy.shape[0], policy.device)

    with torch.no_grad():
        return fused.gradient(check, latents, (c1, c2, c3), numbers, impl)


def implicit_reward(
    policy: Tensor,  # (B, ...)
    old: Tensor,  # (B, ...)
    x0: Tensor,  # (B, ...)
    noise: Tensor | None,  # (B, ...)
    *,
    seed: Tensor | None = None,  # (B,) int64
    mask: Tensor | None = None,  # broadcasts to (B, ...)
    adaptive_weighting: bool = True,
    impl: str = "auto",
) -> Tensor:
    """r = -(mean((policy - target)^2) / s(policy) - mean((old - target)^2) / s(old)), (B,), differentiable.

    For trainers that center and weigh the rewards themselves: `measure` has the formula in full; the gradient
    flows to policy alone and not through s. Raises TypeError or ValueError naming the argument.
    """
    checks.tensor("policy", policy)
    latents = Latents(policy, old, None, None, x0, noise, seed, checks.mask(mask, policy))
    checks.flag("adaptive_weighting", adaptive_weighting)
    kind = Kind("reward", adaptive_weighting=bool(adaptive_weighting))

    def check():
        latents.check()
        checks.given(old=old)

    return fused.loss(check, latents, Scalars(), kind, Numbers(), impl, "implicit_reward")[0]
