"""The two passes tile by tile in torch ops: for machines without a C++ compiler.

Every temporary is at most TILE elements, whatever the size of the latent.
"""

import itertools

import torch

from ..noise.philox import normal_range
from ..problem import Latents, Numbers, compute_dtype
from .stats import SUMS

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


@torch.no_grad()
def measure(latents: Latents, numbers: Numbers):
    """Returns the sums of velocity.cpp, (SUMS, B) float64."""
    policy, old, ref_cond, ref_uncond, x0, noise, seed, mask = latents
    dtype, mix = compute_dtype(*latents[:6]), numbers.mix
    sums = torch.zeros(policy.shape[0], SUMS, dtype=torch.float64, device="cpu")
    for at, begin in _tiles_of(policy):
        target = _noise(noise, seed, x0, at, begin, dtype) - _load(x0, at, dtype)
        p = _load(policy, at, dtype)
        o = p if old is None else _load(old, at, dtype)
        weight = None if mask is None else _load(mask, at, dtype)

        def total(x, weight=weight):
            return (x if weight is None else torch.where(weight != 0, weight * x, 0)).sum()

        first, second = ((1 - mix) * o + mix * p, (1 + mix) * o - mix * p) if mix else (p, o)
        row = sums[at[0]]
        row[0] += total((first - target).square_())
        row[1] += total((first - target).abs_())
        row[2] += total((second - target).square_())
        row[3] += total((second - target).abs_())
        if ref_cond is not None:
            reference = _reference(ref_cond, ref_uncond, at, numbers.guidance_scale, dtype)
            row[4] += total((p - reference).square_())
            row[5] += total((o - reference).square_())
        row[6] += total((p - o).square_())
        row[7] += 0 if weight is None else weight.sum()
    return sums.T


def gradient(latents: Latents, c1, c2, c3, upstream, numbers: Numbers, dtype):
    """upstream mask (c1 (policy - target) + c2 (policy - reference) + c3 (policy - old)), policy's dtype.

    dtype: of the computation.
    """
    policy, old, ref_cond, ref_uncond, x0, noise, seed, mask = latents
    gradient = torch.empty_like(policy)
    scale = 1 if upstream is None else upstream.to(dtype)
    c1, c2, c3 = (None if c is None else c.to(dtype) * scale for c in (c1, c2, c3))
    for at, begin in _tiles_of(policy):
        b = at[0]
        p = _load(policy, at, dtype)
        target = _noise(noise, seed, x0, at, begin, dtype) - _load(x0, at, dtype)
        total = (p - target).mul_(c1[b])
        if ref_cond is not None:
            reference = _reference(ref_cond, ref_uncond, at, numbers.guidance_scale, dtype)
            total += (p - reference).mul_(c2[b])
        if c3 is not None:
            total += (p - _load(old, at, dtype)).mul_(c3[b])
        if mask is not None:
            weight = _load(mask, at, dtype)
            total = torch.where(weight != 0, weight * total, 0)
        gradient[at] = total
    return gradient


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
