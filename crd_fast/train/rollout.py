"""Generating latents: Euler steps of the flow's ODE from seeded noise, in micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from crd_fast.seeds import seeded_noise
from crd_fast.train.forwards import autocast, chosen_prompts, guided_velocity
from crd_fast.train.micro_batch import MicroBatch


@torch.no_grad()
def generate(
    model,
    embeddings: dict[str, torch.Tensor],  # P prompts
    prompt_index: torch.Tensor,  # (N,) which prompt each sample has
    seeds: torch.Tensor,  # (N,) int64
    *,
    resolution: int,
    steps: int,
    guidance_scale: float,
    empty: dict[str, torch.Tensor],
    micro_batch: MicroBatch | int,
    precision: str,
    advance: Callable[[int], None] = lambda count: None,
    finished: Callable[[torch.Tensor], None] = lambda latents: None,
) -> torch.Tensor:
    """Samples N latents, float32 (N, *latent_shape), with the weights that are active.

    After each micro-batch of n samples, `advance(n)` is called, and `finished` with all latents so far.
    """
    device = model.device
    shape = model.latent_shape(resolution)
    sigmas = model.sigmas(steps, resolution).to(device)
    latents = torch.empty(len(seeds), *shape, device=device)
    if isinstance(micro_batch, int):
        micro_batch = MicroBatch(micro_batch)

    def integrate(chunk: slice) -> torch.Tensor:
        x = seeded_noise(seeds[chunk], shape, device)
        chosen = chosen_prompts(embeddings, prompt_index[chunk], device)
        for sigma, next_sigma in itertools.pairwise(sigmas):
            with autocast(x.device.type, precision):
                velocity = guided_velocity(model, x, sigma.expand(len(x)), chosen, empty, guidance_scale)
            x = x + (next_sigma - sigma) * velocity.float()
        return x

    done = 0
    while done < len(seeds):
        chunk = slice(done, min(done + micro_batch.size, len(seeds)))
        try:
            latents[chunk] = integrate(chunk)
        except torch.OutOfMemoryError as error:
            micro_batch.halve(error)
            continue
        advance(chunk.stop - done)
        done = chunk.stop
        finished(latents[:done])
    return latents
