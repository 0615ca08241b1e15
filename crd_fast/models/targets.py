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


def check_targets(network: torch.nn.Module, targets: list[str], within_blocks: bool = False) -> None:
    """Raises UserError for the first target that matches no linear layer, by the end of its name, or another
    module as well. within_blocks: or a layer outside the blocks that repeat, where one adapter is for all."""
    blocks = {id(module) for block in repeated_blocks(network) for module in block.modules()}
    modules = dict(network.named_modules())
    for target in targets:
        found = [name for name in modules if name == target or name.endswith("." + target)]
        others = [name for name in found if not isinstance(modules[name], torch.nn.Linear)]
        if not found or others == found:
            raise UserError(
                f"model.lora_targets: {target!r} matches no linear layer of {type(network).__name__}"
            )
        if others:
            kind = type(modules[others[0]]).__name__
            raise UserError(
                f"model.lora_targets: expected linear layers, got {target!r}, which is also the {kind} "
                f"{others[0]}: write more of the names"
            )
        if outside := [name for name in found if within_blocks and id(modules[name]) not in blocks]:
            raise UserError(
                "model.lora_targets: expected layers inside the blocks with model.streaming, got "
                f"{outside[0]}"
            )
