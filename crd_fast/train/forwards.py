"""Forwards of the model: their precision, the prompts of their rows, guidance by the empty prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch


def autocast(device_type: str, precision: str):
    """The context of one forward, without the cache of weights that were cast.

    A forward uses each weight once, and the cache would hold bfloat16 copies of all that are trained to its
    end.
    """
    if precision == "bf16":
        return torch.autocast(device_type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def chosen_prompts(
    embeddings: dict[str, torch.Tensor], index: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """Rows of each tensor, on `device`: embeddings of large models stay on the host but for a micro-batch."""
    return {key: value[index.to(value.device)].to(device) for key, value in embeddings.items()}


def unconditional(
    empty: dict[str, torch.Tensor], index: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the rows with these prompts are guided away from: rows of their own, or the one that all have.

    empty: embeddings of the empty prompt or of one negative prompt, first axis 1, or of P negative prompts.
    """
    if all(len(value) == 1 for value in empty.values()):
        return empty
    return chosen_prompts(empty, index, device)


def unwatched(rows: int):
    """The context of a forward of `rows` rows that nobody watches."""
    return contextlib.nullcontext()


def doubled_velocity(
    model, x, sigma, embeddings, empty, watched: Callable = unwatched
) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditional and the unconditional velocity: views of one doubled batch.

    empty: embeddings of what is guided away from, first axis 1 or that of x. watched(rows): a context around
    the forward.
    """
    away = {key: empty[key].to(value.device).expand_as(value) for key, value in embeddings.items()}
    both = {key: torch.cat([value, away[key]]) for key, value in embeddings.items()}
    with watched(2 * len(x)):
        return model.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)


def guided_velocity(
    model, x, sigma, embeddings, empty, guidance_scale: float, watched: Callable = unwatched
) -> torch.Tensor:
    """The model's guidance, uncond + w (cond - uncond) in most, or cond alone where w <= 1.

    Both branches in one doubled batch.
    """
    if guidance_scale <= 1:
        with watched(len(x)):
            return model.velocity(x, sigma, embeddings)
    conditional, unconditional = doubled_velocity(model, x, sigma, embeddings, empty, watched)
    return model.guide(conditional, unconditional, guidance_scale)
