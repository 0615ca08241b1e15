"""The two passes as their definition: plain torch, full-size temporaries, nothing clever."""

import torch

from ..noise.reference import normal
from .stats import SCALE_FLOOR, compute_dtype


def guided(ref_cond, ref_uncond, guidance_scale, dtype):
    """ref_uncond + w (ref_cond - ref_uncond), or ref_cond where ref_uncond is None."""
    if ref_uncond is None:
        return ref_cond.to(dtype)
    return ref_uncond.to(dtype) + guidance_scale * (ref_cond.to(dtype) - ref_uncond.to(dtype))


def per_sample_mean(x):
    """Contiguous, so that equal values are summed in equal order whatever the layout they came in."""
    return x.flatten(1).contiguous().mean(1)


def measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, adaptive_weighting, mix):
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    noise = normal(seed, x0.shape) if noise is None else noise
    policy, old = policy.to(dtype), old.to(dtype)
    target = noise.to(dtype) - x0.to(dtype)

    first, second = policy, old
    if mix:
        first, second = (1 - mix) * old + mix * policy, (1 + mix) * old - mix * policy
    policy_error = per_sample_mean((first - target) ** 2)
    old_error = per_sample_mean((second - target) ** 2)
    if adaptive_weighting:
        policy_scale = per_sample_mean((first - target).abs()).clamp(min=SCALE_FLOOR)
        old_scale = per_sample_mean((second - target).abs()).clamp(min=SCALE_FLOOR)
    else:
        policy_scale = old_scale = torch.ones_like(policy_error)
    implicit_reward = old_error / old_scale - policy_error / policy_scale

    if ref_cond is None:
        kl = old_kl = torch.zeros_like(policy_error)
    else:
        reference = guided(ref_cond, ref_uncond, guidance_scale, dtype)
        kl = per_sample_mean((policy - reference) ** 2)
        old_kl = per_sample_mean((old - reference) ** 2)
    old_deviation = per_sample_mean((policy - old) ** 2)
    anchored = torch.full_like(kl, float(ref_cond is not None))
    return torch.stack(
        [
            implicit_reward,
            policy_scale,
            old_scale,
            policy_error,
            old_error,
            kl,
            old_kl,
            old_deviation,
            anchored,
        ]
    )


def velocity_grad(policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale):
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    noise = normal(seed, x0.shape) if noise is None else noise
    column = (-1, *[1] * (policy.dim() - 1))
    target = noise.to(dtype) - x0.to(dtype)
    gradient = c1.to(dtype).view(column) * (policy.to(dtype) - target)
    if ref_cond is not None:
        reference = guided(ref_cond, ref_uncond, guidance_scale, dtype)
        gradient = gradient + c2.to(dtype).view(column) * (policy.to(dtype) - reference)
    if c3 is not None:
        gradient = gradient + c3.to(dtype).view(column) * (policy.to(dtype) - old.to(dtype))
    return gradient.to(policy.dtype)
