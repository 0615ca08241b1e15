"""Plain flow matching, and advantage-weighted matching."""

from .. import checks
from .common import Batch, LossOutput


def flow_matching_loss(
    policy,  # (B, ...)
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    *,
    weight=None,  # (B,) float
    seed=None,  # (B,) int64
    impl="auto",
):
    """mean_i weight_i mean((policy_i - target_i)^2), target = noise - x0.

    weight: per sample, of any sign; 1 where not given. Returns a `LossOutput`; errors as in `measure`.
    Source: Lipman et al., "Flow matching for generative modeling", arXiv 2210.02747.
    """
    batch = Batch(policy, None, None, x0, noise, seed, None, 1.0, impl)
    stats = batch.measure()
    error = stats.policy_error.double()
    w = error * 0 + 1 if weight is None else batch.per_sample("weight", weight)
    loss = (w * error).sum() / batch.size
    c1 = 2 / batch.n / batch.size * w
    return LossOutput(batch.attach(loss, stats, c1), stats.policy_error, stats.kl, stats.old_deviation)


def awm_loss(
    policy,  # (B, ...)
    ref_cond,  # (B, ...) or None
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    advantage,  # (B,) float
    *,
    ref_uncond=None,  # (B, ...)
    guidance_scale=1.0,
    kl_beta=0.0,
    advantage_clip=5.0,
    seed=None,  # (B,) int64
    impl="auto",
):
    """Advantage-weighted matching: mean_i A_i mean((policy_i - target_i)^2) + kl_beta mean_i kl_i.

    A_i is the advantage clipped to [-advantage_clip, advantage_clip]; kl_i = mean((policy_i - reference_i)^2)
    with the reference of `measure`. This is the on-policy form, whose probability ratio is 1. Returns a
    `LossOutput`; errors as in `measure`.
    Source: Xue et al., "Advantage weighted matching", arXiv 2509.25050.
    """
    checks.number("kl_beta", kl_beta, at_least=0)
    checks.number("advantage_clip", advantage_clip, above=0)
    batch = Batch(policy, None, ref_cond, x0, noise, seed, ref_uncond, guidance_scale, impl)
    a = batch.per_sample("advantage", advantage).clamp(-advantage_clip, advantage_clip)
    stats = batch.measure()
    loss = (a * stats.policy_error.double() + kl_beta * stats.kl.double()).sum() / batch.size
    step = 2 / batch.n / batch.size
    c2 = step * kl_beta * stats.anchored.double()
    return LossOutput(
        batch.attach(loss, stats, step * a, c2), stats.policy_error, stats.kl, stats.old_deviation
    )
