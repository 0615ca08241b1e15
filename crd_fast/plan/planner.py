"""What a recipe takes, before anything is loaded: peak bytes by phase and part, forwards, FLOPs.

The code that trains runs on fake tensors, so that the plan cannot drift from it: `generate`, `decode`,
`Updater.accumulate`, the optimizer; under the rules of CUDA's autocast. Of what repeats itself one round is
run: of the rollout's steps one forward, of a group's micro-batches two, which is enough because each further
one only adds what it holds.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.checkpointing import recomputed_blocks
from crd_fast.models.components import count_parameters
from crd_fast.models.pipeline import PipelineModel
from crd_fast.models.streaming import SLAB, pinned_bytes, repeated_blocks
from crd_fast.plan.blocks import Blocks
from crd_fast.plan.cuda_autocast import cuda_autocast
from crd_fast.plan.encoding import encoding
from crd_fast.plan.fake_models import Unknown, fake_embeddings, fake_model, fakes, unswitched
from crd_fast.plan.forwards import Flops, ForwardAccount, accounted
from crd_fast.plan.live_bytes import LiveBytes, Peak, tensors_of
from crd_fast.plan.other_sizes import OtherSizes
from crd_fast.plan.rewards import with_rewards
from crd_fast.run.row_counts import BACKWARD, kind_of
from crd_fast.sizes import pixels
from crd_fast.train.micro_batch import MicroBatch, resolve_micro_batch
from crd_fast.train.pairs import Pairs
from crd_fast.train.rollout import Sampling, generate
from crd_fast.train.update import Updater
from crd_fast.weights.make import make_weights

PHASES = ("encode", "rollout", "decode", "measure", "update", "step", "checkpoint", "judge")
PARTS = (
    "base weights",
    "adapters",
    "snapshots",
    "optimizer",
    "gradients",
    "text encoders",
    "VAE",
    "rewards",  # their networks, and what scores a batch
    "latents",  # with the prompts of a micro-batch and the predictions of the frozen branches
    "activations",  # what the policy's forward with gradient leaves
    "workspace",  # the rest: forwards without gradient, recomputed blocks, the backward pass
)


# Transformer and VAE, text encoders are not (huggingface/diffusers pull request 9982).
PUBLISHED_IN_FLOAT32 = ("sana-1.6b",)
# Kinds of rows, by the part of an iteration that they are computed in.
IN_PART = {
    "rollout": ("sampler",),
    "decode": ("decode",),
    "update": ("old", "reference", "policy", "policy_with_gradient", BACKWARD),
}


@dataclass
class Plan:
    """Peaks on the GPU by phase; what one iteration computes.

    What it computes is rows times FLOPs of a row, by kind: `sampler`, `old`, `reference` and `policy` without
    gradient, `policy_with_gradient` forward, `backward` with what checkpointing runs again, and `decode` for
    a picture. Guided forwards have two rows a sample. A setting that leaves a part of the pairs out scales
    the rows of the kinds that it leaves out.
    """

    phases: dict[str, Peak]
    micro_batch: int  # of the update
    rollout_micro_batch: int
    parameters: int  # of the network, without adapters
    trained: int
    host_bytes: int = 0  # of pinned memory, as allocated: snapshots and reference, or streamed blocks
    forwards: dict[str, float] = field(default_factory=dict)  # per sample and timestep, of the update
    rows: dict[str, float] = field(default_factory=dict)  # of one iteration
    row_flops: dict[str, float] = field(default_factory=dict)  # of several sizes of pictures, the mean
    evaluation_row_flops: dict[str, float] = field(default_factory=dict)  # where it has another size
    streamed_bytes: float = 0.0  # that one iteration fetches from the host, and that a forward does
    forward_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of what is stored: see `Planner.sizes`
    kept_graphs: str = "none"

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of one iteration, by part: rollout, decode, update."""
        return {
            part: sum(self.rows.get(kind, 0.0) * self.row_flops.get(kind, 0.0) for kind in kinds)
            for part, kinds in IN_PART.items()
        }

    @property
    def peak(self) -> int:
        return max(peak.bytes for peak in self.phases.values())

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name].bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak,
            "peak_phase": self.worst,
            "phases": {name: {"bytes": p.bytes, "parts": p.parts} for name, p in self.phases.items()},
            "micro_batch": self.micro_batch,
            "rollout_micro_batch": self.rollout_micro_batch,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "host_bytes": self.host_bytes,
            "kept_graphs": self.kept_graphs,
            "forwards_per_sample_and_timestep": self.forwards,
            "rows_per_iteration": self.rows,
            "flops_per_row": self.row_flops,
            "flops_per_iteration": self.flops,
            "stored_bytes": self.sizes,
        }


class Planner:
    """The recipe's model on fake tensors, to be planned at several micro-batches.

    Raises UserError for what `load_model` would refuse, and for a model whose configs are not here.
    """

    def __init__(self, recipe: Recipe):
        if recipe.model.sharding != "none":
            raise UserError("model.sharding: a plan is of one process, expected none, got fsdp")
        self.recipe = recipe
        self.size = max(recipe.rollout.sizes, key=pixels)
        self._other_sizes = OtherSizes()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live, self.flops = LiveBytes(), Flops()
        self.model: Any = fake_model(recipe, self.mode)
        self.parameters = count_parameters(self.network)
        self.live.move(tensors_of(self.network), "base weights")
        streamed = self.model.streaming.host_tensors() if self.model.streaming else []
        self.live.release(streamed)
        self.streamed = sum(tensor.nbytes for tensor in streamed)
        self.host_bytes = pinned_bytes(streamed)
        adapted = recipe.model.method == "lora"
        watched = nullcontext() if adapted else self.live  # it takes long to watch adapters being made
        with fakes(self.mode), self.live.in_part("snapshots"):
            with watched:
                self.weights = make_weights(self.model, recipe)
            state = self.weights.state()
            self.live.add(state)
            self.trained = self.weights.trained()
            if adapted:
                self.live.move(self.trained, "adapters")
            host = self.weights.host_tensors()
            self.host_bytes += pinned_bytes(host)
            self.live.ignore(host)
            self.optimizer = optimizer_state(recipe.train.optimizer, self.trained)
            self.live.move(self.optimizer, "optimizer")
        self.blocks = Blocks(
            repeated_blocks(self.network),
            self.mode,
            self.live,
            self.flops,
            recomputed_blocks(self.network, recipe.train.checkpointing),
            recipe.model.streaming,
        )
        self.embeddings = fake_embeddings(self.model, 2, self.mode)
        self.empty = {key: value[:1] for key, value in self.embeddings.items()}
        self.live.move(self.embeddings, "latents")
        self.encoding, self.encoder_numbers = encoding(self.model, self.mode)
        self.sizes = self._sizes(state)
        self.forwards: dict[
            tuple, tuple[int, int, torch.Size, torch.dtype]
        ] = {}  # peak, FLOPs, shape and dtype of those without gradient

    def plan(
        self,
        micro_batch: int | None = None,
        rollout_micro_batch: int | None = None,
        kept_graphs: str | None = None,
    ) -> Plan:
        """The plan at these micro-batches and with graphs kept there, by default as the recipe has them."""
        recipe, rollout = self.recipe, self.recipe.rollout
        samples = rollout.prompts_per_iteration * rollout.samples_per_prompt
        result = Plan(
            {},
            micro_batch or resolve_micro_batch(recipe.train.micro_batch).size,
            min(rollout_micro_batch or resolve_micro_batch(rollout.micro_batch).size, samples),
            self.parameters,
            sum(parameter.numel() for parameter in self.trained),
            self.host_bytes,
            sizes=self.sizes,
            kept_graphs=kept_graphs or recipe.train.kept_graphs,
        )
        self.live.peaks.clear()
        with unswitched(), cuda_autocast(), Unknown(), self.flops, self.live, self.live.in_part("latents"):
            self._rollout(result, samples)
            self._update(result, samples)
            self._step()
            with self.live.in_phase("checkpoint"):
                pass
        peaks = self.live.peaks | ({"encode": self.encoding} if self.encoding else {})
        peaks = with_rewards(peaks, recipe)
        result.phases = {name: peaks[name] for name in PHASES if name in peaks}
        self._other_sizes.add_to(result, self)
        return result

    def decode_in_tiles(self, recipe: Recipe) -> None:
        """From now on plans are of this recipe, which is the same but that it decodes in tiles."""
        self.recipe, self._other_sizes = recipe, OtherSizes()
        if isinstance(self.model, PipelineModel):  # what ships with the package has small pictures alone
            vae: Any = self.model.pipe.vae
            vae.enable_tiling()

    @property
    def network(self) -> torch.nn.Module:
        return self.model.transformer

    def _sizes(self, state: dict[str, torch.Tensor]) -> dict[str, int]:
        """Bytes: of one prompt's embeddings; of a checkpoint; of the VAE; of the published weights, which are
        in bfloat16 but for those that are known to be wider."""
        tensors = {**state, **{f"optimizer/{i}": t for i, t in enumerate(self.optimizer)}}
        # the policy once more in the format of diffusers, and an adapter in that of peft too
        copies = 2 if self.recipe.model.method == "lora" else 1
        saved = copies * sum(parameter.nbytes for parameter in self.trained)
        sizes = {
            "prompt": sum(value[:1].nbytes for value in self.embeddings.values()),
            "checkpoint": sum(tensor.nbytes for tensor in tensors.values()) + saved,
        }
        if isinstance(self.model, PipelineModel):
            pipe: Any = self.model.pipe
            vae = count_parameters(pipe.vae)
            wide = 4 if self.model.folder.name in PUBLISHED_IN_FLOAT32 else 2
            sizes["VAE"] = 4 * vae
            sizes["published"] = wide * (self.parameters + vae) + 2 * self.encoder_numbers
        return sizes

    def _latents(self, count: int) -> torch.Tensor:
        with self.mode:
            return torch.empty(count, *self.model.latent_shape(self.size))

    def _rollout(self, result: Plan, samples: int) -> None:
        """One micro-batch, two steps and the decoding of one sample, beside the latents of all."""
        count, rollout = result.rollout_micro_batch, self.recipe.rollout
        others = self._latents(samples - count)
        sampling = Sampling.of(self.recipe, rollout, self.empty, MicroBatch(count))

        def decode(latents: torch.Tensor) -> None:
            before = self.flops.total
            self._decode()
            result.row_flops["decode"] = self.flops.total - before

        with self.live.in_phase("rollout"), accounted(self) as account, self.weights.use("sampler"):
            generate(
                account,
                self.embeddings,
                torch.zeros(count, dtype=torch.int64),
                torch.zeros(count, dtype=torch.int64),
                replace(sampling, steps=2, resolution=self.size),
                decode,
                account,
                "sampler",
            )
        rows = account.rows["sampler", False] / 2 / count
        result.forwards["rollout"] = rows
        result.rows |= {"sampler": rows * samples * rollout.steps, "decode": samples}
        result.row_flops |= account.row_flops
        result.forward_bytes = self.streamed
        result.streamed_bytes += self.streamed * math.ceil(samples / count) * rollout.steps
        del others

    def _decode(self) -> None:
        vae = getattr(getattr(self.model, "pipe", None), "vae", torch.nn.Module())
        with self.live.in_phase("decode"), fakes(self.mode), self.live.in_part("workspace"):
            self.live.move(tensors_of(vae), "VAE")
            self.model.decode(self._latents(1))
            self.live.release(tensors_of(vae))

    def _update(self, result: Plan, samples: int) -> None:
        """A unit of whole groups if it fits, or two micro-batches of a group and what the others hold."""
        recipe, micro_batch = self.recipe, result.micro_batch
        samples_per_prompt = group = recipe.rollout.samples_per_prompt
        prompts = recipe.rollout.prompts_per_iteration
        timesteps = recipe.train.timesteps
        timesteps = len(recipe.training_steps()) if timesteps == "all" else timesteps
        of_step = math.ceil(prompts / recipe.train.steps_per_iteration) * timesteps * group
        unit = group
        if recipe.loss.centering == "batch":
            unit = group = min(recipe.loss.centering_batch or of_step, of_step)
        if micro_batch >= group:
            unit = min(micro_batch // group * group, of_step)
        split = unit > micro_batch  # an uncoupled method's micro-batches go backward one by one, as two show
        count = 2 * micro_batch if split else unit
        zeros = torch.zeros(count, dtype=torch.int64)
        sigma, ones = torch.full((count,), 0.5), torch.ones(count)
        pairs = Pairs.plain(zeros, zeros, sigma, zeros, zeros, zeros.float(), ones)
        latents = self._latents(samples)
        with self.mode, self.live.in_part("gradients"):
            for parameter in self.trained:  # those of earlier micro-batches
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        before = self.live.live["latents"]
        with self.live.in_phase("measure"), accounted(self) as account:
            updater = Updater(
                account,
                self.weights,
                recipe.loss,
                advantage_clip=recipe.advantage.clip,
                precision=recipe.train.precision,
                micro_batch=micro_batch,
                one_pass=recipe.model.streaming,
                # on the host they are not where a plan looks; those beyond the first are added below
                kept_graphs="none" if result.kept_graphs == "none" else "device",
                observer=account,
            )
            updater.accumulate(pairs, latents, self.embeddings, self.empty)
            account.finish_backward()
        if split:
            for name, held in account.held.items():
                more = round((unit - count) / count * (held - before))
                peak = self.live.peaks[name]
                parts = peak.parts | {"latents": peak.parts["latents"] + more}
                self.live.peaks[name] = Peak(peak.bytes + more, parts)
            if account.graphs > 1:
                self._keep(result, account.graph, unit / micro_batch)
        self._count(result, account, count, prompts * samples_per_prompt * timesteps)

    def _keep(self, result: Plan, graph: int, count: float) -> None:
        """The graphs of a unit's micro-batches, of so many bytes each: on the host all of them, on the device
        the others beside that of the one that goes backward."""
        if result.kept_graphs == "host":
            result.host_bytes += math.ceil(graph * count / SLAB) * SLAB
            return
        others, peak = round(graph * (count - 1)), self.live.peaks["update"]
        parts = peak.parts | {"activations": peak.parts.get("activations", 0) + others}
        self.live.peaks["update"] = Peak(peak.bytes + others, parts)

    def _count(self, result: Plan, account: ForwardAccount, count: int, pairs: int) -> None:
        """Rows and FLOPs of all pairs by those of `count`."""
        backward = self.recipe.train.backward_fraction
        # of a kind of forward's rows, where not all are run
        anchored = min(self.recipe.loss.anchor_fraction, self.recipe.loss.anchor_uncertain)
        drawn = {("reference", False): anchored, ("policy", True): backward}
        counted = dict(account.rows)
        if backward < 1:  # all are measured first, also in a group that fits
            counted["policy", False] = count
        for (branch, gradient), rows in counted.items():
            each = rows / count * drawn.get((branch, gradient), 1.0)
            result.forwards[branch] = result.forwards.get(branch, 0.0) + each
            kind = kind_of(branch, gradient)
            result.rows[kind] = result.rows.get(kind, 0.0) + each * pairs
            if gradient:
                result.rows[BACKWARD] = result.rows.get(BACKWARD, 0.0) + each * pairs
        # a group that fits is measured with gradient; what it would take without is the sampler's
        result.row_flops = {"policy": result.row_flops["sampler"]} | result.row_flops | account.row_flops
        result.streamed_bytes += self.streamed * account.passes / count * pairs

    def _step(self) -> None:
        """The optimizer. Fused or of bitsandbytes, it takes one parameter after the other, in place."""
        with self.live.in_phase("step"), self.live.in_part("workspace"), self.mode:
            if self.recipe.model.dtype == "bf16":  # float32, random bits and what is rounded of one parameter
                largest = max(parameter.numel() for parameter in self.trained)
                wide = [torch.empty(largest, dtype=d) for d in (torch.float32, torch.int32, torch.bfloat16)]
                del wide
        for parameter in self.trained:
            parameter.grad = None


def optimizer_state(name: str, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Tensors as the optimizer keeps them. AdamW: two moments like the parameter.

    bitsandbytes' 8-bit AdamW: two bytes an element and two float32 scales for 256 of them; in float32 for
    tensors with less than 4096 elements.
    """
    state = []
    for parameter in parameters:
        count = parameter.numel()
        if name == "adamw" or count < 4096:
            state += [torch.empty(count) for _ in range(2)]
        else:
            state += [torch.empty(count, dtype=torch.uint8) for _ in range(2)]
            state += [torch.empty(math.ceil(count / 256)) for _ in range(2)]
    return state
