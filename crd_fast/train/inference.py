"""Using trained weights: evaluation of a checkpoint, and pictures for given prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.ranks import Ranks
from crd_fast.rewards import Rewards
from crd_fast.seeds import seed_table
from crd_fast.train.evaluate import Evaluated, Evaluation, tile, to_uint8
from crd_fast.train.micro_batch import resolve_micro_batch
from crd_fast.train.rollout import Sampling, generate
from crd_fast.weights import checkpoint
from crd_fast.weights.make import make_weights
from crd_fast.worlds import WORLDS


def load_source(source: str, prompts: Iterable[str] = ()):
    """The model with the policy's weights active, and the recipe that made it.

    source: the folder of a run or of a checkpoint, or `builtin` for the model that ships, untrained.
    prompts: those that will be needed and were not in the run.
    """
    if source in WORLDS:
        recipe = load_recipe(source)
        return load_model(recipe, prompts), recipe
    if not Path(source).exists():
        raise UserError(f"{source}: no such folder (expected a run, a checkpoint, {' or '.join(WORLDS)})")
    folder = checkpoint.find(Path(source))
    state = checkpoint.read_state(folder)
    recipe = build_recipe(state["recipe"], ["model.sharding=none"], str(folder))
    model = load_model(recipe, prompts)
    checkpoint.check_same_model(state, model, folder)
    checkpoint.load(folder, make_weights(model, recipe))
    return model, recipe


def evaluate_checkpoint(
    source: str,
    prompts: str | None = None,
    change: Callable[[dict], dict] = lambda values: values,
    **overrides,
) -> Evaluated:
    """Its metrics and what each picture got.

    change: the recipe's values to those that are used, before the overrides. overrides: keys of the section
    `evaluate`; None keeps it.
    """
    model, recipe = load_source(source)
    values = change(recipe.model_dump())
    overrides = {"prompts": prompts, **overrides}
    values["evaluate"] |= {key: value for key, value in overrides.items() if value is not None}
    recipe = build_recipe(values)
    evaluation = Evaluation(
        model, recipe, Rewards(recipe.rewards), resolve_micro_batch(recipe.rollout.micro_batch), Ranks()
    )
    return evaluation.run()


def sample_grid(
    source: str,
    prompts: list[str],
    out: Path,
    *,
    samples: int,
    guidance_scale: float | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> None:
    """Writes a PNG: a row of `samples` pictures for each prompt."""
    model, recipe = load_source(source, prompts)
    changes = {"guidance_scale": guidance_scale, "steps": steps}
    config = recipe.evaluate.model_copy(update={k: v for k, v in changes.items() if v is not None})
    micro_batch = resolve_micro_batch(recipe.rollout.micro_batch)
    latents = generate(
        model,
        model.encode_prompts(prompts),
        torch.arange(len(prompts)).repeat_interleave(samples),
        seed_table(seed, count=len(prompts) * samples),
        Sampling.of(recipe, config, model.encode_prompts([""]), micro_batch),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile(to_uint8(model.decode(latents)), columns=samples)).save(out)
