"""NF4 that stays on the device, by old and the reference one after the other or as rows of one batch.

    python -m benchmarks.measure_one_pass

Where blocks are streamed, old and the reference go through the network as one batch, so that a block comes
once. A resident 4-bit weight would be widened once less as well. Measured on a small Stable Diffusion 3 in
NF4, bf16, with checkpointing: how often weights are widened in one optimizer step, CPU seconds of it, both
taking turns (crd_turns.py), and how far apart the gradients are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import torch

from benchmarks import measure_iteration
from crd_fast.config import build_recipe
from crd_fast.models import load_model
from crd_fast.run.machine import cpu_name, git_commit
from crd_fast.train.pairs import draw_pairs
from crd_fast.train.update import Updater
from crd_fast.weights.make import make_weights

sys.path.insert(0, str(Path(__file__).parent))

from crd_turns import CLOCKS, Spread, ratio, stopwatch, take_turns

RESULT = Path(__file__).parent / "results" / "one-pass.json"
PROMPTS = measure_iteration.PROMPTS


class Step:
    """One optimizer step's gradient by either order, at one micro-batch."""

    def __init__(self, pipeline: Path, micro_batch: int):
        values = measure_iteration.recipe_of(pipeline).model_dump()
        values["model"]["quantization"] = "nf4"
        values["rollout"]["steps"] = 1
        values["train"] |= {"micro_batch": micro_batch, "checkpointing": True, "precision": "bf16"}
        values["train"]["kept_graphs"] = "device"
        self.recipe = recipe = build_recipe(values)
        self.model, random = load_model(recipe, PROMPTS), torch.Generator().manual_seed(1)
        self.weights: Any = make_weights(self.model, recipe)
        state = self.weights.state()
        self.weights.load_state({k: 0.05 * torch.randn(v.shape, generator=random) for k, v in state.items()})
        size, samples = recipe.rollout.resolution, recipe.rollout.samples_per_prompt
        shape = self.model.latent_shape(size)
        self.latents = torch.randn(len(PROMPTS) * samples, *shape, generator=random)
        advantage = torch.randn(len(PROMPTS), samples, generator=random).numpy()
        prompts, sigmas = np.arange(len(PROMPTS)), self.model.sigmas(1, size)
        strength = np.ones_like(advantage)
        self.pairs = draw_pairs(
            recipe, 0, sigmas, prompts, advantage_PK=advantage, anchor_strength_PK=strength
        )
        self.embeddings, self.empty = self.model.encode_prompts(PROMPTS), self.model.encode_prompts([""])

    def gradient(self, one_pass: bool) -> torch.Tensor:
        recipe = self.recipe
        updater = Updater(
            self.model,
            self.weights,
            recipe.loss,
            advantage_clip=recipe.advantage.clip,
            precision="bf16",
            micro_batch=recipe.train.micro_batch,
            kept_graphs=recipe.train.kept_graphs,
            one_pass=one_pass,
        )
        updater.accumulate(self.pairs, self.latents, self.embeddings, self.empty)
        found = torch.cat([parameter.grad.flatten() for parameter in self.weights.trained()])
        for parameter in self.weights.trained():
            parameter.grad = None
        return found

    def widened(self, one_pass: bool) -> int:
        """How often a 4-bit weight is used, each time widened: forward products and backward ones."""
        used = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal used
                used += 1
                return function(*args, **kwargs)

            return call

        backward = counted(bnb.functional.dequantize_4bit)
        with (
            mock.patch.object(bnb, "matmul_4bit", counted(bnb.matmul_4bit)),
            mock.patch.object(bnb.functional, "dequantize_4bit", backward),
        ):
            self.gradient(one_pass)
        return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8], metavar="B")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        measure_iteration.pipeline(Path(folder) / "sd3")
        for micro_batch in options.micro_batches:
            step = Step(Path(folder) / "sd3", micro_batch)
            one, other = step.gradient(True), step.gradient(False)
            runs = {
                "one_pass": lambda s=step: s.gradient(True),
                "one_by_one": lambda s=step: s.gradient(False),
            }
            timed = take_turns(runs, options.rounds, stopwatch(CLOCKS["cpu"]))
            cases.append(
                {
                    "micro_batch": micro_batch,
                    "pairs": len(step.pairs),
                    "widened": {"one_pass": step.widened(True), "one_by_one": step.widened(False)},
                    "gradient_difference": float((one - other).norm() / other.norm()),
                    "cpu_seconds": timed,
                    "median": {name: Spread.of(seconds).median for name, seconds in timed.items()},
                    "one_pass_over_one_by_one": ratio(timed, "one_pass", "one_by_one").as_dict(),
                }
            )
            print(json.dumps(cases[-1]), flush=True)
    result = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "cases": cases,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
