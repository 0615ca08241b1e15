"""What one optimizer step is made of: (sample, timestep) pairs, drawn as functions of seed and iteration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crd_fast.config import Recipe
from crd_fast.seeds import ANCHOR, NOISE, TIMESTEPS, generator, seed_table


@dataclass(frozen=True)
class Pairs:
    """(sample, timestep) pairs, B of them; pairs with one `group` id share a prompt and a timestep."""

    sample: torch.Tensor  # (B,) int64, row of the iteration's latents
    prompt: torch.Tensor  # (B,) int64, row of the prompt embeddings
    sigma: torch.Tensor  # (B,) float32
    seed: torch.Tensor  # (B,) int64, of the noise
    group: torch.Tensor  # (B,) int64
    advantage: torch.Tensor  # (B,) float32, raw A_i
    anchor: torch.Tensor  # (B,) float32, weight of the KL anchor: 0, or 1 / anchor_fraction

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, index) -> Pairs:
        return Pairs(**{name: value[index] for name, value in vars(self).items()})

    def to(self, device) -> Pairs:
        return Pairs(**{name: value.to(device) for name, value in vars(self).items()})


def draw_pairs(
    recipe: Recipe,
    iteration: int,
    sigmas: torch.Tensor,  # (steps + 1,) of the rollout
    prompts: np.ndarray,  # (p,) those of the step, of the iteration's P
    own: np.ndarray,  # this rank's
    advantage_PK: np.ndarray,
) -> Pairs:
    """The pairs of those of the step's prompts that are this rank's own.

    A group is a prompt at a timestep. What is random is drawn for all ranks' pairs, so that it does not
    depend on their number.
    """
    seed, steps, samples = recipe.train.seed, recipe.rollout.steps, advantage_PK.shape[1]
    candidates = recipe.training_steps()
    wanted = recipe.train.timesteps
    count = len(candidates) if wanted == "all" else wanted
    offsets = generator(seed, iteration, TIMESTEPS).random(len(advantage_PK))
    chosen = [candidates[i] for p in prompts for i in draw_timesteps(len(candidates), count, offsets[p])]

    group = torch.arange(len(chosen)).repeat_interleave(samples)
    prompt = torch.from_numpy(prompts).repeat_interleave(count * samples)
    sample = prompt * samples + torch.arange(samples).repeat(len(chosen))
    seeds = seed_table(seed, iteration, NOISE, count=advantage_PK.size * steps)
    timestep = torch.tensor(chosen).repeat_interleave(samples)
    fraction = recipe.loss.anchor_fraction
    anchored = generator(seed, iteration, ANCHOR, int(prompts[0])).random(len(sample)) < fraction
    row = torch.full((len(advantage_PK),), -1)  # of a prompt among the own
    row[torch.from_numpy(own)] = torch.arange(len(own))
    pairs = Pairs(
        sample=row[prompt] * samples + sample % samples,
        prompt=row[prompt],
        sigma=sigmas[timestep],
        seed=seeds[sample * steps + timestep],
        group=group,
        advantage=torch.from_numpy(advantage_PK).float().flatten()[sample],
        anchor=torch.from_numpy(anchored).float() / fraction,
    )
    return pairs[row[prompt] >= 0]


def draw_timesteps(candidates: int, count: int, offset: float) -> list[int]:
    """`count` of `candidates` indices: one from each of `count` equal strata, no repeats.

    Systematic sampling: with `offset` uniform in [0, 1) every index is drawn with the same probability.
    """
    return [int((i + offset) * candidates / count) for i in range(count)]
