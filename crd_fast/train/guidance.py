"""Guidance of a model that has its own in its weights: said once, before anything is trained with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crd_fast.config import Recipe
    from crd_fast.models.base import FlowModel

FEW_STEPS = re.compile(r"schnell|turbo|lightning", re.IGNORECASE)  # in names of models without guidance


def guided_twice(model: FlowModel, recipe: Recipe) -> Iterator[str]:
    """A line where a recipe guides such a model by the empty prompt as well.

    Which is nothing that anybody uses it with: the anchor would pull to pictures of too much contrast. Some
    families say in their configs that guidance is distilled, of others only the name tells.
    """
    found = FEW_STEPS.search(Path(recipe.model.path).name)
    if not (model.distilled or found):
        return
    loss, evaluate = recipe.loss, recipe.evaluate
    scales = {
        "loss.guidance_scale": loss.guidance_scale * (loss.anchored or recipe.guided_base is not None),
        "rollout.guidance_scale": recipe.rollout.guidance_scale,
        "evaluate.guidance_scale": evaluate.guidance_scale * bool(evaluate.every),
        "evaluate.drift": (evaluate.drift or 0) * bool(evaluate.every),
    }
    guided = [f"{key} {scale:g}" for key, scale in scales.items() if scale > 1]
    if not guided:
        return
    what = "has its guidance distilled into it"
    if found and not model.distilled:
        what = f"is, by its name ({found[0]}), used without guidance"
    yield (
        f"warning: {', '.join(guided)}: this {model.name} {what}, and is guided by the empty prompt on top "
        "of that; expected 1"
    )
