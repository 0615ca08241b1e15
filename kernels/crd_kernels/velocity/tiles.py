"""The two passes tile by tile in torch ops: for machines without a C++ compiler.

Every temporary is at most TILE elements, whatever the size of the latent.
"""

import itertools

import torch

from ..noise.reference import normal_range
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


def measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, mix):
    """Returns the sums of velocity.cpp, (7, B) float64."""
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    sums = torch.zeros(policy.shape[0], 7, dtype=torch.float64)
    for at, begin in _tiles_of(policy):
        b = at[0]
        target = _noise(noise, seed, x0, at, begin, dtype) - _load(x0, at, dtype)
        p, o = _load(policy, at, dtype), _load(old, at, dtype)
        first, second = ((1 - mix) * o + mix * p, (1 + mix) * o - mix * p) if mix else (p, o)
        sums[b, 0] += (first - target).square_().sum()
        sums[b, 1] += (first - target).abs_().sum()
        sums[b, 2] += (second - target).square_().sum()
        sums[b, 3] += (second - target).abs_().sum()
        if ref_cond is not None:
            reference = _reference(ref_cond, ref_uncond, at, guidance_scale, dtype)
            sums[b, 4] += (p - reference).square_().sum()
            sums[b, 5] += (o - reference).square_().sum()
        sums[b, 6] += (p - o).square_().sum()
    return sums.T


def velocity_grad(gradient, policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale):
    """Writes c1 (policy - target) + c2 (policy - reference) + c3 (policy - old) into `gradient`."""
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    for at, begin in _tiles_of(policy):
        b = at[0]
        p = _load(policy, at, dtype)
        target = _noise(noise, seed, x0, at, begin, dtype) - _load(x0, at, dtype)
        total = (p - target).mul_(c1[b].to(dtype))
        if ref_cond is not None:
            reference = _reference(ref_cond, ref_uncond, at, guidance_scale, dtype)
            total += (p - reference).mul_(c2[b].to(dtype))
        if c3 is not None:
            total += (p - _load(old, at, dtype)).mul_(c3[b].to(dtype))
        gradient[at] = total


def _tiles_of(latents):
    """Pairs (index of a tile, number of the sample's elements before it)."""
    for b in range(latents.shape[0]):
        begin = 0
        for index in tiles(latents.shape[1:]):
            at = (b, *index)
            yield at, begin
            begin += latents[at].numel()


def _noise(noise, seed, x0, at, begin, dtype):
    if noise is not None:
        return _load(noise, at, dtype)
    shape = x0[at].shape
    return normal_range(seed[at[0]], begin, begin + shape.numel()).view(shape).to(dtype)


def _load(x, at, dtype):
    """Contiguous, so that equal values are summed in equal order whatever the layout they came in."""
    return x[at].to(dtype).contiguous()


def _reference(ref_cond, ref_uncond, at, guidance_scale, dtype):
    cond = _load(ref_cond, at, dtype)
    if ref_uncond is None:
        return cond
    uncond = _load(ref_uncond, at, dtype)
    return uncond + guidance_scale * (cond - uncond)
