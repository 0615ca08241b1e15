"""DiffusionNFT: a positive and a negative branch around a moving reference."""

import torch

from .. import checks
from .common import Batch, LossOutput, unit_interval


def nft_loss(
    policy,  # (B, ...)
    old,  # (B, ...)
    ref_cond,  # (B, ...) or None
    x0,  # (B, ...)
    noise,  # (B, ...) or None
    advantage,  # (B,) float
    sigma,  # (B,) float
    *,
    ref_uncond=None,  # (B, ...)
    guidance_scale=1.0,
    beta=1.0,
    kl_beta=1e-4,
    advantage_clip=5.0,
    adaptive_weighting=True,
    seed=None,  # (B,) int64
    impl="auto",
):
    """Negative-aware fine-tuning. With a_i the advantage mapped to [0, 1] as in CRD and c = advantage_clip:

        positive = (1 - beta) old + beta policy        negative = (1 + beta) old - beta policy
        d(v)     = sigma mean((v - target)^2) / max(mean|v - target|, 1e-5 / sigma)     (no gradient below)
        loss     = c / beta mean_i (a_i d(positive_i) + (1 - a_i) d(negative_i)) + kl_beta mean_i kl_i

    d is the squared error of the clean latent x_sigma - sigma v, divided by its mean absolute error; without
    `adaptive_weighting` it is sigma^2 mean((v - target)^2). Returns a `LossOutput`; errors as in `measure`.
    Source: Zheng et al., "DiffusionNFT", arXiv 2509.16117, and its public implementation for the weights.
    """
    checks.number("beta", beta, above=0)
    checks.number("kl_beta", kl_beta, at_least=0)
    checks.number("advantage_clip", advantage_clip, above=0)
    checks.tensor("old", old)
    batch = Batch(policy, old, ref_cond, x0, noise, seed, ref_uncond, guidance_scale, impl)
    a = unit_interval(batch.per_sample("advantage", advantage), advantage_clip)
    level = batch.per_sample("sigma", sigma)
    stats = batch.measure(adaptive_weighting, mix=float(beta))
    if adaptive_weighting:
        floor = 1e-5 / level
        positive_weight = level / torch.maximum(stats.policy_scale.double(), floor)
        negative_weight = level / torch.maximum(stats.old_scale.double(), floor)
    else:
        positive_weight = negative_weight = level**2
    share = advantage_clip / beta / batch.size
    positive, negative = share * a * positive_weight, share * (1 - a) * negative_weight
    loss = (positive * stats.policy_error.double() + negative * stats.old_error.double()).sum()
    loss = loss + kl_beta / batch.size * stats.kl.double().sum()

    # positive - target = (policy - target) - (1 - beta) (policy - old), and d positive / d policy = beta;
    # negative - target = (policy - target) - (1 + beta) (policy - old), and d negative / d policy = -beta.
    step = 2 * beta / batch.n
    c1 = step * (positive - negative)
    c2 = 2 / batch.n / batch.size * kl_beta * stats.anchored.double()
    c3 = step * ((1 + beta) * negative - (1 - beta) * positive)
    return LossOutput(batch.attach(loss, stats, c1, c2, c3), *_policy_side(stats, beta))


def _policy_side(stats, beta):
    """error, kl, old_deviation; the policy's own error is recovered from those of the two branches.

    The branches are old +- beta d with d = policy - old, and the squared error E is quadratic along d, so
    E(old + d) = ((1 + beta) E(old + beta d) - (1 - beta) E(old - beta d)) / (2 beta) + (1 - beta^2) mean(d^2)
    """
    error = ((1 + beta) * stats.policy_error - (1 - beta) * stats.old_error) / (2 * beta)
    return error + (1 - beta**2) * stats.old_deviation, stats.kl, stats.old_deviation
