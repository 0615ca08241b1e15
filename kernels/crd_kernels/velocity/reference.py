"""The two passes as their definition: plain torch, full-size temporaries, nothing clever."""

import torch

from ..finish import reference as finish
from ..noise.philox import normal
from ..problem import Kind, Latents, Numbers, Scalars, compute_dtype
from .stats import ROWS, SCALE_FLOOR


def guided(ref_cond, ref_uncond, guidance_scale, dtype):
    """ref_uncond + w (ref_cond - ref_uncond), or ref_cond where ref_uncond is None."""
    if ref_uncond is None:
        return ref_cond.to(dtype)
    return ref_uncond.to(dtype) + guidance_scale * (ref_cond.to(dtype) - ref_uncond.to(dtype))


def per_sample_mean(x, mask=None):
    """mean over a sample's elements, or sum(mask x) / sum(mask): (B,).

    Contiguous, so that equal values are summed in equal order whatever the layout they came in.
    """
    if mask is None:
        return x.flatten(1).contiguous().mean(1)
    mask = mask.to(x.dtype).flatten(1)
    return torch.where(mask != 0, mask * x.flatten(1), 0).contiguous().sum(1) / mask.sum(1)


def measure(latents: Latents, adaptive_weighting: bool, numbers: Numbers) -> torch.Tensor:
    """The (ROWS, B) table of statistics."""
    policy, old, ref_cond, ref_uncond, x0, noise, seed, mask = latents
    dtype = compute_dtype(*latents[:6])
    if noise is None:
        assert seed is not None
        noise = normal(seed, x0.shape)
    policy = policy.to(dtype)
    old = policy if old is None else old.to(dtype)
    target = noise.to(dtype) - x0.to(dtype)

    def mean(x):
        return per_sample_mean(x, mask)

    first, second = policy, old
    if mix := numbers.mix:
        first, second = (1 - mix) * old + mix * policy, (1 + mix) * old - mix * policy
    policy_error, old_error = mean((first - target) ** 2), mean((second - target) ** 2)
    if adaptive_weighting:
        policy_scale = mean((first - target).abs()).clamp(min=SCALE_FLOOR)
        old_scale = mean((second - target).abs()).clamp(min=SCALE_FLOOR)
    else:
        policy_scale = old_scale = torch.ones_like(policy_error)
    implicit_reward = old_error / old_scale - policy_error / policy_scale

    if ref_cond is None:
        kl = old_kl = torch.zeros_like(policy_error)
    else:
        reference = guided(ref_cond, ref_uncond, numbers.guidance_scale, dtype)
        kl, old_kl = mean((policy - reference) ** 2), mean((old - reference) ** 2)
    old_deviation = mean((policy - old) ** 2)
    anchored = torch.full_like(kl, float(ref_cond is not None))
    elements = torch.full_like(kl, policy.shape[1:].numel())
    if mask is not None:
        elements = mask.to(dtype).flatten(1).sum(1)
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
            elements,
        ]
    )


def gradient(latents: Latents, c1, c2, c3, upstream, numbers: Numbers, dtype) -> torch.Tensor:
    """upstream mask (c1 (policy - target) + c2 (policy - reference) + c3 (policy - old)), in policy's dtype.

    c1, c2, c3: (B,), the last one or None. upstream: scalar or (B,), or None for 1. dtype: to compute in.
    """
    policy, old, ref_cond, ref_uncond, x0, noise, seed, mask = latents
    if noise is None:
        assert seed is not None
        noise = normal(seed, x0.shape)
    upstream = 1 if upstream is None else upstream.to(dtype)

    def column(c):
        return (c.to(dtype) * upstream).view(-1, *[1] * (policy.dim() - 1))

    total = column(c1) * (policy.to(dtype) - (noise.to(dtype) - x0.to(dtype)))
    if ref_cond is not None:
        reference = guided(ref_cond, ref_uncond, numbers.guidance_scale, dtype)
        total = total + column(c2) * (policy.to(dtype) - reference)
    if c3 is not None:
        assert old is not None
        total = total + column(c3) * (policy.to(dtype) - old.to(dtype))
    if mask is not None:
        total = torch.where(mask != 0, total * mask.to(dtype), 0)
    return torch.empty_like(policy).copy_(total)


class Passes:
    """The two passes on any device (crd_kernels/passes.py)."""

    def __init__(self, latents: Latents, scalars: Scalars, kind: Kind):
        self.kind = kind
        self.dtype = compute_dtype(*latents[:6])

    @torch.no_grad()
    def measure(self, latents: Latents, numbers: Numbers):
        return measure(latents, self.kind.adaptive_weighting, numbers)

    @torch.no_grad()
    def forward(self, latents: Latents, scalars: Scalars, numbers: Numbers):
        return finish.table_and_loss(self.measure(latents, numbers), scalars, self.kind, numbers)

    def backward(self, latents: Latents, table, upstream, numbers: Numbers):
        c1, c2, c3 = table[ROWS : ROWS + 3]
        return gradient(latents, c1, c2, c3 if self.kind.old_term else None, upstream, numbers, self.dtype)

    def gradient(self, latents: Latents, coefficients, numbers: Numbers):
        c1, c2, c3 = coefficients
        return gradient(latents, c1, c2, c3, None, numbers, self.dtype)
