"""The five losses on a GPU, forward and backward, against torch.compile of the lean formulas, taking turns.

    python -m benchmarks.compare_gpu --out gpu.jsonl              every shape, the headline cases first
    python -m benchmarks.compare_gpu --out gpu.jsonl --headline   24 latents of 16x64x64 alone
    python -m benchmarks.crd_results gpu.jsonl                    the table, of a stopped run too

bf16 latents, CUDA events; crd_gpu_timer.py says what cold, hot and graph are. The fraction is of a copy that
moves the same bytes, timed cold as well. A case is written as soon as it is measured. Exit status 1 where a
provider was refused or ours could not be captured.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import crd_machine
from crd_gpu_timer import CudaTimer
from crd_providers import LOSSES, SHAPES, Provider, inputs, oracle, workloads
from crd_results import Results, table
from crd_turns import Spread, ratio, take_turns

PROVIDERS = ("ours", "torch.compile")
HEADLINE = ("SD3.5-medium 512", 24)
ROUNDS, WARM_UP = 50, 5


def plan(headline_only, without_headline):
    """(loss, shape, samples) in the order they are measured."""
    others = [size for size in workloads(full=True) if size != HEADLINE]
    sizes = ([] if without_headline else [HEADLINE]) + ([] if headline_only else others)
    return [(loss, *size) for size in sizes for loss in LOSSES]


def refusal(error):
    """One line for the table: a message, not a trace."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def measure(loss, tensors, timer, device, names=PROVIDERS, rounds=ROUNDS):
    """Everything about one case: a row of the results.

    A provider that fails, for whatever reason, keeps its line with the reason; the others are measured.
    """
    nbytes = loss.bytes(tensors["policy"].nbytes)
    wanted, providers = oracle(loss, tensors), {}
    row = {"bytes": nbytes, "providers": {}, "ratio": {}}

    def check(name, provider):
        """Whether it computes what it should, and compiled; else its line holds the reason and no figure."""
        try:
            provider.check(wanted)
            return True
        except Exception as error:
            row["providers"][name], row["ratio"] = {"error": refusal(error)}, {}
            return False

    for name in names:
        provider = Provider(loss, name, tensors)
        if check(name, provider):
            extra = crd_machine.peak_extra_bytes(provider.both, device)
            row["providers"][name] = {"peak_extra_bytes": extra}
            providers[name] = provider

    for mode, time_of in (("cold", timer.cold), ("hot", timer.hot)):
        _record(row, mode, {name: provider.both for name, provider in providers.items()}, time_of, rounds)
    providers = {name: provider for name, provider in providers.items() if check(name, provider)}

    replays = {}
    for name, provider in providers.items():
        try:
            replays[name] = timer.captured(provider.both)
        except RuntimeError as error:
            row["providers"][name]["graph_error"] = refusal(error)
    for mode, time_of in (("graph_cold", timer.cold), ("graph_hot", timer.hot)):
        _record(row, mode, replays, time_of, rounds)

    copy = {"copy": crd_machine.copy_of(nbytes, device)}
    take_turns(copy, WARM_UP, timer.cold)
    row["copy_cold"] = Spread.of(take_turns(copy, rounds, timer.cold)["copy"]).as_dict()
    for name in providers:
        got = row["providers"][name]
        got["fraction_of_copy"] = {
            mode: row["copy_cold"]["median"] / got[mode]["median"]
            for mode in ("cold", "graph_cold")
            if mode in got
        }
    return row


def _record(row, mode, runs, time_of, rounds):
    """Spreads of one way of timing, and the ratio where both providers are there."""
    if not runs:
        return
    take_turns(runs, WARM_UP, time_of)
    timed = take_turns(runs, rounds, time_of)
    for name, seconds in timed.items():
        row["providers"][name][mode] = Spread.of(seconds).as_dict()
    for other in [name for name in timed if name != "ours" and "ours" in timed]:
        row["ratio"][mode] = ratio(timed, other, "ours").as_dict()


def failed(row):
    return any(
        "error" in got or (name == "ours" and "graph_error" in got) for name, got in row["providers"].items()
    )


def run(cases, results, timer, device, limit=float("inf"), shapes=SHAPES, **keywords):
    """Measures and writes case by case; begins none after `limit` seconds. Returns those not reached."""
    start = time.monotonic()
    for index, (name, shape, samples) in enumerate(cases):
        if time.monotonic() - start >= limit:
            return cases[index:]
        loss, row = LOSSES[name], {"loss": name, "shape": shape, "samples": samples}
        try:
            row |= measure(loss, inputs(samples, shapes[shape], device=device), timer, device, **keywords)
        except Exception as error:  # out of memory on a small card, for one
            row |= {"providers": {"ours": {"error": refusal(error)}}}
        results.add(row)
        print(f"{name}, {shape}, K {samples}: {'failed' if failed(row) else 'measured'}", flush=True)
    return []


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines, a case as soon as it is measured"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--headline", action="store_true", help="the headline cases alone")
    which.add_argument("--without-headline", action="store_true", help="all others")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after these")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("compare_gpu: expected a CUDA or ROCm device, found none", file=sys.stderr)
        return 2
    about = {
        "kind": "gpu",
        "what": "forward and backward, bf16, CUDA events, medians of rounds in turns",
        "machine": crd_machine.describe("cuda"),
    }
    results = Results(options.out, about)
    cases = plan(options.headline, options.without_headline)
    left = run(cases, results, CudaTimer(), "cuda", options.seconds)
    print("\n" + table(about, results.rows))
    for case in left:
        print("not reached:", *case)
    return 1 if any(map(failed, results.rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
