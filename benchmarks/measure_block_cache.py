"""What first-block caching would save of a rollout: `python -m benchmarks.measure_block_cache RUN`.

First-block caching (ParaAttention's; diffusers' `FirstBlockCacheConfig` fails on SD3's last block) runs the
first block of a step and leaves out the rest where the first one's residual has changed by less than a
threshold since the last whole step. Held-out pictures of the built-in model, trained by the given run, in
several numbers of steps, with and without it: their score, the share of blocks that were run, and how far
latents move where the micro-batch is another one, since the change is a mean over the micro-batch.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from crd_fast.ranks import Ranks
from crd_fast.rewards import Rewards
from crd_fast.run.machine import cpu_name, git_commit
from crd_fast.train.evaluate import Evaluation
from crd_fast.train.inference import Source, asked
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.rollout import Sampling, generate

RESULT = Path(__file__).parent / "results" / "block-cache.json"
SOLVERS = (("euler", 10), ("ab2", 10), ("ab2", 5), ("ab2", 4), ("ab2", 3))
THRESHOLDS = (None, 0.05, 0.1, 0.2, 0.4)


class Cached:
    """A model whose blocks are counted, and left out by the change of the first one's residual.

    threshold: of mean |change| / mean |residual|; None leaves out nothing.
    """

    def __init__(self, model, threshold: float | None):
        self.model, self.blocks, self.threshold = model, model.transformer.transformer_blocks, threshold
        self.run = self.steps = 0
        self.skips, self.head, self.tail = False, None, None
        for number, block in enumerate(self.blocks):
            block.forward = functools.partial(self._forward, number, type(block).forward, block)

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, embeddings: dict) -> torch.Tensor:
        self.steps += 1
        if float(sigma[0]) == 1.0:  # a trajectory begins
            self.head = self.tail = None
        return self.model.velocity(x, sigma, embeddings)

    def _forward(self, number: int, forward, block, hidden_states, encoder_hidden_states, *args, **kwargs):
        last = number == len(self.blocks) - 1
        if self.skips and number > 0:
            return encoder_hidden_states, hidden_states + self.tail if last else hidden_states
        self.run += 1
        encoded, hidden = forward(block, hidden_states, encoder_hidden_states, *args, **kwargs)
        if number == 0:
            residual = hidden - hidden_states
            self.skips = self._alike(residual)
            if not self.skips:
                self.head, self.first = residual, hidden
        if last:
            self.tail = hidden - self.first
        return encoded, hidden

    def _alike(self, residual: torch.Tensor) -> bool:
        if self.threshold is None or self.head is None:
            return False
        return bool((residual - self.head).abs().mean() < self.threshold * self.head.abs().mean())

    def share(self) -> float:
        """Of the blocks, so far, that were run."""
        return self.run / (self.steps * len(self.blocks))

    def close(self) -> None:
        for block in self.blocks:
            del block.forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run of the built-in recipe")
    arguments = parser.parse_args()
    source = asked(Source.of(arguments.run))
    model = source.load()
    rewards = Rewards(source.recipe.rewards)
    evaluation = Evaluation(model, source.recipe, rewards, MicroBatch(32), Ranks())
    own = Sampling.of(source.recipe, source.recipe.evaluate, evaluation.empty, MicroBatch(32))
    table = []
    for solver, steps in SOLVERS:
        sampling = replace(own, solver=solver, steps=steps)
        for threshold in THRESHOLDS:
            evaluation.model = cached = Cached(model, threshold)
            found = evaluation.run_with(sampling)
            blocks_run = cached.share()  # of these pictures, not of those below
            few = [
                generate(
                    cached,
                    evaluation.embeddings,
                    evaluation.prompt_index[:32],
                    evaluation.seeds[:32],
                    replace(sampling, micro_batch=MicroBatch(size)),
                )
                for size in (32, 5)
            ]
            cached.close()
            line = {
                "solver": solver,
                "steps": steps,
                "threshold": threshold,
                "overall": found.metrics["eval/overall"],
                "blocks_run": blocks_run,
                "micro_batch_deviation": float((few[0] - few[1]).abs().max()),
            }
            print(json.dumps(line), flush=True)
            table.append(line)
    result = {
        "cpu": cpu_name(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "pictures": len(evaluation),
        "arms": table,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
