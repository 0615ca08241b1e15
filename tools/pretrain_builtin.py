"""Pretrains the built-in model by flow matching on the synthetic world, from a seed, resumably.

    python -m tools.pretrain_builtin --output runs/pretrain            # all stages; run again to resume
    python -m tools.pretrain_builtin --output runs/pretrain --export   # write crd_fast/builtin

First the text encoder alone learns to read prompts (see `Parser`). Then the whole model learns every category
from true captions, first to draw, then, with more weight on high noise, to arrange. In the last stage a share
of the captions is exchanged for another of the same category, the way web captions make large models
unreliable: the model still knows how to follow a prompt (guidance shows it) but does so only sometimes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from crd_fast.models.builtin import WIDTH, WORLD, BuiltinModel
from crd_fast.prompts import world
from crd_fast.prompts.geneval_metadata import RELATIONS, draw_prompts
from crd_fast.rewards.world_geneval import WorldGenEval
from tools.pretraining import CAPTION_DROPOUT, Pretraining, Stage, main, sample

BATCH = 64
READ_STEPS, READ_BATCH, READ_LEARNING_RATE = 1500, 256, 1e-3
PARSE_WEIGHT = 0.03  # of the parser's loss beside the flow-matching loss


@dataclass(frozen=True)
class WorldStage(Stage):
    category_weights: tuple[float, ...] = ()  # in the order of world.TAGS, then COLORED_POSITION


COLORED_POSITION = "colored_position"
STAGES = {
    # shapes and colours
    "draw": WorldStage(1800, 1.5e-3, 0.0, 0.5, 1.0, category_weights=(1.0, 1.5, 1.5, 1.0, 2.0, 2.0, 1.0)),
    # what goes where is decided at high noise, and learned from captions that leave little open
    "arrange": WorldStage(3000, 1.5e-3, 0.6, 1.5, 1.2, category_weights=(0.5, 1.0, 1.0, 0.7, 2.5, 2.5, 2.5)),
    # captions become unreliable
    "unlearn": WorldStage(300, 3e-4, 1.0, 1.0, 1.2, 0.3, 0.99, (1.0, 1.5, 1.5, 1.0, 2.0, 2.0, 0.0)),
}


def draw_entry(rng: np.random.Generator, stage: WorldStage) -> dict:
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


def batch_at(step: int, seed: int, stage: WorldStage) -> tuple[torch.Tensor, list[dict | None]]:
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


def correctness(model: BuiltinModel, entries: list[dict], guidance_scale: float) -> dict[str, float]:
    """Share of correct images by category, `overall`, `clean`: one image a prompt, the rollout's sampler."""
    prompts = [entry["prompt"] for entry in entries]
    report = WorldGenEval().report(sample(model, prompts, guidance_scale, BATCH), prompts, entries)
    del report["per_image"]
    return report


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
            "relation": len(RELATIONS) + 1,
            "partner": len(world.SHAPES) + 1,
        }
        self.heads = torch.nn.ModuleDict({n: torch.nn.Linear(WIDTH, s) for n, s in self.sizes.items()})

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
                RELATIONS.index(own) if own else self.sizes["relation"] - 1,
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


class WorldPretraining(Pretraining):
    """With the parser's loss beside the flow's, and before it."""

    stages = STAGES

    def __init__(self, output: Path, seed: int):
        super().__init__(BuiltinModel.new(WORLD, seed), output, seed)
        self.parser = Parser()
        self.parser_optimizer = torch.optim.AdamW(self.parser.parameters(), lr=READ_LEARNING_RATE)
        self.parts |= {"parser": self.parser, "parser_optimizer": self.parser_optimizer}

    def batch_at(self, step: int, stage: WorldStage) -> tuple[torch.Tensor, list[dict | None]]:
        return batch_at(step, self.seed, stage)

    def measure(self, guidance_scale: float) -> dict[str, float]:
        entries = draw_prompts(world.prompts(True), np.random.default_rng(0), 192)
        return correctness(self.model, entries, guidance_scale)

    def side_loss(self, states: torch.Tensor, captions: list[dict | None]) -> torch.Tensor:
        loss = self.parser.loss(states, captions)
        self.track("parse_loss", loss.item())
        return PARSE_WEIGHT * loss

    def prepare(self) -> None:
        """The text encoder alone, on prompts without images."""
        optimizer = torch.optim.AdamW(self.model.text_encoder.parameters(), lr=READ_LEARNING_RATE)
        for step in range(READ_STEPS):
            rng = np.random.default_rng((self.seed, step, READ_BATCH))
            entries = [draw_entry(rng, STAGES["draw"]) for _ in range(READ_BATCH)]
            loss = self.parser.loss(self.encode(entries)["states"], entries)
            loss.backward()
            for each in (optimizer, self.parser_optimizer):
                each.step()
                each.zero_grad(set_to_none=True)
            self.track("parse_loss", loss.item())
            if (step + 1) % 250 == 0:
                print(f"read {step + 1}: parse loss {self.losses['parse_loss']:.4f}", flush=True)
        for average, parameter in zip(self.ema, self.modules.parameters()):
            average.copy_(parameter.detach())


if __name__ == "__main__":
    main(WorldPretraining, __doc__)
