"""The losses as their definition: eager torch, autograd, full-size temporaries. Returns the scalar loss.

`noise` must be given; every argument is in one dtype. These define correctness: the tests compare the fused
losses with them, in float64.
"""

import torch
import torch.nn.functional as F

from ..velocity.reference import guided, per_sample_mean
from .common import unit_interval


def flow_matching_loss(policy, x0, noise, weight=None):
    error = per_sample_mean((policy - (noise - x0)) ** 2)
    return (error if weight is None else weight * error).mean()


def awm_loss(
    policy,
    ref_cond,
    x0,
    noise,
    advantage,
    old=None,
    clip_range=None,
    ref_uncond=None,
    guidance_scale=1.0,
    kl_beta=0.0,
    advantage_clip=5.0,
):
    error = per_sample_mean((policy - (noise - x0)) ** 2)
    a = advantage.clamp(-advantage_clip, advantage_clip)
    kl = kl_beta * _kl(policy, ref_cond, ref_uncond, guidance_scale)
    if old is None:
        return (a * error).mean() + kl
    ratio = (per_sample_mean((old - (noise - x0)) ** 2) - error).exp()
    bound = float("inf") if clip_range is None else clip_range
    return -torch.minimum(a * ratio, a * ratio.clamp(1 - bound, 1 + bound)).mean() + kl


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
):
    column = sigma.view(-1, *[1] * (policy.dim() - 1))
    x_sigma = (1 - column) * x0 + column * noise

    def distance(velocity):
        """Squared error of the clean latent that this velocity implies, weighed by its absolute error."""
        residual = x_sigma - column * velocity - x0
        weight = per_sample_mean(residual.detach().abs()).clamp(min=1e-5) if adaptive_weighting else 1
        return per_sample_mean(residual**2) / weight

    positive = distance((1 - beta) * old + beta * policy)
    negative = distance((1 + beta) * old - beta * policy)
    a = unit_interval(advantage, advantage_clip)
    policy_loss = advantage_clip / beta * (a * positive + (1 - a) * negative).mean()
    return policy_loss + kl_beta * _kl(policy, ref_cond, ref_uncond, guidance_scale)


def diffusion_dpo_loss(policy, reference, x0, noise, beta=5000.0):
    target = noise - x0
    gap = per_sample_mean((policy - target) ** 2) - per_sample_mean((reference - target) ** 2)
    preferred, rejected = gap.chunk(2)
    return -F.logsigmoid(-beta / 2 * (preferred - rejected)).mean()


def _kl(policy, ref_cond, ref_uncond, guidance_scale):
    if ref_cond is None:
        return torch.zeros((), dtype=policy.dtype, device=policy.device)
    reference = guided(ref_cond, ref_uncond if guidance_scale > 1 else None, guidance_scale, policy.dtype)
    return per_sample_mean((policy - reference) ** 2).mean()
