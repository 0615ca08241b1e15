"""The recipe: what a run does, as YAML, checked by a schema.

Unknown keys are errors that name the nearest known key. See `crd_fast/recipes/` for examples.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from crd_fast.errors import UserError, did_you_mean
from crd_fast.hints import by_meaning
from crd_fast.reward_weights import trained_weights, weight_of
from crd_fast.schema import (
    AdvantageConfig,
    CheckpointConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    SnapshotsConfig,
    TrainConfig,
)
from crd_fast.sections import Section
from crd_fast.seeds import SIZES, generator
from crd_fast.sizes import Resolution
from crd_fast.worlds import WORLDS
from crd_fast.yaml_files import dump_yaml, is_yaml, parse_yaml, read_yaml

RECIPES = Path(__file__).parent / "recipes"
MOST_PICTURES = 10**6  # of an iteration; more than that no machine holds
WHOLE = ("rewards", "eval_rewards")  # sections that a recipe which extends another replaces
# they read pictures of the built-in world alone
WORLD_REWARDS = ("geneval", "geneval_correct", "geneval_strict", "texture_fooled")


class Recipe(Section):
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, Any] = Field({"geneval": 1.0})
    """What is maximised: `{name: weight}`, or `{name: {weight: 1.0, setting: value}}`."""
    eval_rewards: dict[str, Any] = Field({})
    """Judges, in the same form: scored at every evaluation and never trained on, better with higher scores;
    weights do nothing. Name one or two that would notice hacking."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("rewards", "eval_rewards")
    @classmethod
    def _weights_or_settings(cls, rewards: dict[str, Any]) -> dict[str, Any]:
        for name, value in rewards.items():
            weight = weight_of(value)
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
                raise ValueError(f"{name}: expected a weight or settings, got {_short(weight)}")
            if not _is_finite(weight):
                raise ValueError(f"{name}: expected a finite weight, got {_short(weight)}")
            for setting, number in value.items() if isinstance(value, dict) else ():
                if isinstance(number, (int, float)) and not _is_finite(number):
                    raise ValueError(f"{name}: {setting}: expected a finite number, got {_short(number)}")
        return rewards

    @field_validator("eval_rewards")
    @classmethod
    def _more_is_better(cls, rewards: dict[str, Any]) -> dict[str, Any]:
        for name, value in rewards.items():
            if weight_of(value) < 0:
                raise ValueError(
                    f"{name}: expected no weight below 0, got {_short(weight_of(value))}: of a judge more is "
                    "better; let it score the negative"
                )
        return rewards

    @field_validator("rewards")
    @classmethod
    def _some_reward(cls, rewards: dict[str, Any]) -> dict[str, Any]:
        if not rewards:
            raise ValueError("expected at least one reward")
        return rewards

    @model_validator(mode="after")
    def _consistent(self):
        for section in ("rollout", "train"):
            micro_batch = getattr(self, section).micro_batch
            if micro_batch != "auto" and micro_batch < 1:
                raise ValueError(f"{section}.micro_batch: expected auto or at least 1, got {micro_batch}")
        if self.model.streaming and self.train.checkpointing != 1:
            got = str(self.train.checkpointing).lower()
            raise ValueError(f"train.checkpointing: expected true with model.streaming, got {got}")
        if self.model.streaming and self.train.compile and self.model.quantization == "nf4":
            # the compiled code of some networks keeps the copies of 4-bit weights alive: all blocks at once
            raise ValueError("train.compile: expected false with nf4 weights that are streamed, got true")
        samples, prompts = self.rollout.samples_per_prompt, self.rollout.prompts_per_iteration
        if samples * prompts > MOST_PICTURES:
            raise ValueError(
                f"rollout.samples_per_prompt: expected at most {MOST_PICTURES} pictures an iteration, got "
                f"{samples} of each of rollout.prompts_per_iteration ({prompts})"
            )
        if self.train.backward_fraction * self.rollout.samples_per_prompt < 1:
            raise ValueError(
                f"train.backward_fraction: expected at least one of rollout.samples_per_prompt "
                f"({self.rollout.samples_per_prompt}), got {self.train.backward_fraction:g} of them"
            )
        if self.train.backward_fraction < 1 and self.train.kept_graphs != "none":
            raise ValueError(
                f"train.kept_graphs: expected none with train.backward_fraction "
                f"{self.train.backward_fraction:g}, got {self.train.kept_graphs}"
            )
        if self.train.backward_fraction < 1 and self.loss.norm_penalty:
            raise ValueError(
                f"train.backward_fraction: expected 1.0 with loss.norm_penalty, got "
                f"{self.train.backward_fraction:g}"
            )
        if self.train.backward_fraction < 1 or self.train.skip_equal_groups:
            why = None
            if self.model.sharding == "fsdp":
                why = "model.sharding fsdp (all processes take part in each forward)"
            elif self.loss.centering == "batch":
                why = "loss.centering batch (what is centered together is no group)"
            if why:
                raise ValueError(
                    f"train.backward_fraction, train.skip_equal_groups: expected 1.0 and false with {why}"
                )
        if self.evaluate.weights == "ema" and self.snapshots.ema is None:
            raise ValueError("evaluate.weights: ema needs a decay in snapshots.ema, like 0.99; got null")
        if self.evaluate.features is not None and (self.evaluate.drift or 1) <= 1:
            raise ValueError(
                "evaluate.features: expected null without a guidance scale above 1 in evaluate.drift, got "
                f"{self.evaluate.features}"
            )
        count = self.train.timesteps
        if count != "all" and not 1 <= count <= len(self.training_steps()):
            raise ValueError(
                f"train.timesteps: expected all or 1 to {len(self.training_steps())} (the rollout's steps in "
                f"the training range), got {count}"
            )
        if self.train.timestep_sampling == "by-signal" and count in ("all", len(self.training_steps())):
            raise ValueError(
                "train.timestep_sampling: expected uniform or high-noise where train.timesteps "
                f"({count}) leaves none out, got by-signal"
            )
        if self.train.steps_per_iteration > self.rollout.prompts_per_iteration:
            raise ValueError(
                f"train.steps_per_iteration: expected at most rollout.prompts_per_iteration "
                f"({self.rollout.prompts_per_iteration}), got {self.train.steps_per_iteration}"
            )
        return self

    def check_own(self, trains: bool, evaluates: bool) -> None:
        """Raises UserError where the defaults, of a world that ships, meet another model, where no reward has
        a weight to be trained on, and where `anchor_uncertain` has none of weight 0 to go by."""
        weighted = trained_weights(self.rewards)
        if trains and not weighted:
            raise UserError(
                "rewards: expected one of a weight other than 0, got none: nothing would be trained"
            )
        if trains and self.loss.anchor_uncertain < 1 and len(weighted) == len(self.rewards):
            raise UserError(
                "loss.anchor_uncertain: expected 1.0 without a reward of weight 0, got "
                f"{self.loss.anchor_uncertain:g}"
            )
        prompts, rewards = {}, {}
        if trains:
            prompts["rollout.prompts"], rewards["rewards"] = list(self.rollout.prompt_lists), self.rewards
        if evaluates:
            prompts["evaluate.prompts"] = [self.evaluate.prompts]
            rewards |= {"rewards": self.rewards, "eval_rewards": self.eval_rewards}
        foreign = [key for key, names in rewards.items() if any(name in WORLD_REWARDS for name in names)]
        foreign += [
            key
            for key, names in prompts.items()
            if any(name.removesuffix("-heldout") in WORLDS for name in names)
        ]
        if foreign and self.model.path not in WORLDS:
            off = " (or evaluate.every: 0)" if trains and "evaluate.prompts" in foreign else ""
            raise UserError(
                f"{', '.join(foreign)}: expected some of its own for {self.model.path}, got those of the "
                f"small model that ships; set {' and '.join(foreign)}{off}"
            )

    @property
    def guided_base(self) -> float | None:
        """The guidance scale that the base is evaluated with once more, at the start; None: it is not."""
        config, scale = self.evaluate, self.loss.guidance_scale
        if not (config.every and config.guided_base) or scale <= 1 or scale == config.guidance_scale:
            return None
        return scale

    @property
    def evaluation_size(self) -> Resolution:
        """The size of the evaluation's pictures."""
        return self.evaluate.resolution or self.rollout.sizes[0]

    def size_of(self, iteration: int) -> Resolution:
        """The size of an iteration's pictures: several sizes take turns, in a new order for each round."""
        sizes = self.rollout.sizes
        turn, place = divmod(iteration, len(sizes))
        return sizes[int(generator(self.train.seed, turn, SIZES).permutation(len(sizes))[place])]

    @property
    def guides_training(self) -> bool:
        """Whether the rollout or the anchor's reference is guided."""
        anchored = self.loss.anchored and self.loss.guidance_scale > 1
        return self.rollout.guidance_scale > 1 or anchored

    @property
    def guides_evaluation(self) -> bool:
        """Whether an evaluation's pictures, those of the base at the start, or what drift is measured to, are
        guided."""
        scales = self.evaluate.guidance_scale, self.evaluate.drift
        return any(scale is not None and scale > 1 for scale in scales) or self.guided_base is not None

    def training_steps(self) -> list[int]:
        """Indices of the rollout's steps that are trained: those in the first `timestep_range` of the
        denoising, or of these the noisier half.
        """
        last = round(self.train.timestep_range * self.rollout.steps, 9)  # 0.28 * 25 is 7.000000000000001
        steps = [i for i in range(self.rollout.steps) if i < last]
        return steps[: (len(steps) + 1) // 2] if self.train.timestep_sampling == "high-noise" else steps

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(), default_flow_style=None, width=110)


def _is_finite(number: float | numbers.Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float holds
        return False


def _short(value: Any) -> str:
    """A value in at most 100 letters."""
    try:
        text = repr(value)
    except ValueError:  # of a number with thousands of digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 100 else text[:100] + "..."


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipes_by_model() -> dict[str, dict[int, str]]:
    """The recipes that ship for cards: by the model's short name, then by GB of memory, least first."""
    found: dict[str, dict[int, str]] = {}
    for name in recipe_names():
        if match := re.fullmatch(r"(.+)-(\d+)gb", name):
            found.setdefault(match.group(1), {})[int(match.group(2))] = name
    return {model: dict(sorted(sizes.items())) for model, sizes in found.items()}


def what_it_is(name: str) -> str:
    """The first sentence of the comment at the head of a recipe that ships."""
    lines = []
    for line in (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from a file, or from the name of one that ships, with `section.key=value` overrides.

    A file can say `extends: NAME` or the path of another, from its own folder on; then it holds what differs.

    Raises UserError, one line, for a missing file, bad YAML, an unknown key or a bad value.
    """
    return build_recipe(_read(source), overrides, str(source))


def build_recipe(values: dict, overrides: list[str] | tuple[str, ...] = (), source: str = "recipe") -> Recipe:
    """Checks plain values (and overrides on top) against the schema; UserError names the first mistake."""
    values = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_mistake(error)}") from None


def _read(source: str | Path, above: tuple[Path, ...] = ()) -> dict:
    """The values of a recipe on top of those that it extends. above: the files that lead here."""
    path = _file_of(source)
    values = read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected a recipe's file or name, got {base!r}")
    chain = (*above, path.resolve())
    extended = from_folder(path.parent, base)
    if _file_of(extended).resolve() in chain:
        raise UserError(f"{path}: extends: {base} leads back to this file")
    return merged(_read(extended, chain), values)


def from_folder(folder: Path, source: str) -> str | Path:
    """What a file in `folder` means by `source`: a file, by its path from there on, or a recipe's name."""
    path = folder / Path(source).expanduser()
    return path if path.is_file() or is_yaml(path) else source


def merged(base: dict, values: dict) -> dict:
    """The values over those of the base, key by key; rewards and judges are replaced as a whole."""
    result = dict(base)
    for section, keys in values.items():
        both = isinstance(keys, dict) and isinstance(base.get(section), dict)
        result[section] = base[section] | keys if both and section not in WHOLE else keys
    return result


def _file_of(source: str | Path) -> Path:
    path = Path(source).expanduser()
    # names have dots too: flux.1-dev-12gb; and folders may be called like recipes
    if not is_yaml(path) and (path.is_dir() or not path.exists()):
        path = RECIPES / f"{source}.yaml"
        if not path.exists():
            near = _nearest(str(source), recipe_names())
            raise UserError(f"recipe: no file or recipe called {str(source)!r}{near}")
    return path


def _apply(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    override = override if len(override) <= 200 else override[:200] + "..."
    if not separator:
        raise UserError(f"--set: expected section.key=value, got {override!r}")
    if section not in Recipe.model_fields:
        raise UserError(f"--set {override}: unknown section {section!r}{_hint(section, Recipe.model_fields)}")
    value = parse_yaml(text, f"--set {override}")
    if not dot and isinstance(value, dict):
        values[section] = merged(values, {section: value})[section]
        return
    if not name:
        raise UserError(f"--set: expected section.key=value, got {override!r}")
    if not isinstance(values.setdefault(section, {}), dict):
        raise UserError(f"{section}: expected a mapping, got {values[section]!r}")
    settings = values[section]
    if "rewards" in section and "." in name.rpartition(":")[2]:  # a setting of one reward
        reward, _, name = name.rpartition(".")
        given = settings.get(reward, {})
        settings[reward] = settings = dict(given if isinstance(given, dict) else {"weight": given})
    settings[name] = value


def _first_mistake(error: ValidationError) -> str:
    mistake = error.errors()[0]
    # union members ("auto" or a number) appear in the location; they are no keys
    path = [
        str(part)
        for part in mistake["loc"]
        if part not in ("int", "float", "bool", "list[str]") and "literal" not in str(part)
    ]
    where = ".".join(path)
    if mistake["type"] == "extra_forbidden":
        known: Iterable[str] = Recipe.model_fields
        if len(path) > 1:
            section: Any = Recipe.model_fields[path[0]].annotation
            known = section.model_fields
        return f"unknown key {where!r}{_hint(path[-1], known)}"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{where}: {message}" if where and where not in message.split(":")[0] else message
    expected = [m["msg"] for m in error.errors() if m["loc"][: len(path)] == mistake["loc"][: len(path)]]
    expected = [m.removeprefix("Input should be ").partition(", unable to")[0] for m in expected]
    expected = ["a smaller number" if "exceeded maximum size" in m else m for m in expected]
    wanted = " or ".join(dict.fromkeys(expected))
    return f"{where}: expected {wanted}, got {_short(mistake['input'])}"


def _hint(word: str, known: Iterable[str]) -> str:
    """What an unknown key probably means: by its meaning, or else by its spelling."""
    sections = {
        name: list(getattr(field.annotation, "model_fields", ()))
        for name, field in Recipe.model_fields.items()
    }
    return by_meaning(word, sections) or _nearest(word, known)


def _nearest(word: str, known) -> str:
    return did_you_mean(word, known) or f"; known: {', '.join(known)}"
