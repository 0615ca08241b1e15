"""Random numbers as functions of a seed: they depend on no batch, no process, and not on what came before."""

from __future__ import annotations

import numpy as np
import torch

# streams of random numbers within an iteration; of those of an evaluation the last one
ROLLOUT, TIMESTEPS, ANCHOR, NOISE, BACKWARD, SIZES, DRIFT = range(7)


def seeded_noise(seeds: torch.Tensor, shape: tuple[int, ...], device="cpu") -> torch.Tensor:
    """N(0, 1), float32, (len(seeds), *shape). Each sample depends on its own seed alone, not on its batch."""
    noise = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds.tolist()):
        torch.randn(shape, generator=generator.manual_seed(seed), out=row)
    return noise.to(device)


def seed_table(seed: int, *keys: int, count: int) -> torch.Tensor:
    """`count` well-mixed seeds, int64, that are a function of `seed` and `keys`."""
    words = np.random.SeedSequence((seed, *keys)).generate_state(count, np.uint64)
    return torch.from_numpy((words >> np.uint64(1)).astype(np.int64))


def generator(seed: int, *keys: int) -> np.random.Generator:
    """A generator of its own for these keys."""
    return np.random.default_rng((seed, *keys))
