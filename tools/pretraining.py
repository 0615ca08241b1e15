"""What the pretraining of the built-in models shares: stages of flow matching, resumable, from a seed."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crd_fast.models.builtin import BuiltinModel, encode
from crd_fast.seeds import seed_table
from crd_fast.train.evaluate import to_uint8
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.rollout import Sampling, generate

WARMUP_STEPS = 200
CAPTION_DROPOUT = 0.1
SAMPLE_STEPS = 10
GUIDANCE = (1.0, 4.5)


@dataclass(frozen=True)
class Stage:
    """A stretch of training. sigma = sigmoid(N(sigma_mean, sigma_std)); the learning rate is constant, then
    falls linearly over the last `decay_share` of the stage. caption_noise: the share of wrong captions."""

    steps: int
    learning_rate: float
    decay_share: float
    sigma_mean: float
    sigma_std: float
    caption_noise: float = 0.0
    ema_decay: float = 0.999

    def learning_rate_at(self, step: int) -> float:
        left = 1 - step / self.steps
        return self.learning_rate * (min(1.0, left / self.decay_share) if self.decay_share else 1.0)


def flow_matching_loss(model, images, embeddings, stage: Stage, generator) -> torch.Tensor:
    """Mean squared error of the velocity."""
    noise = torch.randn(images.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(len(images), generator=generator) * stage.sigma_std + stage.sigma_mean)
    x = torch.lerp(images, noise, sigma.view(-1, 1, 1, 1))
    return (model.velocity(x, sigma, embeddings) - (noise - images)).square().mean()


def sample(model: BuiltinModel, prompts: list[str], guidance_scale: float, batch: int) -> np.ndarray:
    """One image a prompt with the rollout's sampler, uint8 (N, height, width, 3)."""
    latents = generate(
        model,
        model.encode_prompts(prompts),
        torch.arange(len(prompts)),
        seed_table(0, count=len(prompts)),
        Sampling(
            model.kind.height,
            SAMPLE_STEPS,
            guidance_scale,
            "fp32",
            model.encode_prompts([""]),
            MicroBatch(batch // 2 if guidance_scale > 1 else batch),  # one shape for torch.compile
        ),
    )
    return to_uint8(model.decode(latents))


class Pretraining:
    """Model, averaged weights and optimizer, and where in which stage they are.

    A task gives `batch_at` and `measure`, and may add a loss on the text encoder's states.
    """

    stages: dict[str, Stage]

    def __init__(self, model: BuiltinModel, output: Path, seed: int):
        self.model, self.output, self.seed = model, output, seed
        self.modules = torch.nn.ModuleList([self.model.transformer, self.model.text_encoder])
        self.ema = [p.detach().clone() for p in self.modules.parameters()]
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        self.parts = {"modules": self.modules, "optimizer": self.optimizer}  # what a checkpoint holds
        self.step = 0
        self.losses: dict[str, float] = {}

    def batch_at(self, step: int, stage: Stage) -> tuple[torch.Tensor, list[dict | None]]:
        """Images (B, 3, height, width) in [-1, 1] and the prompts they are captioned with, None for a dropped
        caption: a function of the seed and the step alone."""
        raise NotImplementedError

    def measure(self, guidance_scale: float):
        """How good held-out pictures are."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What comes before the first step."""

    def side_loss(self, states: torch.Tensor, captions: list[dict | None]) -> torch.Tensor | float:
        """Added to the flow's loss. states: the text encoder's, (B, max_tokens, 128)."""
        return 0.0

    def encode(self, captions: list[dict | None]) -> dict[str, torch.Tensor]:
        prompts = ["" if entry is None else entry["prompt"] for entry in captions]
        return encode(self.model.kind, self.model.tokenizer, self.model.text_encoder, prompts)

    def run(self, limit: int | None = None) -> None:
        if self.step == 0:
            self.prepare()
        self.model.transformer.compile()
        first = 0
        for name, stage in self.stages.items():
            for step in range(max(first, self.step), first + stage.steps):
                self._train_step(step, stage, stage.learning_rate_at(step - first))
                self.step = step + 1
                if self.step % 100 == 0:
                    self._log(name)
                if self.step % 200 == 0:
                    self.save()
                if limit is not None and self.step >= limit:
                    return
            first += stage.steps
            if self.step == first:
                self.save(f"{name}.pt")

    def _train_step(self, step: int, stage: Stage, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        images, captions = self.batch_at(step, stage)
        embeddings = self.encode(captions)
        loss = flow_matching_loss(self.model, images, embeddings, stage, generator)
        (loss + self.side_loss(embeddings["states"], captions)).backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for part in self.parts.values():
            if isinstance(part, torch.optim.Optimizer):
                part.step()
                part.zero_grad(set_to_none=True)
        weight = max(1 - stage.ema_decay, 1 / (step + 1) ** 0.8)
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.modules.parameters()], weight)
        self.track("loss", loss.item())

    def track(self, name: str, value: float) -> None:
        self.losses[name] = 0.98 * self.losses.get(name, value) + 0.02 * value

    def _log(self, stage: str) -> None:
        rounded = {name: round(value, 5) for name, value in self.losses.items()}
        record = {"step": self.step, "stage": stage, **rounded, "time": round(time.time(), 1)}
        if self.step % 500 == 0:
            with self.averaged():
                for scale in GUIDANCE:
                    record[f"guidance_{scale}"] = self.measure(scale)
        with open(self.output / "curve.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def averaged(self):
        """Within this context the model holds the averaged weights."""
        return _Swapped(list(self.modules.parameters()), self.ema)

    def save(self, name: str = "last.pt") -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "losses": self.losses, "ema": self.ema}
        torch.save(state, self.output / "partial.pt")
        (self.output / "partial.pt").replace(self.output / name)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step, self.losses, self.ema = state["step"], state["losses"], state["ema"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class _Swapped:
    def __init__(self, parameters, others):
        self.parameters, self.others = parameters, others

    def __enter__(self):
        for parameter, other in zip(self.parameters, self.others):
            parameter.data, other.data = other.data, parameter.data

    def __exit__(self, *_):
        self.__enter__()


def main(task: type[Pretraining], description: str) -> None:
    """The command line of a task's script. task: takes the output folder and the seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="stop after this many steps in all")
    parser.add_argument("--export", action="store_true", help="write the averaged weights into the package")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pretraining = task(options.output, options.seed)
    if (options.output / "last.pt").exists():
        pretraining.load(options.output / "last.pt")
    pretraining.run(options.limit)
    if options.export:
        with pretraining.averaged():
            pretraining.model.save(pretraining.model.kind.folder)
