"""The two passes tile by tile in torch ops: for machines without a C++ compiler.

Every temporary is at most TILE elements, whatever the size of the latent.
"""

import itertools

import torch

from .stats import compute_dtype

TILE = 32768


def tiles(shape):
    """Index tuples that cut a tensor of this shape into pieces of at most TILE elements, in order."""
    inner, dim = 1, len(shape)
    while dim and inner * shape[dim - 1] <= TILE:
        dim -= 1
        inner *= shape[dim]
    if dim == 0:
        return [()]
    dim -= 1
    step = TILE // inner
    outer = itertools.product(*(range(size) for size in shape[:dim]))
    return [(*index, slice(at, at + step)) for index in outer for at in range(0, shape[dim], step)]


def measure(policy, old, ref_cond, ref_uncond, x0, noise, guidance_scale):
    """Returns the sums of velocity.cpp, (7, B) float64."""
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    sums = torch.zeros(policy.shape[0], 7, dtype=torch.float64)
    for b, index in itertools.product(range(policy.shape[0]), tiles(policy.shape[1:])):
        at = (b, *index)
        target = _load(noise, at, dtype) - _load(x0, at, dtype)
        p, o = _load(policy, at, dtype), _load(old, at, dtype)
        sums[b, 0] += (p - target).square_().sum()
        sums[b, 1] += (p - target).abs_().sum()
        sums[b, 2] += (o - target).square_().sum()
        sums[b, 3] += (o - target).abs_().sum()
        if ref_cond is not None:
            reference = _reference(ref_cond, ref_uncond, at, guidance_scale, dtype)
            sums[b, 4] += (p - reference).square_().sum()
            sums[b, 5] += (o - reference).square_().sum()
        sums[b, 6] += (p - o).square_().sum()
    return sums.T


def velocity_grad(gradient, policy, ref_cond, ref_uncond, x0, noise, c1, c2, guidance_scale):
    """Writes c1 (policy - target) + c2 (policy - reference) into `gradient`."""
    dtype = compute_dtype(policy, ref_cond, ref_uncond, x0, noise)
    for b, index in itertools.product(range(policy.shape[0]), tiles(policy.shape[1:])):
        at = (b, *index)
        p = _load(policy, at, dtype)
        target = _load(noise, at, dtype) - _load(x0, at, dtype)
        total = (p - target).mul_(c1[b].to(dtype))
        if ref_cond is not None:
            reference = _reference(ref_cond, ref_uncond, at, guidance_scale, dtype)
            total += (p - reference).mul_(c2[b].to(dtype))
        gradient[at] = total


def _load(x, at, dtype):
    """Contiguous, so that equal values are summed in equal order whatever the layout they came in."""
    return x[at].to(dtype).contiguous()


def _reference(ref_cond, ref_uncond, at, guidance_scale, dtype):
    cond = _load(ref_cond, at, dtype)
    if ref_uncond is None:
        return cond
    uncond = _load(ref_uncond, at, dtype)
    return uncond + guidance_scale * (cond - uncond)
