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
    scored: torch.Tensor  # (B,) bool, whether some reward scored the sample; where none did A_i is 0
    policy: torch.Tensor  # (B,) float32, weight of the policy's term
    offset: torch.Tensor  # (B,) float64 in [0, 1), of the group: which of its pairs go backward
    step: torch.Tensor  # (B,) int64, the rollout's step that has this sigma
    together: torch.Tensor  # (B,) int64, runs of equal ids: pairs whose coefficients depend on one another

    @classmethod
    def plain(cls, sample, prompt, sigma, seed, group, advantage, anchor) -> Pairs:
        """Pairs of the rollout's first step, all of them scored, with the policy's term at weight 1."""
        return cls(
            *(sample, prompt, sigma, seed, group, advantage, anchor),
            scored=torch.ones_like(anchor, dtype=torch.bool),
            policy=torch.ones_like(anchor),
            offset=torch.zeros_like(anchor, dtype=torch.float64),
            step=torch.zeros_like(sample),
            together=group,
        )

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
    *,
    advantage_PK: np.ndarray,
    anchor_strength_PK: np.ndarray,  # up to a factor
    scored_PK: np.ndarray | None = None,  # whether some reward scored the sample; none: all
    signal: np.ndarray | None = None,  # (steps,) by which timesteps are drawn; none: equally often
) -> Pairs:
    """The pairs of one optimizer step, on all ranks the same ones: `Pairs.of_prompts` leaves a rank its own.

    A group is a prompt at a timestep.
    """
    seed, steps, (_, samples) = recipe.train.seed, recipe.rollout.steps, advantage_PK.shape
    offset_P = generator(seed, iteration, TIMESTEPS).random(len(advantage_PK))
    row_G, timestep_G, weight_G = _drawn_timesteps(recipe, offset_P[prompts], signal)
    prompt_G = prompts[row_G]
    if scored_PK is None:
        scored_PK = np.ones(advantage_PK.shape, dtype=bool)
    sample_GK = prompt_G[:, None] * samples + np.arange(samples)
    fraction, first = recipe.loss.anchor_fraction, int(prompts[0])
    anchor_GK = weight_G[:, None] * drawn_weights(
        weight_G[:, None] * anchor_strength_PK[prompt_G],
        fraction * sample_GK.size,
        generator(seed, iteration, ANCHOR, first).random(len(prompt_G)),
    )
    policy_G = weight_G.copy()
    if recipe.train.skip_equal_groups:
        policy_G[equal_groups(advantage_PK)[prompt_G]] = 0.0

    def of_pairs(values_G) -> torch.Tensor:
        return torch.as_tensor(values_G).repeat_interleave(samples)

    sample, prompt, timestep = torch.from_numpy(sample_GK.flatten()), of_pairs(prompt_G), of_pairs(timestep_G)
    group = of_pairs(np.arange(len(prompt_G)))
    return Pairs(
        sample=sample,
        prompt=prompt,
        sigma=sigmas[timestep],
        seed=seed_table(seed, iteration, NOISE, count=advantage_PK.size * steps)[sample * steps + timestep],
        group=group,
        advantage=torch.from_numpy(advantage_PK).float().flatten()[sample],
        anchor=torch.from_numpy(anchor_GK).float().flatten(),
        scored=torch.from_numpy(scored_PK).flatten()[sample],
        policy=of_pairs(policy_G).float(),
        offset=of_pairs(generator(seed, iteration, BACKWARD, first).random(len(prompt_G))),
        step=timestep,
        together=group,
    )


def _drawn_timesteps(
    recipe: Recipe, offset_p: np.ndarray, signal: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each group's row in `offset_p`, its timestep, and the weight that makes up for how often that is drawn.

    All are (G,). offset_p: in [0, 1), one for each prompt.
    """
    candidates, wanted = recipe.training_steps(), recipe.train.timesteps
    count = len(candidates) if wanted == "all" else wanted
    size = np.ones(recipe.rollout.steps) if signal is None else signal
    probability = inclusion(size[candidates], count)  # of each candidate
    drawn = systematic(np.broadcast_to(probability, (len(offset_p), len(candidates))), offset_p)
    row_G, candidate_G = drawn.nonzero()
    weight_G = np.ones(len(row_G))
    if signal is not None:
        weight_G = count / len(candidates) / probability[candidate_G]
    return row_G, np.array(candidates)[candidate_G], weight_G


def equal_groups(advantage_PK: np.ndarray) -> np.ndarray:
    """Whether all samples of a prompt have the same reward, (P,)."""
    return (advantage_PK == advantage_PK[:, :1]).all(axis=1)
