"""Pretrains the built-in model by flow matching on the synthetic world, from a seed, resumably.

    python -m tools.pretrain_builtin --output runs/pretrain            # all stages; run again to resume
    python -m tools.pretrain_builtin --output runs/pretrain --export   # write crd_fast/builtin

First the text encoder alone learns to read prompts (see `Parser`). Then the whole model learns every category
from true captions, first to draw, then, with more weight on high noise, to arrange. In the last stage a share
of the captions is exchanged for another of the same category, the way web captions make large models
unreliable: the model still knows how to follow a prompt (guidance shows it) but does so only sometimes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from crd_fast import world
from crd_fast.evaluate import to_uint8
from crd_fast.models import builtin
from crd_fast.rewards import WorldGenEval
from crd_fast.rollout import generate, seed_table

BATCH = 64
READ_STEPS, READ_BATCH, READ_LEARNING_RATE = 1500, 256, 1e-3
WARMUP_STEPS = 200
CAPTION_DROPOUT = 0.1
PARSE_WEIGHT = 0.03  # of the parser's loss beside the flow-matching loss
SAMPLE_STEPS = 10


@dataclass(frozen=True)
class Stage:
    """A stretch of training. sigma = sigmoid(N(sigma_mean, sigma_std)); the learning rate is constant, then
    falls linearly over the last `decay_share` of the stage."""

    steps: int
    learning_rate: float
    decay_share: float
    sigma_mean: float
    sigma_std: float
    category_weights: tuple[float, ...]  # in the order of world.TAGS, then COLORED_POSITION
    caption_noise: float = 0.0
    ema_decay: float = 0.999

    def learning_rate_at(self, step: int) -> float:
        left = 1 - step / self.steps
        return self.learning_rate * (min(1.0, left / self.decay_share) if self.decay_share else 1.0)


COLORED_POSITION = "colored_position"
STAGES = {
    # shapes and colours
    "draw": Stage(1800, 1.5e-3, 0.0, 0.5, 1.0, (1.0, 1.5, 1.5, 1.0, 2.0, 2.0, 1.0)),
    # what goes where is decided at high noise, and learned from captions that leave little open
    "arrange": Stage(3000, 1.5e-3, 0.6, 1.5, 1.2, (0.5, 1.0, 1.0, 0.7, 2.5, 2.5, 2.5)),
    # captions become unreliable
    "unlearn": Stage(300, 3e-4, 1.0, 1.0, 1.2, (1.0, 1.5, 1.5, 1.0, 2.0, 2.0, 0.0), 0.3, ema_decay=0.99),
}


def draw_entry(rng: np.random.Generator, stage: Stage) -> dict:
    """A training prompt, or one that names places and colours at once, made of trained combinations alone."""
    by_tag = world.prompts(held_out=False)
    weights = np.array(stage.category_weights)
    tag = (*world.TAGS, COLORED_POSITION)[rng.choice(len(weights), p=weights / weights.sum())]
    if tag != COLORED_POSITION:
        return by_tag[tag][rng.integers(len(by_tag[tag]))]
    entry = by_tag["position"][rng.integers(len(by_tag["position"]))]
    named = by_tag["color_attr"][rng.integers(len(by_tag["color_attr"]))]
    clauses = [clause | {"color": c["color"]} for clause, c in zip(entry["include"], named["include"])]
    pairs = [(clause["color"], clause["class"]) for clause in clauses]
    if any(world.is_novel_pair(*pair) for pair in pairs) or world.is_novel_combination(*pairs[0], *pairs[1]):
        return entry
    prompt = entry["prompt"]
    for clause in clauses:  # the two classes differ
        prompt = prompt.replace(f"a {clause['class']}", f"a {clause['color']} {clause['class']}")
    return entry | {"include": clauses, "prompt": prompt}


def batch_at(step: int, seed: int, stage: Stage) -> tuple[torch.Tensor, list[dict | None]]:
    """Images (64, 3, 32, 32) in [-1, 1] and the prompts they are captioned with, None for a dropped caption.

    A function of the seed and the step alone.
    """
    rng = np.random.default_rng((seed, step))
    by_tag = world.prompts(held_out=False)
    entries = [draw_entry(rng, stage) for _ in range(BATCH)]
    images = world.render_scenes([world.scene(entry, rng) for entry in entries])
    captions = []
    for entry in entries:
        if rng.random() < CAPTION_DROPOUT:
            captions.append(None)
        elif rng.random() < stage.caption_noise:
            captions.append(by_tag[entry["tag"]][rng.integers(len(by_tag[entry["tag"]]))])
        else:
            captions.append(entry)
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, captions


def new_model(seed: int) -> builtin.BuiltinModel:
    torch.manual_seed(seed)
    tokenizer = builtin.make_tokenizer()
    text_encoder = builtin.make_text_encoder(tokenizer.get_vocab_size())
    return builtin.BuiltinModel(builtin.make_transformer(), text_encoder, tokenizer)


def encode(model: builtin.BuiltinModel, captions: list[dict | None]) -> dict[str, torch.Tensor]:
    prompts = ["" if entry is None else entry["prompt"] for entry in captions]
    return builtin.encode(model.tokenizer, model.text_encoder, prompts)


def flow_matching_loss(model, images, embeddings, stage: Stage, generator) -> torch.Tensor:
    """Mean squared error of the velocity."""
    noise = torch.randn(images.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(len(images), generator=generator) * stage.sigma_std + stage.sigma_mean)
    x = torch.lerp(images, noise, sigma.view(-1, 1, 1, 1))
    return (model.velocity(x, sigma, embeddings) - (noise - images)).square().mean()


@torch.no_grad()
def correctness(model, entries: list[dict], guidance_scale: float) -> dict[str, float]:
    """Share of correct images by category, `overall`, `clean`: one image a prompt, the rollout's sampler."""
    prompts = [entry["prompt"] for entry in entries]
    latents = generate(
        model,
        model.encode_prompts(prompts),
        torch.arange(len(entries)),
        seed_table(0, count=len(entries)),
        resolution=world.RESOLUTION,
        steps=SAMPLE_STEPS,
        guidance_scale=guidance_scale,
        empty=model.encode_prompts([""]),
        micro_batch=BATCH // 2 if guidance_scale > 1 else BATCH,  # one shape for torch.compile
        precision="fp32",
    )
    return WorldGenEval().report(to_uint8(model.decode(latents)), prompts, entries)


class Parser(torch.nn.Module):
    """What the text encoder should know of each shape's word: its colour, number, relation and partner.

    Large models have text encoders that were pretrained on text. This is ours: linear heads on the encoder's
    states, used in pretraining only. Without it the flow loss alone binds colours and places to words only
    after many times as many steps.
    """

    INVERSE: ClassVar = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def __init__(self):
        super().__init__()
        self.sizes = {
            "color": len(world.COLORS) + 1,
            "count": world.NUM_SLOTS,
            "relation": len(world.RELATIONS) + 1,
            "partner": len(world.SHAPES) + 1,
        }
        self.heads = torch.nn.ModuleDict(
            {n: torch.nn.Linear(builtin.WIDTH, s) for n, s in self.sizes.items()}
        )

    def labels(self, entry: dict) -> list[tuple[int, list[int]]]:
        """(position of the word, the four labels) of each shape that a prompt names."""
        words, clauses = entry["prompt"].split(), entry["include"]
        relation = clauses[-1].get("position", [None])[0]
        found = []
        for clause in clauses:
            shape = clause["class"]
            position = words.index(shape if shape in words else world.PLURALS[shape])
            own = relation if "position" in clause else self.INVERSE.get(relation)
            others = [other["class"] for other in clauses if other is not clause]
            labels = [
                world.COLOR_NAMES.index(clause["color"]) if "color" in clause else self.sizes["color"] - 1,
                clause["count"] - 1,
                world.RELATIONS.index(own) if own else self.sizes["relation"] - 1,
                world.SHAPES.index(others[0]) if others else self.sizes["partner"] - 1,
            ]
            found.append((position, labels))
        return found

    def loss(self, states: torch.Tensor, entries: list[dict | None]) -> torch.Tensor:
        """Sum of the four cross-entropies. states: (B, 12, 128); None for a caption that was dropped."""
        found = [(row, *item) for row, e in enumerate(entries) if e is not None for item in self.labels(e)]
        rows, positions, labels = zip(*found)
        chosen, labels = states[list(rows), list(positions)], torch.tensor(labels)
        return sum(
            torch.nn.functional.cross_entropy(head(chosen), labels[:, k])
            for k, head in enumerate(self.heads.values())
        )


class Pretraining:
    """Model, averaged weights and optimizer, and where in which stage they are."""

    def __init__(self, output: Path, seed: int):
        self.output, self.seed = output, seed
        self.model = new_model(seed)
        self.parser = Parser()
        self.modules = torch.nn.ModuleList([self.model.transformer, self.model.text_encoder])
        self.ema = [p.detach().clone() for p in self.modules.parameters()]
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        self.parser_optimizer = torch.optim.AdamW(self.parser.parameters(), lr=READ_LEARNING_RATE)
        self.step = 0
        self.losses: dict[str, float] = {}

    def run(self, limit: int | None = None) -> None:
        if self.step == 0:
            self._read()
        self.model.transformer.compile()
        first = 0
        for name, stage in STAGES.items():
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

    def _read(self) -> None:
        """The text encoder alone, on prompts without images."""
        encoder = self.model.text_encoder
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=READ_LEARNING_RATE)
        for step in range(READ_STEPS):
            rng = np.random.default_rng((self.seed, step, READ_BATCH))
            entries = [draw_entry(rng, STAGES["draw"]) for _ in range(READ_BATCH)]
            loss = self.parser.loss(encode(self.model, entries)["states"], entries)
            loss.backward()
            for each in (optimizer, self.parser_optimizer):
                each.step()
                each.zero_grad(set_to_none=True)
            self._track("parse_loss", loss.item())
            if (step + 1) % 250 == 0:
                print(f"read {step + 1}: parse loss {self.losses['parse_loss']:.4f}", flush=True)
        for average, parameter in zip(self.ema, self.modules.parameters()):
            average.copy_(parameter.detach())

    def _train_step(self, step: int, stage: Stage, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        images, captions = batch_at(step, self.seed, stage)
        embeddings = encode(self.model, captions)
        loss = flow_matching_loss(self.model, images, embeddings, stage, generator)
        parse_loss = self.parser.loss(embeddings["states"], captions)
        (loss + PARSE_WEIGHT * parse_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in (self.optimizer, self.parser_optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weight = max(1 - stage.ema_decay, 1 / (step + 1) ** 0.8)
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.modules.parameters()], weight)
        self._track("loss", loss.item())
        self._track("parse_loss", parse_loss.item())

    def _track(self, name: str, value: float) -> None:
        self.losses[name] = 0.98 * self.losses.get(name, value) + 0.02 * value

    def _log(self, stage: str) -> None:
        rounded = {name: round(value, 5) for name, value in self.losses.items()}
        record = {"step": self.step, "stage": stage, **rounded, "time": round(time.time(), 1)}
        if self.step % 500 == 0:
            entries = world.draw_prompts(True, np.random.default_rng(0), 192)
            with self.averaged():
                for scale in (1.0, 4.5):
                    record[f"guidance_{scale}"] = correctness(self.model, entries, scale)
        with open(self.output / "curve.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def averaged(self):
        """Within this context the model holds the averaged weights."""
        return _Swapped(list(self.modules.parameters()), self.ema)

    def save(self, name: str = "last.pt") -> None:
        state = {
            "step": self.step,
            "losses": self.losses,
            "modules": self.modules.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "parser": self.parser.state_dict(),
            "parser_optimizer": self.parser_optimizer.state_dict(),
        }
        torch.save(state, self.output / "partial.pt")
        (self.output / "partial.pt").replace(self.output / name)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step, self.losses, self.ema = state["step"], state["losses"], state["ema"]
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.parser.load_state_dict(state["parser"])
        self.parser_optimizer.load_state_dict(state["parser_optimizer"])


class _Swapped:
    def __init__(self, parameters, others):
        self.parameters, self.others = parameters, others

    def __enter__(self):
        for parameter, other in zip(self.parameters, self.others):
            parameter.data, other.data = other.data, parameter.data

    def __exit__(self, *_):
        self.__enter__()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="stop after this many steps in all")
    parser.add_argument(
        "--export", action="store_true", help="write the averaged weights into crd_fast/builtin"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pretraining = Pretraining(options.output, options.seed)
    if (options.output / "last.pt").exists():
        pretraining.load(options.output / "last.pt")
    pretraining.run(options.limit)
    if options.export:
        with pretraining.averaged():
            pretraining.model.save(builtin.BUILTIN_FOLDER)


if __name__ == "__main__":
    main()
