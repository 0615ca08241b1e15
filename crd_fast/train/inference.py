"""Using trained weights: evaluation of a checkpoint, and pictures for given prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from crd_fast.config import Recipe, build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.models.base import FlowModel
from crd_fast.ranks import Ranks
from crd_fast.rewards import Rewards, check_consent
from crd_fast.run.new_files import write_new
from crd_fast.seeds import seed_table
from crd_fast.train.evaluate import Evaluated, Evaluation, HeldOut, tile, to_uint8
from crd_fast.train.micro_batch import decoded, resolve_micro_batch
from crd_fast.train.places import check_base
from crd_fast.train.prompt_lengths import check_lengths
from crd_fast.train.rollout import Sampling, generate
from crd_fast.weights import checkpoint
from crd_fast.weights.make import make_weights
from crd_fast.worlds import WORLDS


@dataclass(frozen=True)
class Source:
    """Trained weights on disk, or a built-in model: what they are of, before any are loaded.

    folder: of the checkpoint; None for a built-in model, untrained.
    """

    recipe: Recipe
    folder: Path | None

    @classmethod
    def of(cls, source: str, base: str | None = None) -> Source:
        """From the folder of a run or of a checkpoint, or the name of a model that ships.

        base: where the model is that the run began with, if it has moved.
        """
        if source in WORLDS:
            return cls(load_recipe(source), None)
        if not Path(source).exists():
            raise UserError(f"{source}: no such folder (expected a run, a checkpoint, {' or '.join(WORLDS)})")
        folder = checkpoint.find(Path(source))
        values = checkpoint.read_state(folder)["recipe"]
        if base is not None:
            values = values | {"model": values["model"] | {"path": base}}
        recipe = build_recipe(values, ["model.sharding=none"], str(folder))
        check_base(recipe, folder)
        return cls(recipe, folder)

    def load(self, prompts: Iterable[str] = ()) -> FlowModel:
        """The model with the policy's weights active. prompts: those that will be needed."""
        model = load_model(self.recipe, prompts)
        if self.folder is not None:
            checkpoint.check_same_model(checkpoint.read_state(self.folder), model, self.folder)
            checkpoint.load(self.folder, make_weights(model, self.recipe))
        return model


def evaluate_checkpoint(
    source: str,
    prompts: str | None = None,
    change: Callable[[dict], dict] = lambda values: values,
    base: str | None = None,
    allow_code: bool = False,
    **overrides,
) -> Evaluated:
    """Its metrics and what each picture got.

    change: the recipe's values to those that are used, before the overrides. base: as of `Source.of`.
    allow_code: whether rewards that do not ship may run, where a checkpoint names them. overrides: keys of
    the section `evaluate`; None keeps it.
    """
    found = Source.of(source, base)
    values = change(found.recipe.model_dump())
    overrides = {"prompts": prompts, **overrides}
    values["evaluate"] |= {key: value for key, value in overrides.items() if value is not None}
    recipe = build_recipe(values)
    if not allow_code:
        check_consent(recipe, str(found.folder))
    rewards = Rewards(recipe.rewards)
    held_out = HeldOut(recipe, rewards)
    rewards.try_out(held_out.entries[0], recipe.rollout.resolution, recipe.evaluate.samples_per_prompt)
    model = found.load(entry["prompt"] for entry in held_out.entries)
    check_lengths(model.prompt_reader, held_out.asked)
    micro_batch = resolve_micro_batch(recipe.rollout.micro_batch)
    return Evaluation(model, recipe, rewards, micro_batch, Ranks(), held_out).run()


def sample_grid(
    source: str,
    prompts: list[str],
    out: Path,
    *,
    samples: int,
    guidance_scale: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    base: str | None = None,
) -> None:
    """Writes a new PNG: a row of `samples` pictures for each prompt. base: as of `Source.of`."""
    found = Source.of(source, base)
    model, recipe = found.load(prompts), found.recipe
    check_lengths(model.prompt_reader, [([{"prompt": prompt} for prompt in prompts], Rewards({}))])
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
    grid = Image.fromarray(tile(to_uint8(decoded(model, latents)), columns=samples))
    png = BytesIO()
    grid.save(png, "PNG")
    write_new(out, "--out", png.getvalue())
