"""Using a model, trained here, elsewhere or not at all: evaluation, and pictures for given prompts."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from crd_fast.config import Recipe, build_recipe, load_recipe, recipe_names, recipes_by_model
from crd_fast.errors import UserError, did_you_mean
from crd_fast.models import load_model, sizes_at_most
from crd_fast.models.base import FlowModel
from crd_fast.models.negative import encode_negatives, probe, texts
from crd_fast.prompts.lists import splits
from crd_fast.prompts.source import HELDOUT, SOURCES
from crd_fast.ranks import Ranks
from crd_fast.rewards import Rewards, check_consent
from crd_fast.rewards.scoring import with_none
from crd_fast.run.new_files import write_new
from crd_fast.schema import AUTO
from crd_fast.seeds import seed_table
from crd_fast.sizes import Resolution
from crd_fast.train.evaluate import EVALUATION_SEED, Evaluated, Evaluation, HeldOut, pictures_of, tile
from crd_fast.train.micro_batch import release_memory, resolve_micro_batch
from crd_fast.train.places import absolute, check_base, recipe_of
from crd_fast.train.prompt_lengths import check_lengths, check_prompts
from crd_fast.train.rollout import Sampling, generate
from crd_fast.train.seen_prompts import SeenPrompts
from crd_fast.weights import checkpoint
from crd_fast.weights.lora import LoraWeights
from crd_fast.weights.lora_file import lora_file
from crd_fast.weights.make import make_weights
from crd_fast.worlds import WORLDS
from crd_fast.yaml_files import is_yaml

logger = logging.getLogger("crd_fast")


@dataclass(frozen=True)
class Source:
    """What pictures are made with: weights that were trained here, or a model as it is, before any is loaded.

    folder: of the checkpoint; None for a model that was not trained here. lora: a file that it is used with.
    own: whether the recipe is its own, a run's or one that ships; a mere pipeline has the defaults.
    """

    recipe: Recipe
    folder: Path | None = None
    lora: Path | None = None
    own: bool = True

    @classmethod
    def of(cls, source: str, base: str | None = None, lora: Path | None = None) -> Source:
        """From the folder of a run, a checkpoint or a pipeline, a recipe, a model's short name or hub id.

        Of a run it is the checkpoint that `checkpoint.find` takes. base: where the model is that a run began
        with, if it has moved. lora: only for what was not trained here. Raises UserError where the source is
        none of these.
        """
        path = Path(source).expanduser()
        if source not in WORLDS and path.is_dir() and not (path / "model_index.json").exists():
            if lora is not None:
                raise UserError(f"--lora {lora}: goes with a model, but {source} has trained weights")
            return cls._trained(path, base)
        if source in WORLDS or source in recipe_names() or is_yaml(path):
            recipe = load_recipe(source, ["model.sharding=none"])
            file = lora or recipe.model.init_lora
            return cls(recipe, lora=None if file is None else Path(file))
        if source in recipes_by_model():
            return cls(load_recipe(_fitting(source)), lora=lora)
        if path.is_dir() or (not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)):
            model = str(path.absolute()) if path.is_dir() else source
            precision = "bf16" if torch.cuda.is_available() else "fp32"
            values = {"model": {"path": model}, "train": {"precision": precision}}
            recipe = build_recipe(values)
            if path.is_dir():
                (size,) = sizes_at_most(path, recipe)
                recipe = build_recipe(values | {"rollout": {"resolution": size}})
            return cls(recipe, lora=lora, own=False)
        hint = did_you_mean(source, [*recipes_by_model(), *recipe_names()])
        raise UserError(
            f"{source}: no such folder{hint} (expected a run, a checkpoint, a pipeline, a recipe, a hub id, "
            f"{', '.join(recipes_by_model())}, {' or '.join(WORLDS)})"
        )

    @classmethod
    def _trained(cls, path: Path, base: str | None) -> Source:
        files = sorted(path.glob("*.safetensors"))
        if files and not (path / "checkpoints").exists() and not checkpoint.is_checkpoint(path):
            raise UserError(
                f"{path}: weights alone; expected the model that they go with: MODEL --lora {files[0]}"
            )
        folder = checkpoint.find(path)
        recipe = recipe_of(checkpoint.read_state(folder), folder, base)
        check_base(recipe, folder)
        return cls(recipe, folder)

    def load(self, prompts: Iterable[str] = ()) -> FlowModel:
        """The model with the trained weights active, those that `evaluate.weights` names.

        prompts: those that will be needed.
        """
        if self.lora is not None:
            lora_file(self.lora)  # before the model is loaded
        model = load_model(self.recipe, prompts)
        if self.folder is not None:
            checkpoint.check_same_model(checkpoint.read_state(self.folder), model, self.folder)
            weights = make_weights(model, self.recipe)
            checkpoint.load(self.folder, weights)
            if self.recipe.evaluate.weights != "policy":
                weights.become(self.recipe.evaluate.weights)
        if self.lora is not None:
            LoraWeights.of_file(model.transformer, self.lora, model.lora_loader, model.device)
        return model

    def like(self, other: Source) -> Source:
        """Asked for the same as the other one, so that the two can be compared.

        What is the base of the other one is also loaded as that was.
        """
        values, wanted = self.recipe.model_dump(), other.recipe.model_dump()
        untrained = self.folder is None and (other.folder is not None or not self.own)
        if untrained and self.recipe.model.path == other.recipe.model.path:
            values["model"] = wanted["model"] | {"init_lora": None}
        values |= {key: wanted[key] for key in ("rewards", "eval_rewards", "evaluate")}
        values["evaluate"] = values["evaluate"] | {"weights": self.recipe.evaluate.weights}
        values["rollout"]["prompts"] = wanted["rollout"]["prompts"]  # of which some may be held out
        values["rollout"]["resolution"] = wanted["rollout"]["resolution"]
        values["train"]["precision"] = wanted["train"]["precision"]
        return replace(self, recipe=build_recipe(values))


def check_moved(base: str | None, sources: Sequence[Source]) -> None:
    """Raises UserError where a base is named and none of the sources is a run's, which alone has one."""
    if base is not None and all(source.folder is None for source in sources):
        raise UserError(
            f"--model {base}: expected with a run or its checkpoint, got a model without training"
        )


def _fitting(model: str) -> str:
    """The recipe of a model for the GPU here: the largest that fits, the smallest where none does."""
    sizes = recipes_by_model()[model]
    if not torch.cuda.is_available():
        return list(sizes.values())[-1]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    # a card has a little less than it is sold with
    return next(
        (name for size, name in reversed(sizes.items()) if size <= 1.05 * memory), next(iter(sizes.values()))
    )


def asked(
    found: Source,
    change: Callable[[dict], dict] | None = None,
    allow_code: bool = False,
    rewards: dict[str, Any] | None = None,
    size: Resolution | None = None,
    **overrides: Any,
) -> Source:
    """The source with what is asked of it. UserError where that lacks.

    change: the recipe's values to those that are used, before the rest. allow_code: whether rewards that do
    not ship may run, where a checkpoint names them. overrides: keys of the section `evaluate`; None keeps it.
    """
    values = found.recipe.model_dump()
    values = change(values) if change else values
    if rewards is not None:
        values |= {"rewards": rewards, "eval_rewards": {}}
    if size is not None:
        values = of_size(values, size)
    if (overrides.get("prompts") or AUTO).removesuffix(HELDOUT) not in (AUTO, *SOURCES):
        values["evaluate"]["max_prompts"] = None  # a file's are all asked for: the limit is for the recipe's
    values["evaluate"] |= {key: value for key, value in overrides.items() if value is not None}
    recipe = build_recipe(values)
    if not found.own and change is None:
        lacking = {"--reward": rewards, "--prompts": overrides.get("prompts")}
        if missing := [option for option, given in lacking.items() if given is None]:
            raise UserError(f"{' and '.join(missing)}: expected for {recipe.model.path}, which has no recipe")
    if not allow_code and rewards is None and found.folder is not None:
        check_consent(recipe, str(found.folder))
    # a reward may change the working directory
    folder, file = (path and path.absolute() for path in (found.folder, found.lora))
    return replace(found, recipe=absolute(recipe), folder=folder, lora=file)


def of_size(values: dict[str, Any], size: Resolution) -> dict[str, Any]:
    """A recipe's values with one size for all pictures: what it says of training may not fit the model."""
    return values | {section: values[section] | {"resolution": size} for section in ("rollout", "evaluate")}


def evaluated(sources: Sequence[Source], seed: int | None = None) -> Iterator[Evaluated]:
    """Each one's evaluation, one model in memory at a time. All are asked for the same, but for guidance.

    seed: of the pictures; None: as in the evaluations of runs.
    """
    first = sources[0].recipe
    rewards = Rewards(first.rewards)
    held_out = HeldOut(first, rewards)
    rewards.try_out(held_out.entries, first.evaluation_size, first.evaluate.samples_per_prompt)
    for source in sources:
        _warn_of_moved_prompts(source)
        asked_for = held_out.entries
        model = source.load([*texts(asked_for, source.recipe.guides_evaluation), *probe(asked_for)])
        check_prompts(model, source.recipe, held_out)
        micro_batch = resolve_micro_batch(source.recipe.rollout.micro_batch)
        evaluation = Evaluation(
            model,
            source.recipe,
            rewards,
            micro_batch,
            Ranks(),
            held_out,
            seed=EVALUATION_SEED if seed is None else seed,
        )
        yield evaluation.run()
        del model, evaluation
        release_memory()


def _warn_of_moved_prompts(source: Source) -> None:
    """Where the files that prompts are held out of have been edited since the source was trained."""
    if source.folder is None or not splits(source.recipe):
        return
    before = checkpoint.read_state(source.folder).get("prompts")  # earlier versions kept none
    if before and (moved := SeenPrompts.of(source.recipe).moved(SeenPrompts(**before))):
        logger.warning("warning: %s: %s", source.folder, moved)


def sample_grid(
    source: str,
    prompts: Sequence[str | dict],
    out: Path,
    *,
    samples: int,
    guidance_scale: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    base: str | None = None,
    lora: Path | None = None,
    size: Resolution | None = None,
    rewards: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Writes a new PNG: a row of `samples` pictures for each prompt, which may come with its metadata.

    base, lora: as of `Source.of`. Returns prompt, seed and, with rewards, `scores` of each picture, row by
    row.
    """
    found = Source.of(source, base, lora)
    check_moved(base, [found])
    values = found.recipe.model_dump()
    if size is not None:
        values = of_size(values, size)
    changes = {"guidance_scale": guidance_scale, "steps": steps}
    values["evaluate"] |= {key: value for key, value in changes.items() if value is not None}
    found = replace(found, recipe=build_recipe(values))
    entries = [{"prompt": prompt} if isinstance(prompt, str) else prompt for prompt in prompts]
    recipe, guided = found.recipe, found.recipe.evaluate.guidance_scale > 1
    judges = Rewards(rewards or {})
    judges.check(entries)
    model = found.load([*texts(entries, guided), *probe(entries)])
    check_lengths(model.prompt_reader, [(entries, judges)])
    away = encode_negatives(model, entries if guided else [{}])
    sampling = Sampling.of(recipe, recipe.evaluate, away, resolve_micro_batch(recipe.rollout.micro_batch))
    seeds = seed_table(seed, count=len(entries) * samples)
    latents = generate(
        model,
        model.encode_prompts([entry["prompt"] for entry in entries]),
        torch.arange(len(entries)).repeat_interleave(samples),
        seeds,
        sampling,
    )
    images = pictures_of(model, latents)
    png = BytesIO()
    Image.fromarray(tile(images, columns=samples)).save(png, "PNG")
    write_new(out, "--out", png.getvalue())
    of_each = [entry for entry in entries for _ in range(samples)]
    scores = judges.score(images, of_each) if rewards else {}
    return [
        {"prompt": entry["prompt"], "seed": int(seeds[i])}
        | ({"scores": {name: with_none(of[i : i + 1])[0] for name, of in scores.items()}} if rewards else {})
        for i, entry in enumerate(of_each)
    ]
