"""Interpolation as its definition."""

import torch

from .philox import normal


def interpolate(x0, sigma, noise, seed, dtype):
    if noise is None:
        noise = normal(seed, x0.shape)
    compute = torch.promote_types(torch.promote_types(x0.dtype, noise.dtype), torch.float32)
    sigma = sigma.to(compute).view(-1, *[1] * (x0.dim() - 1))
    return ((1 - sigma) * x0.to(compute) + sigma * noise.to(compute)).to(dtype).contiguous()
