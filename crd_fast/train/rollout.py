"""Generating latents: Euler steps of the flow's ODE from seeded noise, in micro-batches."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable

import numpy as np
import torch

from crd_fast.errors import UserError

logger = logging.getLogger("crd_fast")


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


def autocast(device_type: str, precision: str):
    """The context of one forward, without the cache of weights that were cast.

    A forward uses each weight once, and the cache would hold bfloat16 copies of all that are trained to its
    end.
    """
    if precision == "bf16":
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def guided_velocity(model, x, sigma, embeddings, empty, guidance_scale: float) -> torch.Tensor:
    """The model's guidance, uncond + w (cond - uncond) in most, or cond alone where w <= 1.

    Both branches in one doubled batch.
    """
    if guidance_scale <= 1:
        return model.velocity(x, sigma, embeddings)
    conditional, unconditional = doubled_velocity(model, x, sigma, embeddings, empty)
    return model.guide(conditional, unconditional, guidance_scale)


def doubled_velocity(model, x, sigma, embeddings, empty) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditional and the unconditional velocity: views of one doubled batch.

    empty: embeddings of the empty prompt, first axis 1.
    """
    unconditional = {key: empty[key].to(value.device).expand_as(value) for key, value in embeddings.items()}
    both = {key: torch.cat([value, unconditional[key]]) for key, value in embeddings.items()}
    return model.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)


def chosen_prompts(
    embeddings: dict[str, torch.Tensor], index: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """Rows of each tensor, on `device`: embeddings of large models stay on the host but for a micro-batch."""
    return {key: value[index.to(value.device)].to(device) for key, value in embeddings.items()}


class MicroBatch:
    """How many samples go through the network at once, halved where they do not fit.

    No result depends on it but by rounding: noise comes from a sample's own seed, and groups are exact.
    fixed: it cannot be halved, because other processes wait for this one within the forward that failed.
    """

    def __init__(self, size: int, fixed: bool = False):
        self.size, self.fixed = size, fixed

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Raises UserError where nothing is left to halve."""
        if self.size == 1 or self.fixed:
            hint = ""
            if self.fixed:
                hint = ", model.sharding fsdp needs the same on all processes: set smaller micro-batches"
            reason = str(error).partition(".")[0]
            raise UserError(f"out of memory at micro-batch {self.size}{hint}: {reason}") from error
        logger.warning(
            "warning: out of memory at micro-batch %d, going on with %d", self.size, self.size // 2
        )
        self.size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
