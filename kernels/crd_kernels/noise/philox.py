"""Noise by seed, as its definition: in torch ops, on any device.

Element e of a sample takes word e % 4 of Philox 4x32-10, key = the sample's 64-bit seed, counter = e // 4:

    u = ((word >> 8) + 1/2) 2^-24                                              in (0, 1]
    (normal_0, normal_1) = sqrt(-2 ln u_0) (cos 2 pi u_1, sin 2 pi u_1), the same of words 2 and 3

computed in float32. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math
from collections.abc import Sequence

import torch

MASK = 0xFFFFFFFF


def philox(
    seed: torch.Tensor, counter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four uint32 words, as int64 tensors, for int64 tensors seed and counter that broadcast."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    c0, c1 = counter & MASK, (counter >> 32) & MASK
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The 64-bit products wrap around in int64; their bits are those of the unsigned products.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def normal(seed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise (B, ...) in float32 of one int64 seed per sample."""
    return normal_range(seed.view(-1, 1), 0, math.prod(shape[1:])).reshape(shape)


def normal_range(seed: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Elements [begin, end) of the noise of `seed`: (end - begin,), or (B, end - begin) for seeds (B, 1)."""
    first = begin // 4
    words = philox(seed.to(torch.int64), torch.arange(first, -(-end // 4), device=seed.device))
    uniform = [((word >> 8).float() + 0.5) * 2.0**-24 for word in words]
    pairs = []
    for u, v in (uniform[:2], uniform[2:]):
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=-1).flatten(-2)[..., begin - 4 * first : end - 4 * first]
