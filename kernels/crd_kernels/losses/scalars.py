"""The losses beside CRD on B scalars, from measured statistics to losses and coefficients: the definition.

Each takes (stats, scalars, kind, numbers) and returns policy_loss, kl_loss, c1, c2, c3 in float64, with

    d loss / d policy = c1 (policy - target) + c2 (policy - reference) + c3 (policy - old)

The public functions of the same names have the formulas. torch ops on any device, without a host sync.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..centering.reference import unit_interval
from ..problem import Kind, Numbers, Scalars
from ..velocity.stats import Stats

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _anchor(stats: Stats, scalars: Scalars, numbers: Numbers, samples: float) -> tuple[Tensor, Tensor]:
    """kl_loss and c2 of kl_beta mean_i kl_weight_i kl_i."""
    k = torch.full_like(stats.kl, numbers.kl_beta, dtype=torch.float64)
    if scalars.kl_weight is not None:
        k = k * scalars.kl_weight.double()
    return (k * stats.kl.double()).sum() / samples, 2 / stats.elements.double() / samples * k * stats.anchored


def reward(stats: Stats, scalars: Scalars, kind: Kind, numbers: Numbers) -> Terms:
    c1 = -2 / stats.elements.double() / stats.policy_scale.double()
    return torch.zeros_like(c1).sum(), torch.zeros_like(c1).sum(), c1, torch.zeros_like(c1), None


def flow_matching(stats: Stats, scalars: Scalars, kind: Kind, numbers: Numbers) -> Terms:
    samples = numbers.denominator or len(stats)
    error = stats.policy_error.double()
    weight = torch.ones_like(error) if scalars.advantage is None else scalars.advantage.double()
    c1 = 2 / stats.elements.double() / samples * weight
    loss = (weight * error).sum() / samples
    return loss, torch.zeros_like(loss), c1, torch.zeros_like(c1), None


def matching(error, sigma, weighting):
    """AWM's weighed matching error g(e, t) and its derivative with respect to e."""
    if weighting == "uniform":
        return error, torch.ones_like(error)
    t = sigma.double()
    if weighting == "t":
        return t * error, t
    if weighting == "t2":
        return t**2 * error, t**2
    if weighting == "huber":
        root = (error + 1e-10).sqrt()
        return t * (root - 1e-5), t / (2 * root)
    power = 0.25
    base = error + 1e-10
    return t / power * (base**power - 1e-10**power), t * base ** (power - 1)


def awm(stats: Stats, scalars: Scalars, kind: Kind, numbers: Numbers) -> Terms:
    assert scalars.advantage is not None
    samples = numbers.denominator or len(stats)
    clip = numbers.advantage_clip
    a = scalars.advantage.double().clamp(-clip, clip)
    error, slope = matching(stats.policy_error.double(), scalars.sigma, kind.weighting)
    if kind.off_policy:
        old_error = stats.old_error if scalars.old_error is None else scalars.old_error
        old_error, _ = matching(old_error.double(), scalars.sigma, kind.weighting)
        ratio = (old_error - error).exp()
        gain, factor = a * ratio, a * ratio
        if kind.clipped:
            clipped = a * ratio.clamp(numbers.ratio_low, numbers.ratio_high)
            factor = torch.where(clipped < gain, 0.0, factor)
            gain = torch.minimum(gain, clipped)
        terms = -gain
    else:
        terms, factor = a * error, a
    kl_loss, c2 = _anchor(stats, scalars, numbers, samples)
    step, c3 = 2 / stats.elements.double() / samples, None
    if kind.old_term:
        kl_loss = kl_loss + numbers.old_kl_beta * stats.old_deviation.double().sum() / samples
        c3 = numbers.old_kl_beta * step
    return terms.sum() / samples, kl_loss, step * factor * slope, c2, c3


def nft(stats: Stats, scalars: Scalars, kind: Kind, numbers: Numbers) -> Terms:
    assert scalars.advantage is not None and scalars.sigma is not None
    samples, beta = numbers.denominator or len(stats), numbers.beta
    a = unit_interval(scalars.advantage, numbers.advantage_clip)
    level = scalars.sigma.double()
    if kind.adaptive_weighting:
        floor = 1e-5 / level
        positive_weight = level / torch.maximum(stats.policy_scale.double(), floor)
        negative_weight = level / torch.maximum(stats.old_scale.double(), floor)
    else:
        positive_weight = negative_weight = level**2
    share = numbers.advantage_clip / beta / samples
    positive, negative = share * a * positive_weight, share * (1 - a) * negative_weight
    loss = (positive * stats.policy_error.double() + negative * stats.old_error.double()).sum()
    kl_loss, c2 = _anchor(stats, scalars, numbers, samples)
    # positive - target = (policy - target) - (1 - beta) (policy - old), and d positive / d policy = beta;
    # negative - target = (policy - target) - (1 + beta) (policy - old), and d negative / d policy = -beta.
    step = 2 * beta / stats.elements.double()
    c3 = step * ((1 + beta) * negative - (1 - beta) * positive)
    return loss, kl_loss, step * (positive - negative), c2, c3


def dpo(stats: Stats, scalars: Scalars, kind: Kind, numbers: Numbers) -> Terms:
    gap = stats.policy_error.double() - stats.old_error.double()
    preferred, rejected = gap.chunk(2)
    logits = -numbers.beta / 2 * (preferred - rejected)
    pairs = numbers.denominator or logits.shape[0]
    loss = -F.logsigmoid(logits).sum() / pairs
    slope = numbers.beta / 2 / pairs * (-logits).sigmoid()  # d loss / d e(policy) of the preferred
    c1 = 2 / stats.elements.double() * torch.cat([slope, -slope])
    return loss, torch.zeros_like(loss), c1, torch.zeros_like(c1), None


def error_of_policy(stats, beta: float):
    """mean((policy - target)^2) from NFT's two branches, (B,) float64.

    The branches are old +- beta d with d = policy - old, and the squared error E is quadratic along d, so
    E(old + d) = ((1 + beta) E(old + beta d) - (1 - beta) E(old - beta d)) / (2 beta) + (1 - beta^2) mean(d^2)
    """
    positive, negative = stats.policy_error.double(), stats.old_error.double()
    error = ((1 + beta) * positive - (1 - beta) * negative) / (2 * beta)
    return error + (1 - beta**2) * stats.old_deviation.double()
