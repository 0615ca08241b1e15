"""Which layers of a network get adapters."""

from __future__ import annotations

import torch

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.base import FlowModel


def lora_targets(model: FlowModel, recipe: Recipe) -> list[str]:
    """The layers that the recipe adapts."""
    wanted = recipe.model.lora_targets
    return list(model.lora_targets if wanted == "default" else wanted)


def check_targets(network: torch.nn.Module, targets: list[str]) -> None:
    """Raises UserError for the first target that matches no linear layer, by the end of its name."""
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise UserError(f"model.lora_targets: {target!r} matches no layer of {type(network).__name__}")
