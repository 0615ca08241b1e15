"""measure and velocity_grad: the two passes over the latents, for trainers that work in micro-batches."""

import torch

from .. import checks, dispatch
from . import ops
from .stats import Stats


@torch.no_grad()
def measure(
    policy,  # (B, ...)
    old,  # (B, ...)
    ref_cond,  # (B, ...) or None
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    *,
    seed=None,  # (B,) int64
    ref_uncond=None,  # (B, ...)
    guidance_scale=1.0,
    adaptive_weighting=True,
    impl="auto",
):
    """Per-sample statistics of velocity predictions: one read of each input, no gradient.

    With target = noise - x0, s(v) = max(mean|v - target|, 1e-5) (1 without `adaptive_weighting`) and
    reference = ref_uncond + guidance_scale (ref_cond - ref_uncond), or ref_cond where guidance_scale <= 1:

        implicit_reward = -(mean((policy - target)^2) / s(policy) - mean((old - target)^2) / s(old))
        kl              = mean((policy - reference)^2)

    and the other means listed in `Stats`. The implicit reward is exactly 0 where policy equals old.
    A sample's statistics do not depend on the other samples, so micro-batches can be measured one by one and
    joined with `Stats.cat`.

    Latents have any rank >= 2, one shape, and bf16, fp16, fp32 or fp64 in any mix; strided views are not
    copied. `noise=None` with one `seed` per sample makes the noise inside the pass, the same numbers as
    `interpolate` made x_sigma from. `ref_cond=None` means no reference: kl and old_kl are 0, and the
    anchor's coefficient will be. Computed in fp32, or fp64 when an input is fp64.

    Raises TypeError or ValueError naming the argument. NaN goes through.
    Source: Centered Reward Distillation, arXiv 2603.14128; adaptive weighting as in DiffusionNFT, 2509.16117.
    """
    checks.latents(policy=policy, old=old, ref_cond=ref_cond, x0=x0, noise=noise, ref_uncond=ref_uncond)
    checks.given(old=old, x0=x0)
    checks.noise_or_seed(noise, seed, policy)
    ref_uncond = checks.guidance(ref_cond, ref_uncond, guidance_scale)
    impl = dispatch.choose(impl, policy.device)
    table = ops.measure_op(
        policy,
        old,
        ref_cond,
        ref_uncond,
        x0,
        noise,
        seed,
        float(guidance_scale),
        bool(adaptive_weighting),
        0.0,
        impl,
    )
    return Stats(*table.unbind(0), n=policy.shape[1:].numel())


@torch.no_grad()
def velocity_grad(
    policy,  # (B, ...)
    ref_cond,  # (B, ...) or None
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    coefficients,  # of these B samples
    *,
    seed=None,  # (B,) int64
    ref_uncond=None,  # (B, ...)
    guidance_scale=1.0,
    impl="auto",
):
    """d loss / d policy = c1 (policy - target) + c2 (policy - reference), (B, ...) in policy's dtype.

    `coefficients` comes from `center`, sliced to the samples given: any object with tensors `c1` and `c2` of
    shape (B,). target and reference are those of `measure`; with `ref_cond=None` the second term is absent.
    Hand the result to `policy.backward(...)`.

    Raises TypeError or ValueError naming the argument.
    """
    checks.latents(policy=policy, ref_cond=ref_cond, x0=x0, noise=noise, ref_uncond=ref_uncond)
    checks.given(x0=x0)
    checks.noise_or_seed(noise, seed, policy)
    ref_uncond = checks.guidance(ref_cond, ref_uncond, guidance_scale)
    checks.per_sample("c1", coefficients.c1, policy.shape[0], policy.device)
    checks.per_sample("c2", coefficients.c2, policy.shape[0], policy.device)
    impl = dispatch.choose(impl, policy.device)
    return ops.velocity_grad_op(
        policy,
        None,
        ref_cond,
        ref_uncond,
        x0,
        noise,
        seed,
        coefficients.c1,
        coefficients.c2,
        None,
        float(guidance_scale),
        impl,
    )


def attach_gradient(
    loss,  # scalar, or (B,)
    c1,  # (B,)
    c2,  # (B,)
    policy,  # (B, ...)
    ref_cond,  # (B, ...) or None
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    *,
    c3=None,  # (B,) with old
    old=None,  # (B, ...)
    seed=None,  # (B,) int64
    ref_uncond=None,  # (B, ...)
    guidance_scale=1.0,
    impl="auto",
):
    """`loss` with the gradient c1 (policy - target) + c2 (policy - reference) + c3 (policy - old) of policy.

    What makes a loss out of a measured batch: the gradient pass runs in the backward, on the inputs that are
    alive anyway. Every loss of this package is such a combination. Arguments are those of a call to `measure`
    that went through.
    """
    if not (policy.requires_grad and torch.is_grad_enabled()):
        return loss
    ref_uncond = checks.guidance(ref_cond, ref_uncond, guidance_scale)
    impl = dispatch.choose(impl, policy.device)
    old = None if c3 is None else old
    inputs = [None if t is None else t.detach() for t in (old, ref_cond, ref_uncond, x0, noise, seed)]
    attach = ops.attach_gradient_op if torch.compiler.is_compiling() else ops.AttachGradient.apply
    return attach(loss, policy, *inputs, c1, c2, c3, float(guidance_scale), impl)


def implicit_reward(
    policy,  # (B, ...)
    old,  # (B, ...)
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    *,
    seed=None,  # (B,) int64
    adaptive_weighting=True,
    impl="auto",
):
    """r = -(mean((policy - target)^2) / s(policy) - mean((old - target)^2) / s(old)), (B,), differentiable.

    For trainers that center and weigh the rewards themselves: `measure` has the formula in full; the gradient
    flows to policy alone and not through s. Raises TypeError or ValueError naming the argument.
    """
    keywords = {"seed": seed, "impl": impl}
    stats = measure(policy, old, None, x0, noise, adaptive_weighting=adaptive_weighting, **keywords)
    c1 = -2 / stats.n / stats.policy_scale
    return attach_gradient(
        stats.implicit_reward, c1, torch.zeros_like(c1), policy, None, x0, noise, **keywords
    )
