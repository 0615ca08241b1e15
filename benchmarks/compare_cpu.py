"""The CRD loss by `impl="cpu"` against torch.compile and the float64-weight formulas, taking turns.

    python -m benchmarks.compare_cpu --json benchmarks/results/compare_cpu.json

Where a machine is not quiet, figures taken one provider after another say more about the neighbours than
about the providers. Here every round times each provider once; reported is the median of the rounds' ratios.
Latents of SD3.5-medium at 512 in bf16, forward and backward.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import crd_machine
from crd_providers import PROVIDERS, inputs

NAMES = ("eager_float64_weights", "torch.compile", "ours")


def rounds(count, samples, shape):
    """Seconds of each provider in each round, in turns that rotate."""
    tensors = inputs(samples, shape)

    def once(name):
        tensors["policy"].grad = None
        start = time.perf_counter()
        PROVIDERS[name](**tensors).backward()
        return time.perf_counter() - start

    for name in NAMES:
        for _ in range(5):
            once(name)
    timed = {name: [] for name in NAMES}
    for i in range(count):
        for j in range(len(NAMES)):
            name = NAMES[(i + j) % len(NAMES)]
            timed[name].append(once(name))
    return timed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {"machine": crd_machine.describe(), "rounds": options.rounds, "samples": {}}
    for samples in (8, 24):
        timed = rounds(options.rounds, samples, (16, 64, 64))
        row = {name: statistics.median(seconds) for name, seconds in timed.items()}
        for name in NAMES[:2]:
            ratios = [other / ours for other, ours in zip(timed[name], timed["ours"])]
            row[f"{name} / ours"] = statistics.median(ratios)
        result["samples"][samples] = row
        print(f"K {samples}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
