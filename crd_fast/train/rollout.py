"""Generating latents: the flow's ODE from seeded noise, in micro-batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from crd_fast.config import Recipe
from crd_fast.run.observer import NOBODY, Observer
from crd_fast.schema import EvaluateConfig, RolloutConfig
from crd_fast.seeds import seeded_noise
from crd_fast.sizes import Resolution
from crd_fast.train.forwards import autocast, chosen_prompts, guided_velocity, unconditional
from crd_fast.train.micro_batch import MicroBatch, in_micro_batches


@dataclass(frozen=True)
class Sampling:
    """How latents are generated.

    empty: embeddings of the empty prompt, first axis 1, or of each prompt's negative one. micro_batch: halved
    where memory runs out. solver: euler, or ab2, Adams-Bashforth of second order: Euler's first step, and as
    many forwards.
    """

    resolution: Resolution
    steps: int
    guidance_scale: float
    precision: str
    empty: dict[str, torch.Tensor]
    micro_batch: MicroBatch
    solver: str = "euler"

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        section: RolloutConfig | EvaluateConfig,
        empty: dict[str, torch.Tensor],
        micro_batch: MicroBatch,
        iteration: int = 0,
    ) -> Sampling:
        """As the recipe generates in its section `rollout`, in an iteration, or `evaluate`."""
        evaluates = isinstance(section, EvaluateConfig)
        return cls(
            recipe.evaluation_size if evaluates else recipe.size_of(iteration),
            section.steps,
            section.guidance_scale,
            recipe.train.precision,
            empty,
            micro_batch,
            getattr(section, "solver", "euler"),
        )


@torch.no_grad()
def generate(
    model,
    embeddings: dict[str, torch.Tensor],  # P prompts
    prompt_index: torch.Tensor,  # (N,) which prompt each sample has
    seeds: torch.Tensor,  # (N,) int64
    sampling: Sampling,
    finished: Callable[[torch.Tensor], None] = lambda latents: None,
    observer: Observer = NOBODY,
    branch: str = "policy",
    first_latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Samples N latents, float32 (N, *latent_shape), with the weights that are active.

    After each micro-batch `finished` is called with all latents so far. branch: what the observer is told
    that the active weights are. first_latents: the first of them, where they were made before.
    """
    device, watched = model.device, functools.partial(observer.branch, branch)
    shape = model.latent_shape(sampling.resolution)
    sigmas = model.sigmas(sampling.steps, sampling.resolution).to(device)
    latents = torch.empty(len(seeds), *shape, device=device)

    def integrate(rows: slice) -> None:
        x = seeded_noise(seeds[rows], shape, device)
        chosen = chosen_prompts(embeddings, prompt_index[rows], device)
        away = unconditional(sampling.empty, prompt_index[rows], device)
        before: tuple[torch.Tensor, torch.Tensor] | None = None  # the last step's size and velocity
        for sigma, next_sigma in itertools.pairwise(sigmas):
            with autocast(x.device.type, sampling.precision):
                velocity = guided_velocity(
                    model, x, sigma.expand(len(x)), chosen, away, sampling.guidance_scale, watched
                )
            step, velocity = next_sigma - sigma, velocity.float()
            x = x + step * velocity
            if sampling.solver == "ab2":
                if before is not None:
                    x = x + step * step / (2 * before[0]) * (velocity - before[1])
                before = step, velocity
        latents[rows] = x

    done = 0
    if first_latents is not None:
        done = len(first_latents)
        latents[:done] = first_latents
        observer.advance(done)
        finished(latents[:done])
    for rows in in_micro_batches(integrate, len(seeds), sampling.micro_batch, done):
        finished(latents[: rows.stop])
        observer.advance(rows.stop - rows.start)  # here a run may be stopped
    return latents
