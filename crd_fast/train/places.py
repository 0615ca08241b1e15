"""Where a recipe's model and files are, so that its run can be used from anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from crd_fast.config import Recipe, build_recipe
from crd_fast.errors import UserError
from crd_fast.prompts.source import HELDOUT, SOURCES
from crd_fast.schema import AUTO
from crd_fast.worlds import WORLDS

RANDOM = "random"  # in evaluate.features: of a network with random weights, which is in no folder


def absolute(recipe: Recipe) -> Recipe:
    """The same with absolute paths of what is here: folders of models, LoRA, prompts, rewards' files."""
    values = recipe.model_dump()
    model = values["model"]
    if model["path"] not in WORLDS and os.path.isdir(model["path"]):  # else a hub id
        model["path"] = os.path.abspath(model["path"])
    if model["init_lora"] is not None and os.path.exists(model["init_lora"]):
        model["init_lora"] = os.path.abspath(model["init_lora"])
    if model["prompt_cache"] != "default":
        model["prompt_cache"] = os.path.abspath(model["prompt_cache"])
    prompts = values["rollout"]["prompts"]
    if isinstance(prompts, dict):
        values["rollout"]["prompts"] = {_of_list(name): weight for name, weight in prompts.items()}
    else:
        values["rollout"]["prompts"] = _of_list(prompts)
    if recipe.evaluate.prompts != AUTO:
        values["evaluate"]["prompts"] = _of_list(recipe.evaluate.prompts)
    features = recipe.evaluate.features
    if features not in (None, RANDOM) and os.path.isdir(features):  # else a hub id
        values["evaluate"]["features"] = os.path.abspath(features)
    for section in ("rewards", "eval_rewards"):
        for settings in values[section].values():
            if isinstance(settings, dict):
                settings |= {key: _of_setting(value) for key, value in settings.items()}
    return build_recipe(values)


def _of_list(name: str) -> str:
    return name if name.removesuffix(HELDOUT) in SOURCES else os.path.abspath(name)


def _of_setting(value: Any) -> Any:
    """A path only where it looks like one and is there: most settings are words."""
    if not isinstance(value, str) or not (os.sep in value or value.startswith("~")):
        return value
    path = os.path.expanduser(value)
    return os.path.abspath(path) if os.path.exists(path) else value


def recipe_of(state: dict[str, Any], folder: Path, base: str | None) -> Recipe:
    """A checkpoint's recipe, for one process. base: where the run's model is, if it has moved."""
    values = state["recipe"]
    if base is not None:
        values = values | {"model": values["model"] | {"path": base}}
    return build_recipe(values, ["model.sharding=none"], str(folder))


def check_base(recipe: Recipe, source: Path) -> None:
    """Raises UserError where the model that a run or checkpoint began with is not where it was."""
    path = recipe.model.path
    if os.path.isabs(path) and not os.path.isdir(path):
        raise UserError(
            f"{source}: the model it began with is not in {path} any more; say where: --model FOLDER"
        )
