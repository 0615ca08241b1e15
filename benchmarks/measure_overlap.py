"""Scoring beside the rollout: `python -m benchmarks.measure_overlap`.

Trains the built-in model with a reward that takes as long as the rollout (it sleeps, as one that waits for a
server or another device does) and compares rollout and reward together with the longer of the two. Every
other iteration has no reward to wait for: that is the rollout alone, on the same machine at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from crd_fast.config import load_recipe
from crd_fast.run.machine import cpu_name, git_commit
from crd_fast.train.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "reward_overlap.json"
PROMPTS, SAMPLES = 12, 8
pause = 0.0  # seconds a call of one prompt's samples


def sleeping(images, prompts, metadata):
    time.sleep(pause)
    return [float(image.mean()) for image in images]


def main() -> None:
    global pause
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="iterations with and without a slow reward")
    parser.add_argument("--micro-batch", type=int, default=SAMPLES)
    arguments = parser.parse_args()
    overrides = [
        f"rollout.prompts_per_iteration={PROMPTS}",
        f"rollout.samples_per_prompt={SAMPLES}",
        f"rollout.micro_batch={arguments.micro_batch}",
        "train.timesteps=1",
        "evaluate.every=0",
        f"train.iterations={2 * arguments.pairs + 1}",
    ]
    recipe = load_recipe("builtin", overrides)
    alone, both, rewards = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, Path(folder), rewards={sleeping: 1.0})
        trainer.iterate()  # warms up
        for _ in range(arguments.pairs):
            pause = 0.0
            alone.append(trainer.iterate()["seconds_rollout"])
            pause = alone[-1] / PROMPTS
            record = trainer.iterate()
            both.append(record["seconds_rollout"] + record["seconds_reward"])
            rewards.append(pause * PROMPTS)
    ratios = [together / max(pair) for together, *pair in zip(both, alone, rewards)]
    result = {
        "cpu": cpu_name(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0],  # of the machine, other work included
        "images": PROMPTS * SAMPLES,
        "micro_batch": arguments.micro_batch,
        "seconds_rollout_alone": alone,
        "seconds_reward_alone": rewards,
        "seconds_together": both,
        "ratio_to_the_longer": ratios,
        "median_ratio": statistics.median(ratios),
        "median_ratio_one_after_the_other": statistics.median(
            (a + r) / max(a, r) for a, r in zip(alone, rewards)
        ),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
