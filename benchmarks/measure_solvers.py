"""What each solver makes of trained weights: `python -m benchmarks.measure_solvers CHECKPOINT...`.

Held-out pictures of the built-in model by checkpoints of its runs, of one run after different numbers of
iterations for example, by either solver in several numbers of steps: the share that is right by GenEval's
rules.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from crd_fast.ranks import Ranks
from crd_fast.rewards import Rewards
from crd_fast.run.machine import cpu_name, git_commit
from crd_fast.train.evaluate import Evaluation
from crd_fast.train.inference import Source, asked
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.rollout import Sampling

RESULT = Path(__file__).parent / "results" / "solvers.json"
SOLVERS = (("euler", 20), ("euler", 10), ("ab2", 10), ("euler", 5), ("ab2", 5))
PROMPTS = 192


def measured(checkpoint: str) -> list[dict]:
    source = asked(Source.of(checkpoint), rewards={"geneval": 1.0}, max_prompts=PROMPTS, samples_per_prompt=1)
    evaluation = Evaluation(
        source.load(), source.recipe, Rewards(source.recipe.rewards), MicroBatch(32), Ranks()
    )
    own = Sampling.of(source.recipe, source.recipe.evaluate, evaluation.empty, MicroBatch(32))
    table = []
    for solver, steps in SOLVERS:
        found = evaluation.run_with(replace(own, solver=solver, steps=steps))
        line = {"solver": solver, "steps": steps, "overall": found.metrics["eval/overall"]}
        print(Path(checkpoint).name, json.dumps(line), flush=True)
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint's folder")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    names = [Path(name).name for name in arguments.checkpoints]
    if len(set(names)) < len(names):
        parser.error(f"expected checkpoints of different names, got {names}")
    result = {
        "cpu": cpu_name(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "pictures": PROMPTS,
        "checkpoints": {Path(name).name: measured(name) for name in arguments.checkpoints},
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
