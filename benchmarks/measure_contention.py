"""What a neighbour on the same cores costs: `python -m benchmarks.measure_contention`.

Trains the built-in recipe for a few iterations in a process of its own, by OpenMP's default policy, by
OMP_WAIT_POLICY=PASSIVE without any spinning, and by what the package sets; each alone and beside a neighbour
that multiplies matrices with two threads of torch. The six take turns, so that other work meets all
alike. Seconds are those of whole iterations after the first. With `--set` it is another recipe, and
nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from crd_fast.run.machine import cpu_name, git_commit

RESULT = Path(__file__).parent / "results" / "contention.json"
THREADS = 2
POLICIES = {
    "default": {"GOMP_SPINCOUNT": "300000"},  # libgomp's own count, as the package would set another one
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "package": {},
}
ITERATIONS = """
import sys, tempfile, time
from pathlib import Path
from crd_fast.config import load_recipe
from crd_fast.train.trainer import Trainer

recipe = load_recipe("builtin", ["evaluate.every=0", f"train.iterations={sys.argv[1]}", *sys.argv[2:]])
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(recipe, Path(folder))
    for _ in range(int(sys.argv[1])):
        started = time.perf_counter()
        trainer.iterate()
        print(time.perf_counter() - started, flush=True)
"""
NEIGHBOUR = """
import os
import torch
parent, x = os.getppid(), torch.randn(768, 768)
print("at work", flush=True)
while os.getppid() == parent:
    torch.relu(x @ x)
"""


def environment(policy: str) -> dict[str, str]:
    """This one's with another policy, and as many threads for each."""
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    plain = {name: value for name, value in os.environ.items() if name not in own}
    return plain | POLICIES[policy] | {"OMP_NUM_THREADS": str(THREADS)}


@contextmanager
def neighbour(busy: bool):
    """A process that keeps two threads of torch busy, by the default policy."""
    if not busy:
        yield
        return
    command = [sys.executable, "-c", NEIGHBOUR]
    with subprocess.Popen(command, env=environment("default"), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def seconds(policy: str, iterations: int, overrides: list[str]) -> list[float]:
    """Of each iteration but the first."""
    command = [sys.executable, "-c", ITERATIONS, str(iterations + 1), *overrides]
    done = subprocess.run(command, env=environment(policy), capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    arguments = parser.parse_args()
    cases = [(policy, busy) for busy in (False, True) for policy in POLICIES]
    taken: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
    load = os.getloadavg()[0]
    for turn in range(arguments.turns):
        for policy, busy in cases if turn % 2 == 0 else reversed(cases):
            with neighbour(busy):
                taken[policy, busy] += seconds(policy, arguments.iterations, arguments.set)
    median = {case: statistics.median(values) for case, values in taken.items()}
    result = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": load,  # of other work on the machine
        "threads": THREADS,
        "seconds_an_iteration": {
            policy: {
                "alone": taken[policy, False],
                "beside_a_neighbour": taken[policy, True],
                "median_alone": median[policy, False],
                "median_beside_a_neighbour": median[policy, True],
                "ratio": median[policy, True] / median[policy, False],
            }
            for policy in POLICIES
        },
    }
    if not arguments.set:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
