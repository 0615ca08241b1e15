"""The recipe: what a run does, as YAML, checked by a schema.

Unknown keys are errors that name the nearest known key. See `crd_fast/recipes/` for examples.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from crd_fast.errors import UserError, did_you_mean
from crd_fast.hints import by_meaning
from crd_fast.sections import Section
from crd_fast.worlds import WORLDS
from crd_fast.yaml_files import parse_yaml, read_yaml

RECIPES = Path(__file__).parent / "recipes"
WORLD_REWARDS = ("geneval", "geneval_strict")  # they read pictures of the built-in world alone


class ModelConfig(Section):
    path: str = "builtin"
    method: Literal["lora", "full"] = "lora"
    dtype: Literal["default", "bf16"] = "default"  # of weights that are all trained; default: float32
    snapshots: Literal["device", "host"] = "device"  # where method full keeps its copies of the weights
    sharding: Literal["none", "fsdp"] = "none"  # every weight that is trained is cut over the processes
    lora_rank: int = Field(32, ge=1)
    lora_alpha: float = Field(64, gt=0)
    lora_targets: Literal["default"] | list[str] = "default"
    quantization: Literal["none", "int8", "nf4"] = "none"  # of the frozen layers under the adapters
    streaming: bool = False  # the frozen weights of blocks stay on the host, and come when a block runs
    text_length: Literal["default"] | int = "default"  # tokens a prompt is padded or cut to
    guidance_embedding: float = Field(3.5, ge=0)  # where guidance was distilled into the model (FLUX.1-dev)
    attention: str = "default"  # diffusers' backend: native, flash, sage, ...; default: what the model has
    prompt_cache: str = "default"  # folder of encoded prompts; default: one for each text encoder in ~/.cache
    prompt_cache_gb: float = Field(10.0, gt=0, allow_inf_nan=False)  # the most that it holds

    @model_validator(mode="after")
    def _sensible(self):
        if self.method == "full" and self.quantization != "none":
            raise ValueError(
                f"quantization: expected none with method full (quantized weights cannot be trained), "
                f"got {self.quantization}"
            )
        if self.method == "lora" and (self.dtype, self.snapshots) != ("default", "device"):
            raise ValueError("dtype, snapshots: expected default and device with method lora")
        if self.dtype == "bf16" and self.snapshots == "device":
            raise ValueError("snapshots: expected host with dtype bf16, got device")
        if self.sharding == "fsdp" and self.method != "full":
            raise ValueError(f"sharding: expected none with method {self.method}, got fsdp")
        if self.sharding == "fsdp" and self.dtype == "bf16":
            raise ValueError("dtype: expected default with sharding fsdp, got bf16")
        if self.method == "full" and self.streaming:
            raise ValueError("streaming: expected false with method full (trained weights stay), got true")
        if self.text_length != "default" and self.text_length < 1:
            raise ValueError(f"text_length: expected default or at least 1, got {self.text_length}")
        return self


class RolloutConfig(Section):
    prompts: str = "builtin"
    prompts_per_iteration: int = Field(48, ge=1)
    samples_per_prompt: int = Field(24, ge=2)
    steps: int = Field(10, ge=1)
    solver: Literal["euler", "ab2"] = "euler"  # ab2: of second order, by the step before
    guidance_scale: float = Field(1.0, ge=0)
    resolution: int = Field(512, ge=8)
    micro_batch: Literal["auto"] | int = "auto"

    @field_validator("resolution", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)) or re.fullmatch(r"\s*\d+\s*[xX*]\s*\d+\s*", str(value)):
            raise ValueError(f"expected one number, the side in pixels (pictures are square), got {value}")
        return value


class AdvantageConfig(Section):
    std: Literal["global", "group"] = "global"
    aggregate: Literal["sum", "gdpo"] = "sum"
    clip: float = Field(5.0, gt=0)


SETTINGS_OF = {  # those of one method alone
    "crd": ("type", "temperature", "centering"),
    "awm": ("weighting", "clip_range", "old_kl_beta"),
}


class LossConfig(Section):
    method: Literal["crd", "nft", "awm", "flow_matching"] = "crd"
    beta: float = Field(1.0, gt=0)
    kl_beta: float = Field(0.1, ge=0)
    kl_min: float = Field(1.0e-4, ge=0)
    guidance_scale: float = Field(4.5, ge=0)
    adaptive_weighting: bool = True
    reward_adaptive_kl: bool = True
    anchor_fraction: float = Field(1.0, gt=0, le=1)
    type: Literal["mse", "bce"] = "mse"
    temperature: float = Field(math.inf, gt=0, allow_inf_nan=True)
    centering: Literal["prompt", "batch"] = "prompt"
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "uniform"  # awm: of the matching error
    clip_range: float | None = Field(None, gt=0)  # awm: bounds the ratio to old; none: the error alone
    old_kl_beta: float = Field(0.0, ge=0)  # awm: strength of the anchor to old
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"

    @model_validator(mode="after")
    def _ordered(self):
        if self.method == "crd" and self.reward_adaptive_kl and self.kl_min > self.kl_beta:
            raise ValueError(f"kl_min: expected at most kl_beta ({self.kl_beta:g}), got {self.kl_min:g}")
        for method, names in SETTINGS_OF.items():
            for name in names if method != self.method else ():
                value, default = getattr(self, name), type(self).model_fields[name].default
                if value != default:
                    wanted = "null" if default is None else default
                    raise ValueError(f"{name}: expected {wanted} with method {self.method}, got {value}")
        return self

    @property
    def anchored(self) -> bool:
        """Whether the KL anchor has any weight; if not, the reference is never computed."""
        return self.kl_beta > 0


class Schedule(Section):
    """d(step) = min(start + slope * (step - begin), end) from `begin` on, `start` before."""

    begin: int
    start: float
    slope: float
    end: float

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return self.start
        return min(self.start + self.slope * (step - self.begin), self.end)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """From `begin/start/slope/end`."""
        parts = str(text).split("/")
        try:
            begin, start, slope, end = int(parts[0]), *map(float, parts[1:])
        except (ValueError, IndexError):
            raise ValueError(
                f"expected begin/start/slope/end like 0/0.25/0.005/0.999, got {text!r}"
            ) from None
        if begin < 0 or not 0 <= start <= 1 or not 0 <= end <= 1:
            raise ValueError(f"expected begin >= 0 and decays between 0 and 1, got {text!r}")
        if not 0 <= slope < math.inf:  # a negative one leads below 0
            raise ValueError(f"expected a finite slope of at least 0, got {text!r}")
        return cls(begin=begin, start=start, slope=slope, end=end)


class SnapshotsConfig(Section):
    old: str = "0/0.25/0.005/0.999"
    sampler: str = "75/0/0.0075/0.999"

    @field_validator("old", "sampler")
    @classmethod
    def _parses(cls, text: str) -> str:
        Schedule.parse(text)
        return text


class TrainConfig(Section):
    iterations: int = Field(400, ge=1)
    steps_per_iteration: int = Field(2, ge=1)
    timesteps: Literal["all"] | int = "all"
    timestep_range: float = Field(0.99, gt=0, le=1)
    timestep_sampling: Literal["uniform", "high-noise", "by-signal"] = "uniform"  # by-signal: large gradients
    backward_fraction: float = Field(1.0, gt=0, le=1)  # of each group's pairs; the others are only measured
    skip_equal_groups: bool = False  # no policy term where all rewards of a group are equal
    kept_graphs: Literal["none", "device", "host"] = "none"  # of a group's micro-batches; none: run again
    micro_batch: Literal["auto"] | int = "auto"
    checkpointing: bool = True
    compile: bool = False  # torch.compile of the blocks that repeat
    profile: bool = False  # NVTX ranges around the phases
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw8bit"
    learning_rate: float = Field(3.0e-4, gt=0)
    weight_decay: float = Field(1.0e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = Field(42, ge=0)


class EvaluateConfig(Section):
    every: int = Field(20, ge=0)
    prompts: str = "builtin-heldout"
    samples_per_prompt: int = Field(1, ge=1)
    steps: int = Field(40, ge=1)
    guidance_scale: float = Field(1.0, ge=0)
    max_prompts: int | None = Field(None, ge=1)


class CheckpointConfig(Section):
    every: int = Field(20, ge=1)  # iterations
    minutes: float = Field(20.0, gt=0)  # and after an iteration that ends this long after the last one
    keep: int = Field(3, ge=1)


class Recipe(Section):
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, Any] = Field({"geneval": 1.0})  # name: a weight, or settings with a `weight`
    eval_rewards: dict[str, Any] = Field({})  # the same, scored at evaluations and never trained on
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
            weight = value.get("weight", 1.0) if isinstance(value, dict) else value
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
                raise ValueError(f"{name}: expected a weight or settings, got {weight!r}")
            if not math.isfinite(weight):
                raise ValueError(f"{name}: expected a finite weight, got {weight}")
            for setting, number in value.items() if isinstance(value, dict) else ():
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{name}: {setting}: expected a finite number, got {number}")
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
        if self.model.streaming and not self.train.checkpointing:
            raise ValueError("train.checkpointing: expected true with model.streaming, got false")
        if self.model.streaming and self.train.compile and self.model.quantization == "nf4":
            # the compiled code of some networks keeps the copies of 4-bit weights alive: all blocks at once
            raise ValueError("train.compile: expected false with nf4 weights that are streamed, got true")
        if self.train.backward_fraction * self.rollout.samples_per_prompt < 1:
            raise ValueError(
                f"train.backward_fraction: expected at least one of rollout.samples_per_prompt "
                f"({self.rollout.samples_per_prompt}), got {self.train.backward_fraction:g} of them"
            )
        if self.model.sharding == "fsdp" and (
            self.train.backward_fraction < 1 or self.train.skip_equal_groups
        ):
            raise ValueError(
                "train.backward_fraction, train.skip_equal_groups: expected 1.0 and false with "
                "model.sharding fsdp (all processes take part in each forward)"
            )
        count = self.train.timesteps
        if count != "all" and not 1 <= count <= len(self.training_steps()):
            raise ValueError(
                f"train.timesteps: expected all or 1 to {len(self.training_steps())} (the rollout's steps in "
                f"the training range), got {count}"
            )
        if self.train.steps_per_iteration > self.rollout.prompts_per_iteration:
            raise ValueError(
                f"train.steps_per_iteration: expected at most rollout.prompts_per_iteration "
                f"({self.rollout.prompts_per_iteration}), got {self.train.steps_per_iteration}"
            )
        return self

    def check_own(self, trains: bool, evaluates: bool) -> None:
        """Raises UserError where the defaults, of a world that ships, meet another model."""
        prompts, rewards = {}, {}
        if trains:
            prompts["rollout.prompts"], rewards["rewards"] = self.rollout.prompts, self.rewards
        if evaluates:
            prompts["evaluate.prompts"] = self.evaluate.prompts
            rewards |= {"rewards": self.rewards, "eval_rewards": self.eval_rewards}
        foreign = [key for key, names in rewards.items() if any(name in WORLD_REWARDS for name in names)]
        foreign += [key for key, name in prompts.items() if name.removesuffix("-heldout") in WORLDS]
        if foreign and self.model.path not in WORLDS:
            off = " (or evaluate.every: 0)" if trains and "evaluate.prompts" in foreign else ""
            raise UserError(
                f"{', '.join(foreign)}: expected some of its own for {self.model.path}, got those of the "
                f"small model that ships; set {' and '.join(foreign)}{off}"
            )

    def training_steps(self) -> list[int]:
        """Indices of the rollout's steps that are trained: those in the first `timestep_range` of the
        denoising, or of these the noisier half.
        """
        last = self.train.timestep_range * self.rollout.steps
        steps = [i for i in range(self.rollout.steps) if i < last]
        return steps[: (len(steps) + 1) // 2] if self.train.timestep_sampling == "high-noise" else steps

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None, width=110)


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from a file, or from the name of one that ships, with `section.key=value` overrides.

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


def _read(source: str | Path) -> dict:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml") and not path.exists():  # names have dots too: flux.1-dev-12gb
        path = RECIPES / f"{source}.yaml"
        if not path.exists():
            near = _nearest(str(source), recipe_names())
            raise UserError(f"recipe: no file or recipe called {str(source)!r}{near}")
    return read_yaml(path)


def _apply(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not separator:
        raise UserError(f"--set: expected section.key=value, got {override!r}")
    if section not in Recipe.model_fields:
        raise UserError(f"--set {override}: unknown section {section!r}{_hint(section, Recipe.model_fields)}")
    value = parse_yaml(text, f"--set {override}")
    if not dot and isinstance(value, dict):
        values[section] = value
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
        if part not in ("int", "list[str]") and "literal" not in str(part)
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
    wanted = " or ".join(dict.fromkeys(m.removeprefix("Input should be ") for m in expected))
    got = repr(mistake["input"])
    return f"{where}: expected {wanted}, got {got if len(got) <= 100 else got[:100] + '...'}"


def _hint(word: str, known: Iterable[str]) -> str:
    """What an unknown key probably means: by its meaning, or else by its spelling."""
    sections = {
        name: list(getattr(field.annotation, "model_fields", ()))
        for name, field in Recipe.model_fields.items()
    }
    return by_meaning(word, sections) or _nearest(word, known)


def _nearest(word: str, known) -> str:
    return did_you_mean(word, known) or f"; known: {', '.join(known)}"
