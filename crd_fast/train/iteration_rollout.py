"""An iteration's samples and what the rewards give them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from crd_fast.config import Recipe
from crd_fast.models.base import FlowModel
from crd_fast.models.negative import encode_negatives, negatives
from crd_fast.ranks import Ranks
from crd_fast.rewards.scoring import PromptScoring, Scoring
from crd_fast.run.observer import Observer
from crd_fast.seeds import ROLLOUT, seed_table
from crd_fast.train.evaluate import to_uint8
from crd_fast.train.iteration_prompts import IterationPrompts
from crd_fast.train.micro_batch import decoded, resolve_micro_batch
from crd_fast.train.partial_rollout import PartialRollout, prefixed, rollout_key
from crd_fast.train.rollout import Sampling, generate
from crd_fast.weights import checkpoint
from crd_fast.weights.base import Weights

Embeddings = dict[str, torch.Tensor]


class IterationRollout:
    """K samples of each of an iteration's prompts, those of this rank, by the sampler.

    partial: what is finished of them, in the run's folder `output`.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        model: FlowModel,
        weights: Weights,
        prompts: IterationPrompts,
        ranks: Ranks,
        observer: Observer,
    ):
        self.recipe, self.model, self.weights, self.prompts = recipe, model, weights, prompts
        self.ranks, self.observer = ranks, observer
        self.micro_batch = resolve_micro_batch(recipe.rollout.micro_batch, fixed=weights.sharded)
        self.partial = PartialRollout(output, 60 * recipe.checkpoint.minutes, active=ranks.count == 1)
        self.empty = model.encode_prompts([""])  # for the whole run: prompts may push it out of their cache

    def generate(self, iteration: int, scoring: Scoring) -> tuple[Embeddings, Embeddings, torch.Tensor]:
        """Embeddings (P), also of the negative prompts (P or 1), and latents, (P * K, ...), prompt by prompt.

        A prompt's samples go to `scoring` as soon as all are there.
        """
        config = self.recipe.rollout
        count, samples = config.prompts_per_iteration, config.samples_per_prompt
        own, metadata = self.prompts.own, self.prompts.drawn(iteration)
        prompts = [entry["prompt"] for entry in metadata]
        now = self.prompts.texts(iteration)
        self.model.encode(now, self.prompts.ahead(iteration), self.prompts.counted)
        seeds = seed_table(self.recipe.train.seed, iteration, ROLLOUT, count=count * samples)
        seeds = seeds.view(count, samples)[torch.from_numpy(own)].flatten()
        with self.observer.phase("rollout", len(seeds)):
            with self.observer.phase("prompts"):
                embeddings = self.model.encode_prompts(prompts)
                led_away = self.recipe.guides_training and any(negatives(metadata))
                negative = encode_negatives(self.model, metadata) if led_away else self.empty
            scored = PromptScoring(scoring, self._images, metadata, samples)

            def finished(latents: torch.Tensor) -> None:
                self.partial.see(latents)
                scored(latents)

            inputs = {"seeds": seeds, **prefixed("prompt", embeddings), **prefixed("negative", negative)}
            # as they are now: where the sampler is in use, some weights have the policy in its place
            state = self.weights.state()
            first_latents = self.partial.begin(
                lambda: rollout_key(self.recipe, checkpoint.describe(self.model), state, inputs)
            )
            with self.weights.use("sampler"):
                latents = generate(
                    self.model,
                    embeddings,
                    torch.arange(len(own)).repeat_interleave(samples),
                    seeds,
                    Sampling.of(self.recipe, config, negative, self.micro_batch, iteration),
                    finished,
                    self.observer,
                    branch="sampler",
                    first_latents=first_latents,
                )
        return embeddings, negative, latents

    def _images(self, latents: torch.Tensor) -> np.ndarray:
        with self.observer.phase("decode"):
            images = decoded(self.model, latents)
        return to_uint8(images)

    def scores(self, scoring: Scoring) -> dict[str, np.ndarray]:
        """Each reward's values for the prompts of all ranks, (P, K), once the scoring has ended."""
        config = self.recipe.rollout
        shape = config.prompts_per_iteration, config.samples_per_prompt
        order = np.argsort(self.prompts.everywhere)
        with self.observer.phase("rewards", math.prod(shape) // self.ranks.count):
            scores = scoring.results()
            self.observer.advance(math.prod(shape) // self.ranks.count)
            return {name: self.ranks.gather(values).reshape(shape)[order] for name, values in scores.items()}
