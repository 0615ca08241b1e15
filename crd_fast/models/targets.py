"""Which layers of a network get adapters."""

from __future__ import annotations

import torch

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.base import FlowModel
from crd_fast.models.streaming import repeated_blocks

ALL_LINEAR = "all-linear"  # as peft calls it


def lora_targets(model: FlowModel, recipe: Recipe) -> list[str]:
    """The layers that the recipe adapts."""
    wanted = recipe.model.lora_targets
    if wanted == ALL_LINEAR:
        return all_linear(model.transformer)
    return list(model.lora_targets if wanted == "default" else wanted)


def all_linear(network: torch.nn.Module) -> list[str]:
    """Every linear layer of the blocks that repeat, by its whole name: none before or after them."""
    blocks = {id(module) for block in repeated_blocks(network) for module in block.modules()}
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in blocks
    ]


def check_targets(network: torch.nn.Module, targets: list[str]) -> None:
    """Raises UserError for the first target that matches no linear layer, by the end of its name."""
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise UserError(f"model.lora_targets: {target!r} matches no layer of {type(network).__name__}")
