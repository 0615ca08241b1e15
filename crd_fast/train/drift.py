"""How far an evaluation's weights are from the pretrained model, whatever the loss is anchored to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from crd_fast.run.observer import Observer
from crd_fast.seeds import DRIFT, generator, seed_table, seeded_noise
from crd_fast.train.evaluate import EVALUATION_SEED, Evaluated, Evaluation
from crd_fast.train.forwards import autocast, chosen_prompts, doubled_velocity, unconditional
from crd_fast.train.micro_batch import MicroBatch, in_micro_batches
from crd_fast.weights.base import Weights

LEVELS = 4  # noise levels, spread over the evaluation's own steps
GUIDED, UNGUIDED = "drift/guided", "drift/unguided"


def with_drift(result: Evaluated, evaluation: Evaluation, weights: Weights, observer: Observer) -> Evaluated:
    """The same with the distance to the pretrained model, where the recipe asks for it."""
    if result.latents is None:
        return result
    drift = Drift(evaluation, result.latents, observer)
    with observer.phase("drift", 2 * len(result.latents)):
        with weights.use(evaluation.recipe.evaluate.weights):
            drift.predict()
        with weights.use("reference"):
            return result.with_values(drift.distances())


class Drift:
    """Squared distance of velocities at an evaluation's own pictures, each at one of a few noise levels.

    Level and noise of a picture are the same in every evaluation, and depend on nothing that trains. Each
    rank measures its own pictures: latents are theirs, float32 (n, ...), as `Evaluated` has them.
    `predict` is to be called with the evaluated weights active, `distances` with the pretrained ones.
    """

    def __init__(self, evaluation: Evaluation, latents: torch.Tensor, observer: Observer):
        config, count = evaluation.recipe.evaluate, len(evaluation)
        if config.drift is None:
            raise ValueError("evaluate.drift: expected a guidance scale, got null")
        self.evaluation, self.observer, self.guidance_scale = evaluation, observer, config.drift
        sigmas = evaluation.model.sigmas(config.steps, evaluation.recipe.evaluation_size)
        steps = (2 * torch.arange(LEVELS) + 1) * config.steps // (2 * LEVELS)  # the middle one of each part
        order = torch.from_numpy(generator(EVALUATION_SEED, DRIFT).permutation(count))
        own = evaluation.own_rows()
        self.latents, self.prompt = latents, evaluation.prompt_index[own]
        self.sigma = sigmas[steps[order % LEVELS]][own]
        self.seeds = seed_table(EVALUATION_SEED, DRIFT, count=count)[own]
        self.policy: torch.Tensor | None = None

    def predict(self) -> None:
        """The conditional velocities by the weights that are active."""

        def velocity(x, sigma, embeddings, rows):
            with self.observer.branch("policy", len(x)):
                return self.evaluation.model.velocity(x, sigma, embeddings).float()

        self.policy = torch.cat(self._in_parts(velocity, self.evaluation.micro_batch.size))

    def distances(self) -> dict[str, np.ndarray]:
        """Mean squared distance of what was predicted to the active weights' velocity, by name, (N,).

        `drift/unguided` to their conditional one, `drift/guided` to uncond + w (cond - uncond); the first
        alone where w <= 1. On every rank, of all ranks' pictures.
        """
        policy, evaluation, guided = self.policy, self.evaluation, self.guidance_scale > 1
        if policy is None:
            raise ValueError("drift: predict comes first")

        def distance(x, sigma, embeddings, rows):
            if guided:
                away = unconditional(evaluation.empty, self.prompt[rows], x.device)
                both = doubled_velocity(evaluation.model, x, sigma, embeddings, away, self._watched)
                conditional, other = (part.float() for part in both)
                references = [conditional, torch.lerp(other, conditional, self.guidance_scale)]
            else:
                with self._watched(len(x)):
                    references = [evaluation.model.velocity(x, sigma, embeddings).float()]
            gaps = [(policy[rows] - reference).square().flatten(1).mean(dim=1) for reference in references]
            return torch.stack(gaps, dim=1)

        # guided forwards are twice as large
        size = max(1, evaluation.micro_batch.size // (2 if guided else 1))
        found = torch.cat(self._in_parts(distance, size)).double().cpu().numpy()
        found = evaluation.ranks.gather(found)[: len(evaluation)]
        return dict(zip((UNGUIDED, GUIDED), found.T))

    def _watched(self, rows: int):
        return self.observer.branch("reference", rows)

    @torch.no_grad()
    def _in_parts(self, of_part: Callable[..., torch.Tensor], size: int) -> list[torch.Tensor]:
        """What `of_part(x, sigma, embeddings, rows)` returns for as many rows as go through at once."""
        evaluation, latents = self.evaluation, self.latents
        found: list[torch.Tensor] = []

        def run(rows: slice) -> None:
            noise = seeded_noise(self.seeds[rows], latents.shape[1:], latents.device)
            sigma = self.sigma[rows].to(latents.device)
            x = torch.lerp(latents[rows], noise, sigma.view(-1, *[1] * (latents.ndim - 1)))
            embeddings = chosen_prompts(evaluation.embeddings, self.prompt[rows], x.device)
            with autocast(x.device.type, evaluation.recipe.train.precision):
                found.append(of_part(x, sigma, embeddings, rows))

        micro_batch = MicroBatch(size, evaluation.micro_batch.fixed)
        for rows in in_micro_batches(run, len(latents), micro_batch):
            self.observer.advance(rows.stop - rows.start)
        return found
