"""The losses as their definition: eager torch, autograd, full-size temporaries. Returns the scalar loss.

`noise` must be given; every argument is in one dtype. These define correctness: the tests compare the fused
losses with them, in float64. mask: broadcasts to (B, ...); denominator: in place of B.
"""

import torch
import torch.nn.functional as F

from ..velocity.reference import guided, per_sample_mean


def flow_matching_loss(policy, x0, noise, weight=None, mask=None):
    error = _mean((policy - (noise - x0)) ** 2, mask)
    return (error if weight is None else weight * error).mean()


def awm_loss(
    policy,
    ref_cond,
    x0,
    noise,
    advantage,
    old=None,
    old_error=None,
    clip_range=None,
    ema=None,
    ema_kl_beta=0.0,
    sigma=None,
    weighting="uniform",
    ref_uncond=None,
    guidance_scale=1.0,
    kl_beta=0.0,
    advantage_clip=5.0,
    kl_weight=1.0,
    denominator=None,
    mask=None,
):
    def matched(error):
        if weighting == "uniform":
            return error
        if weighting in ("t", "t2"):
            return sigma ** (2 if weighting == "t2" else 1) * error
        if weighting == "huber":
            return sigma * ((error + 1e-10).sqrt() - 1e-5)
        return sigma / 0.25 * ((error + 1e-10) ** 0.25 - 1e-10**0.25)

    samples, target = denominator or len(policy), noise - x0
    error = matched(_mean((policy - target) ** 2, mask))
    a = advantage.clamp(-advantage_clip, advantage_clip)
    anchors = kl_beta * kl_weight * _kl(policy, ref_cond, ref_uncond, guidance_scale, mask)
    if ema is not None:
        anchors = anchors + ema_kl_beta * _mean((policy - ema) ** 2, mask)
    if old is not None:
        old_error = _mean((old - target) ** 2, mask)
    if old_error is None:
        return (a * error + anchors).sum() / samples
    ratio = (matched(old_error) - error).exp()
    below, above = (
        (clip_range if isinstance(clip_range, tuple) else (clip_range,) * 2) if clip_range else (1e9, 1e9)
    )
    return (anchors - torch.minimum(a * ratio, a * ratio.clamp(1 - below, 1 + above))).sum() / samples


def nft_loss(
    policy,
    old,
    ref_cond,
    x0,
    noise,
    advantage,
    sigma,
    ref_uncond=None,
    guidance_scale=1.0,
    beta=1.0,
    kl_beta=1e-4,
    advantage_clip=5.0,
    adaptive_weighting=True,
    kl_weight=1.0,
    denominator=None,
    mask=None,
):
    column, samples = sigma.view(-1, *[1] * (policy.dim() - 1)), denominator or len(policy)
    x_sigma = (1 - column) * x0 + column * noise

    def distance(velocity):
        """Squared error of the clean latent that this velocity implies, weighed by its absolute error."""
        residual = x_sigma - column * velocity - x0
        weight = _mean(residual.detach().abs(), mask).clamp(min=1e-5) if adaptive_weighting else 1
        return _mean(residual**2, mask) / weight

    positive = distance((1 - beta) * old + beta * policy)
    negative = distance((1 + beta) * old - beta * policy)
    a = (advantage.clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5).clamp(0, 1)
    policy_loss = advantage_clip / beta * (a * positive + (1 - a) * negative).sum() / samples
    anchor = kl_weight * _kl(policy, ref_cond, ref_uncond, guidance_scale, mask)
    return policy_loss + kl_beta * anchor.sum() / samples


def diffusion_dpo_loss(policy, reference, x0, noise, beta=5000.0, mask=None):
    target = noise - x0
    gap = _mean((policy - target) ** 2, mask) - _mean((reference - target) ** 2, mask)
    preferred, rejected = gap.chunk(2)
    return -F.logsigmoid(-beta / 2 * (preferred - rejected)).mean()


def _kl(policy, ref_cond, ref_uncond, guidance_scale, mask):
    """Per sample, (B,)."""
    if ref_cond is None:
        return torch.zeros(len(policy), dtype=policy.dtype, device=policy.device)
    reference = guided(ref_cond, ref_uncond if guidance_scale > 1 else None, guidance_scale, policy.dtype)
    return _mean((policy - reference) ** 2, mask)


def _mean(x, mask):
    return per_sample_mean(x, None if mask is None else mask.expand(x.shape))
