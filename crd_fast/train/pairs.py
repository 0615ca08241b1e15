"""What one optimizer step is made of: (sample, timestep) pairs, drawn as functions of seed and iteration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from crd_fast.config import Recipe
from crd_fast.seeds import ANCHOR, BACKWARD, NOISE, TIMESTEPS, generator, seed_table
from crd_fast.train.draws import drawn_weights, inclusion, systematic


@dataclass(frozen=True)
class Pairs:
    """(sample, timestep) pairs, B of them; pairs with one `group` id share a prompt and a timestep."""

    sample: torch.Tensor  # (B,) int64, row of the iteration's latents
    prompt: torch.Tensor  # (B,) int64, row of the prompt embeddings
    sigma: torch.Tensor  # (B,) float32
    seed: torch.Tensor  # (B,) int64, of the noise
    group: torch.Tensor  # (B,) int64
    advantage: torch.Tensor  # (B,) float32, raw A_i
    anchor: torch.Tensor  # (B,) float32, weight of the KL anchor: 0 where it is not evaluated
    # (B,) bool, whether some reward scored the sample, by default all; where none did A_i is 0
    scored: torch.Tensor = None  # type: ignore[assignment]
    # (B,) float32, weight of the policy's term, by default 1
    policy: torch.Tensor = None  # type: ignore[assignment]
    # (B,) float64 in [0, 1), of the group: which of its pairs go backward
    offset: torch.Tensor = None  # type: ignore[assignment]
    # (B,) int64, of the rollout's steps that which has this sigma
    step: torch.Tensor = None  # type: ignore[assignment]
    # (B,) int64, runs of equal ids: pairs whose coefficients depend on one another, by default the group
    together: torch.Tensor = None  # type: ignore[assignment]

    def __post_init__(self):
        if self.scored is None:
            object.__setattr__(self, "scored", torch.ones_like(self.anchor, dtype=torch.bool))
        if self.policy is None:
            object.__setattr__(self, "policy", torch.ones_like(self.anchor))
        if self.offset is None:
            object.__setattr__(self, "offset", torch.zeros_like(self.anchor, dtype=torch.float64))
        if self.step is None:
            object.__setattr__(self, "step", torch.zeros_like(self.sample))
        if self.together is None:
            object.__setattr__(self, "together", self.group)

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, index) -> Pairs:
        return Pairs(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def cat(parts: list[Pairs]) -> Pairs:
        return Pairs(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    def of_prompts(self, prompts: np.ndarray, samples: int) -> Pairs:
        """The pairs of `prompts` alone, with `prompt` and `sample` as rows of their embeddings and latents.

        prompts: (p,) of the iteration's P, in the order of the rows. samples: K of each, prompt by prompt.
        """
        row = torch.full((1 + max(int(self.prompt.max()), int(prompts.max())),), -1)
        row[torch.from_numpy(prompts)] = torch.arange(len(prompts))
        prompt = row[self.prompt]
        pairs = replace(self, prompt=prompt, sample=prompt * samples + self.sample % samples)
        return pairs[prompt >= 0]

    def to(self, device) -> Pairs:
        return Pairs(**{name: value.to(device) for name, value in vars(self).items()})


def draw_pairs(
    recipe: Recipe,
    iteration: int,
    sigmas: torch.Tensor,  # (steps + 1,) of the rollout
    prompts: np.ndarray,  # (p,) those of the step, of the iteration's P
    advantage_PK: np.ndarray,
    strength_PK: np.ndarray,  # of the KL anchor, up to a factor
    signal: np.ndarray | None = None,  # (steps,) by which timesteps are drawn; none: equally often
    scored_PK: np.ndarray | None = None,  # whether some reward scored the sample; none: all
) -> Pairs:
    """The pairs of one optimizer step, on all ranks the same ones: `Pairs.of_prompts` leaves a rank its own.

    A group is a prompt at a timestep.
    """
    seed, steps, samples = recipe.train.seed, recipe.rollout.steps, advantage_PK.shape[1]
    candidates = recipe.training_steps()
    wanted = recipe.train.timesteps
    count = len(candidates) if wanted == "all" else wanted
    offset_P = generator(seed, iteration, TIMESTEPS).random(len(advantage_PK))
    size = np.ones(steps) if signal is None else signal
    probability = inclusion(size[candidates], count)  # of each candidate
    drawn = systematic(np.broadcast_to(probability, (len(prompts), len(candidates))), offset_P[prompts])
    row_G, candidate_G = drawn.nonzero()  # G groups
    weight_G = np.ones(len(row_G))
    if signal is not None:
        weight_G = count / len(candidates) / probability[candidate_G]

    if scored_PK is None:
        scored_PK = np.ones(advantage_PK.shape, dtype=bool)
    prompt_G = prompts[row_G]
    timestep_G = np.array(candidates)[candidate_G]
    sample_GK = prompt_G[:, None] * samples + np.arange(samples)
    fraction, first = recipe.loss.anchor_fraction, int(prompts[0])
    anchor_GK = weight_G[:, None] * drawn_weights(
        weight_G[:, None] * strength_PK[prompt_G],
        fraction * sample_GK.size,
        generator(seed, iteration, ANCHOR, first).random(len(prompt_G)),
    )
    policy_G = weight_G.copy()
    if recipe.train.skip_equal_groups:
        policy_G[equal_groups(advantage_PK)[prompt_G]] = 0.0

    def of_pairs(values_G) -> torch.Tensor:
        return torch.as_tensor(values_G).repeat_interleave(samples)

    sample, prompt, timestep = torch.from_numpy(sample_GK.flatten()), of_pairs(prompt_G), of_pairs(timestep_G)
    return Pairs(
        sample=sample,
        prompt=prompt,
        sigma=sigmas[timestep],
        seed=seed_table(seed, iteration, NOISE, count=advantage_PK.size * steps)[sample * steps + timestep],
        group=of_pairs(np.arange(len(prompt_G))),
        advantage=torch.from_numpy(advantage_PK).float().flatten()[sample],
        anchor=torch.from_numpy(anchor_GK).float().flatten(),
        scored=torch.from_numpy(scored_PK).flatten()[sample],
        policy=of_pairs(policy_G).float(),
        offset=of_pairs(generator(seed, iteration, BACKWARD, first).random(len(prompt_G))),
        step=timestep,
    )


def equal_groups(advantage_PK: np.ndarray) -> np.ndarray:
    """Whether all samples of a prompt have the same reward, (P,)."""
    return (advantage_PK == advantage_PK[:, :1]).all(axis=1)
