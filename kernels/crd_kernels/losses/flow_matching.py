"""Plain flow matching, and advantage-weighted matching."""

import torch

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
    old=None,  # (B, ...)
    clip_range=None,
    ref_uncond=None,  # (B, ...)
    guidance_scale=1.0,
    kl_beta=0.0,
    advantage_clip=5.0,
    seed=None,  # (B,) int64
    impl="auto",
):
    """Advantage-weighted matching. With e(v) = mean((v - target)^2) and A_i clipped to +-advantage_clip:

        loss = mean_i A_i e(policy_i) + kl_beta mean_i kl_i                         (on-policy, without `old`)
        loss = -mean_i min(A_i rho_i, A_i clip(rho_i, 1 - clip_range, 1 + clip_range)) + kl_beta mean_i kl_i,
               rho_i = exp(e(old_i) - e(policy_i))                                              (with `old`)

    The matching error stands in for the negative log-likelihood, so rho is the probability ratio of policy to
    `old`, the policy that the samples are from; at policy = old the two forms have one gradient. clip_range
    None does not clip. kl_i = mean((policy_i - reference_i)^2) with the reference of `measure`. Returns a
    `LossOutput`; errors as in `measure`.
    Source: Xue et al., "Advantage weighted matching", arXiv 2509.25050; clipping as in PPO, arXiv 1707.06347.
    """
    checks.number("kl_beta", kl_beta, at_least=0)
    checks.number("advantage_clip", advantage_clip, above=0)
    if clip_range is not None:
        checks.number("clip_range", clip_range, above=0)
        checks.tensor("old", old)
    batch = Batch(policy, old, ref_cond, x0, noise, seed, ref_uncond, guidance_scale, impl)
    a = batch.per_sample("advantage", advantage).clamp(-advantage_clip, advantage_clip)
    stats = batch.measure()
    if old is None:
        terms, slope = a * stats.policy_error.double(), a
    else:
        ratio = (stats.old_error.double() - stats.policy_error.double()).exp()
        gain, slope = a * ratio, a * ratio
        if clip_range is not None:
            clipped = a * ratio.clamp(1 - clip_range, 1 + clip_range)
            slope = torch.where(clipped < gain, 0.0, slope)
            gain = torch.minimum(gain, clipped)
        terms = -gain
    loss = (terms + kl_beta * stats.kl.double()).sum() / batch.size
    step = 2 / batch.n / batch.size
    c2 = step * kl_beta * stats.anchored.double()
    return LossOutput(
        batch.attach(loss, stats, step * slope, c2), stats.policy_error, stats.kl, stats.old_deviation
    )
