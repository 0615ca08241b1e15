"""The sections of a recipe and what each key means: what `crd-fast train --print-config` prints and
docs/settings.md lists.

The text below a key is its description, kept by pydantic.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from crd_fast.sections import Place, Section
from crd_fast.sizes import Resolution, parse_size, parse_sizes


class ModelConfig(Section):
    path: Place = "builtin"
    """The folder of a diffusers pipeline, its id on the Hugging Face hub, `builtin` or `builtin-ocr`. `plan`
    alone also takes the short names of models whose configs ship, like `flux.1-dev`."""
    method: Literal["lora", "full"] = "lora"
    """`lora` trains adapters on a frozen base; `full` every weight, which takes several times the memory."""
    dtype: Literal["default", "bf16"] = "default"
    """Dtype of the weights when all are trained (`full`): float32, or `bf16` with stochastic rounding of the
    updates, for half the memory. `bf16` needs `snapshots: host`."""
    snapshots: Literal["device", "host"] = "device"
    """Where `full` keeps its copies of the weights (`old`, `sampler`, reference). `host` frees GPU memory and
    copies them each time they are used."""
    sharding: Literal["none", "fsdp"] = "none"
    """`fsdp` cuts every trained weight over the processes of torchrun; for `full` alone."""
    lora_rank: int = Field(32, ge=1, le=2**14)
    """Rank of the adapters. Raise it if a LoRA stays below `full`; memory grows little."""
    lora_alpha: float = Field(64, gt=0)
    """The adapters are scaled by alpha / rank. Twice the rank is usual."""
    lora_targets: Literal["default", "all-linear"] | Annotated[list[str], Field(min_length=1)] = "default"
    """Names of layers that get adapters, as in peft. By default the attention projections; `all-linear`:
    every linear layer of the blocks that repeat."""
    init_lora: Place | None = None
    """A LoRA that training starts from, in the style of diffusers, peft, kohya or ai-toolkit; null: from the
    base. The reference stays the base."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Storage of the frozen layers under the adapters: `nf4` takes a quarter of bfloat16's memory and `int8`
    half, for slower forwards and a slightly different reference."""
    streaming: bool = False
    """Frozen weights stay in host memory and come to the GPU a block at a time. For models that do not fit
    otherwise; the link to the host is then the limit."""
    text_length: Literal["default"] | int = "default"
    """Tokens a prompt is padded or cut to; by default the pipeline's own. Shorter is faster where prompts are
    short."""
    guidance_embedding: float = Field(3.5, ge=0)
    """Guidance that models with distilled guidance (FLUX.1-dev) take as an input, in rollout, training and
    evaluation."""
    attention: str = "default"
    """A backend of diffusers: `native`, `flash`, `sage`, ...; by default what the model has."""
    vae_tiling: Literal["auto", "always"] = "auto"
    """`auto` decodes pictures whole, as the pipeline does, and goes on in tiles when there is no memory for
    one, which changes pictures a little. `always` takes tiles at once, and less memory; plans say where it is
    needed."""
    prompt_cache: Place = "default"
    """The folder of encoded prompts. By default one for each text encoder in `~/.cache/crd-fast`."""
    prompt_cache_gb: float = Field(10.0, gt=0, allow_inf_nan=False)
    """The most that it holds, in GB of 2^30 bytes; what was not asked for the longest goes first."""

    @model_validator(mode="after")
    def _sensible(self):
        if self.method == "full" and self.quantization != "none":
            raise ValueError(
                f"quantization: expected none with method full (quantized weights cannot be trained), "
                f"got {self.quantization}"
            )
        if self.method == "lora" and (self.dtype, self.snapshots) != ("default", "device"):
            raise ValueError("dtype, snapshots: expected default and device with method lora")
        if self.method == "full" and self.init_lora is not None:
            raise ValueError(f"init_lora: expected null with method full, got {self.init_lora}")
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


def number(value: Any) -> Any:
    """A whole number that is written as text, as one; anything else as it is."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value) else value


AUTO = "auto"  # prompts of evaluations that nobody named


class RolloutConfig(Section):
    prompts: Place | dict[Place, float] = "builtin"
    """A file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.txt`) or the name of a list that ships; or several with
    weights, `{a.jsonl: 3, b.txt: 1}`: then three quarters of an iteration's prompts are the first one's."""
    without_categories: list[str] = Field([])
    """Categories of these prompts (their `tag`, like `counting`) that are never trained on. Evaluations keep
    them, to see whether what is learned carries over."""
    prompts_per_iteration: int = Field(48, ge=1)
    """Groups of one iteration. More make steadier steps; fewer make more of them."""
    samples_per_prompt: int = Field(24, ge=2)
    """Pictures of each prompt, the group that is centered. With less than 8 the baseline is noisy."""
    steps: int = Field(10, ge=1, le=1000)
    """Solver steps for the training pictures. Few suffice: the pictures need not be pretty, only ranked
    correctly."""
    solver: Literal["euler", "ab2"] = "euler"
    """`ab2` is of second order: five of its steps did as well as ten of Euler's in 50 iterations, and made
    worse and worse pictures after 60 (docs/evidence.md)."""
    guidance_scale: float = Field(1.0, ge=0)
    """Guidance of the training pictures. 1 is none: the method trains the model to do without guidance."""
    resolution: int | tuple[int, int] | list[int | tuple[int, int]] = 512
    """Side of the training pictures in pixels, or `[height, width]`. Half the side takes a quarter of the
    time or less, and a reward sees less. Several sizes, `[[768, 512], [512, 768]]`, take turns: each
    iteration has one of them."""
    micro_batch: Literal["auto"] | int = "auto"
    """Pictures made at once. `auto` begins with 96 and halves where memory runs out."""

    @property
    def prompt_lists(self) -> dict[str, float]:
        """By weight, where there is but one too."""
        return {self.prompts: 1.0} if isinstance(self.prompts, str) else dict(self.prompts)

    @field_validator("prompts", mode="before")
    @classmethod
    def _weighted(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if not value:
                raise ValueError("expected at least one file or list, got {}")
            for name, weight in value.items():
                if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                    raise ValueError(f"{name}: expected a weight, got {weight!r}")
                if not (0 < weight <= sys.float_info.max):
                    raise ValueError(f"{name}: expected a weight above 0, got {weight}")
        elif not isinstance(value, str):
            raise ValueError(f"expected a file, a list or a mapping of them to weights, got {value!r}")
        return value

    @field_validator("resolution", mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        return parse_sizes(number(value))

    @property
    def sizes(self) -> list[Resolution]:
        """The sizes of the pictures, as a list also if there is only one."""
        return self.resolution if isinstance(self.resolution, list) else [self.resolution]


class AdvantageConfig(Section):
    std: Literal["global", "group"] = "global"
    """What a centered reward is divided by: the standard deviation of the whole iteration, or of its group.
    """
    aggregate: Literal["sum", "gdpo"] = "sum"
    """How several rewards are combined: `sum`, or `gdpo`, which first normalises each within its group so
    that none drowns another."""
    clip: float = Field(5.0, gt=0)
    """Advantages beyond this are cut, in standard deviations."""


SETTINGS_OF = {  # those of one method alone
    "crd": ("type", "temperature", "centering", "centering_batch"),
    "awm": ("weighting", "clip_range", "old_kl_beta"),
}


class LossConfig(Section):
    method: Literal["crd", "nft", "awm", "flow_matching", "dpo"] = "crd"
    """`crd`, or `nft` (DiffusionNFT), `awm` (advantage-weighted matching), `flow_matching` (weighed by the
    reward), `dpo` (the better against the worse samples of a prompt)."""
    beta: float = Field(1.0, gt=0)
    """Strength of the regularisation to `old`, of `crd`, `nft` and `dpo`. Large: small careful steps. Watch
    `implicit_variance` against `external_variance`."""
    kl_beta: float = Field(0.1, ge=0)
    """Strength of the anchor to the guided pretrained model for the best samples. Raise it where pictures
    drift, lower it where the reward stands still."""
    kl_min: float = Field(1.0e-4, ge=0)
    """Its strength for the worst samples, with `crd`; with other methods it is `kl_beta` for all."""
    guidance_scale: float = Field(4.5, ge=0)
    """Guidance of the reference that the anchor pulls to; usually what the model is used with."""
    adaptive_weighting: bool = True
    """Errors are divided by their own mean size, so that noise levels count alike; with `crd` and `nft`."""
    reward_adaptive_kl: bool = True
    """The anchor's strength follows the sample's advantage, from `kl_min` to `kl_beta`, with `crd`; else
    it is `kl_beta` for all."""
    norm_penalty: float = Field(0.0, ge=0)
    """Strength of a penalty on velocities of the anchored samples that are longer than the pretrained model's
    without guidance. Watch `norm_ratio`, of the squared lengths."""
    anchor_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the samples that are anchored, drawn without bias. A quarter cost nothing that showed and
    saves most reference forwards."""
    anchor_uncertain: float = Field(1.0, gt=0, le=1)
    """Below 1 only this share of the samples is anchored: those that the trained rewards rank furthest above
    what rewards of weight 0 say of them, which are scored and not trained on."""
    type: Literal["mse", "bce"] = "mse"
    """`mse`, or `bce`: cross-entropy of the centered log-ratio and the reward."""
    temperature: float = Field(math.inf, gt=0, allow_inf_nan=True)
    """How much the best and worst of a group weigh in its baseline; infinite: all alike, and the one without
    `centering`."""
    centering: Literal["prompt", "batch", "none"] = "prompt"
    """`prompt` is the method. For comparison: `batch` mixes prompts, `none` takes log-ratios and rewards as
    they are."""
    centering_batch: int | None = Field(None, ge=1)
    """How many samples in a row `batch` centers together, as trainers do that center what shares a
    micro-batch; null: all of an optimizer step."""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "uniform"
    """How `awm` weighs the matching error over noise levels."""
    clip_range: float | None = Field(None, gt=0)
    """Bounds `awm`'s ratio to `old`; null: the error alone."""
    old_kl_beta: float = Field(0.0, ge=0)
    """Strength of `awm`'s anchor to `old`."""
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Which kernels: `triton` on a GPU and `cpu` without by default; `reference` is plain torch."""

    @model_validator(mode="after")
    def _ordered(self):
        if self.method == "crd" and self.reward_adaptive_kl and self.kl_min > self.kl_beta:
            raise ValueError(f"kl_min: expected at most kl_beta ({self.kl_beta:g}), got {self.kl_min:g}")
        for name, unset in {"norm_penalty": 0, "anchor_uncertain": 1.0}.items():
            given = getattr(self, name)
            if given != unset and not self.anchored:
                raise ValueError(f"{name}: expected {unset} without an anchor (kl_beta 0), got {given:g}")
        if self.centering == "none" and self.temperature < math.inf:
            raise ValueError(f"temperature: expected inf with centering none, got {self.temperature:g}")
        if self.centering_batch is not None and self.centering != "batch":
            raise ValueError(
                f"centering_batch: expected null with centering {self.centering}, got {self.centering_batch}"
            )
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
    old: str = "0/0.25/0.005/0.9"
    """How `old` follows the policy, as begin/start/slope/end of the decay: from step `begin` on it is start +
    slope per step, at most `end`. 0 follows at once, 1 never. With an end near 1 it comes to stand still and
    a long run may be lost; with one of 0.5 a long run drifts."""
    sampler: str = "75/0/0.0075/0.9"
    """The same for the weights that make the pictures."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an average of the policy after each optimizer step, as diffusers' EMAModel has it, for
    `evaluate.weights: ema`; null: none. One more copy of the trained weights."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all snapshots."""
        return ("old", "sampler") if self.ema is None else ("old", "sampler", "ema")

    def ema_decay(self, step: int) -> float:
        """After this many optimizer steps, at least one: 0, then min(ema, step / (9 + step))."""
        if self.ema is None:
            raise ValueError("snapshots.ema: expected a decay, got null")
        return 0.0 if step <= 1 else min(self.ema, step / (9 + step))

    @field_validator("old", "sampler")
    @classmethod
    def _parses(cls, text: str) -> str:
        Schedule.parse(text)
        return text


class TrainConfig(Section):
    iterations: int = Field(400, ge=1)
    """Iterations, each of rollout, scoring and update."""
    steps_per_iteration: int = Field(2, ge=1)
    """Optimizer steps that share one iteration's pictures."""
    timesteps: Literal["all"] | int = "all"
    """How many of the rollout's noise levels each picture is trained at. Two or three did as well as all ten,
    for a fraction of the time."""
    timestep_range: float = Field(0.99, gt=0, le=1)
    """Share of the denoising that is trained, from the noise on."""
    timestep_sampling: Literal["uniform", "high-noise", "by-signal"] = "uniform"
    """Where they are drawn: everywhere alike, in the noisier half, or where gradients were large. High noise
    alone suits rewards of layout and hurts fine detail. `by-signal` needs fewer `timesteps` than all."""
    backward_fraction: float = Field(1.0, gt=0, le=1)
    """Share of each group that goes backward, drawn without bias. Below 1 it saves little and learns more
    slowly with groups of 8."""
    skip_equal_groups: bool = False
    """No policy term where rewards of a group are equal: a fifth less of a short run, worse in a long one."""
    kept_graphs: Literal["none", "device", "host"] = "none"
    """A group larger than the micro-batch is run forward twice, unless the graphs are kept, on the device or
    in pinned host memory; only with a `backward_fraction` of 1. Same numbers."""
    micro_batch: Literal["auto"] | int = "auto"
    """Samples that are trained at once. Any gives the same gradient, to rounding. `auto` begins with 96
    and halves where memory runs out."""
    checkpointing: bool | Annotated[float, Field(ge=0, le=1)] = True
    """Activations are computed again in the backward pass: much less memory for a third more time. A number
    is the share of the blocks that do so; `plan --gpu` finds the smallest that fits. Same numbers."""
    compile: bool = False
    """`torch.compile` of the blocks that repeat."""
    profile: bool = False
    """NVTX ranges around the phases, for Nsight Systems."""
    trackers: list[str] = Field(["tensorboard"])
    """Where metrics go besides `metrics.jsonl`: `tensorboard`, and what accelerate has a tracker for, like
    `wandb` or `mlflow`, where it is installed."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw8bit"
    """AdamW in float32, or with 8-bit moments of bitsandbytes, also paged to the host."""
    learning_rate: float = Field(3.0e-4, gt=0)
    """3e-4 suits a LoRA of rank 32; lower it where `grad_norm` jumps."""
    weight_decay: float = Field(1.0e-4, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are shortened to this."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of forward and backward passes. `bf16` needs an Ampere GPU or newer."""
    seed: int = Field(42, ge=0)
    """Seed of prompts, noise, timesteps and everything else that is drawn."""


class EvaluateConfig(Section):
    every: int = Field(20, ge=0)
    """Iterations between evaluations; 0: none at all."""
    prompts: Place = AUTO
    """A file or a list that ships, best one that is never trained on. `auto`: the held-out part of the lists
    that ship, and a tenth of the different prompts in files, at most 384, which are then never trained on."""
    samples_per_prompt: int = Field(1, ge=1)
    """Pictures of each held-out prompt, of the same seeds every time."""
    resolution: int | tuple[int, int] | None = None
    """Side of the evaluation's pictures in pixels, or `[height, width]`; null: as in training, of several the
    first."""
    steps: int = Field(40, ge=1, le=1000)
    """Euler steps for the evaluation's pictures."""
    guidance_scale: float = Field(1.0, ge=0)
    """Guidance of the evaluation's pictures. 1: as the trained model is meant to be used."""
    guided_base: bool = True
    """The base is evaluated once more before training, with `loss.guidance_scale`, where that differs: what
    the trained model has to be better than."""
    weights: Literal["policy", "ema", "sampler", "old"] = "policy"
    """Whose pictures these are, and which weights checkpoints and exports hold for use elsewhere: the
    policy's, or an average of them that moves as slowly as `snapshots` says. `sampler` and `old` are there
    anyway; `ema` wants a decay in `snapshots.ema`."""
    max_prompts: int | None = Field(None, ge=1)
    """The first so many of them; null: all."""
    drift: float | None = Field(None, ge=1)
    """A guidance scale, like that which the model is used with: evaluations also measure how far the weights
    are from the pretrained model with it and without, whatever `loss` is anchored to. 1: without alone; null:
    neither. Three forwards a picture."""
    features: Place | None = None
    """`random`, or a CLIP model, whose features of the pictures are compared with those of the pretrained
    model at the guidance scale `drift`, which are drawn once; null: not compared."""

    @field_validator("resolution", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return None if value is None else parse_size(number(value))


class CheckpointConfig(Section):
    every: int = Field(20, ge=1)
    """Iterations between checkpoints."""
    minutes: float = Field(20.0, gt=0)
    """And after an iteration that ends this long after the last one."""
    keep: int = Field(3, ge=1)
    """How many of the newest are kept, beside the best by its held-out score."""
