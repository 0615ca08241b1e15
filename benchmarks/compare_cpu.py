"""The five losses on the CPU, forward and backward, against torch.compile and eager formulas, taking turns.

    python -m benchmarks.compare_cpu --out benchmarks/results/compare_cpu.jsonl

bf16 latents. One case is a loss on a shape; torch.compile compiles each anew and is refused where it did not
(crd_compiled.py). Ours and one baseline at a time take turns (crd_turns.py); reported are medians, and the
median of the rounds' ratios with its quartiles, above 1 where ours is faster. `copy` moves as many bytes as
two passes over the latents must. CRD_BENCHMARK=full adds the shapes of larger models.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import crd_machine
from crd_compiled import NotCompiled
from crd_providers import LOSSES, SHAPES, Provider, WrongResult, inputs, oracle, workloads
from crd_results import Results, table
from crd_turns import CLOCKS, Spread, ratio, stopwatch, take_turns

WARM_UP = 3  # rounds


def compare(ours, other, rounds, time_of):
    """Spreads of both runs and of their ratio, after a warm-up."""
    runs = {"ours": ours, "other": other}
    take_turns(runs, WARM_UP, time_of)
    timed = take_turns(runs, rounds, time_of)
    return {
        "ours": Spread.of(timed["ours"]).as_dict(),
        "other": Spread.of(timed["other"]).as_dict(),
        "ratio": ratio(timed, "other", "ours").as_dict(),
        "rounds": rounds,
    }


def case(loss, tensors, rounds, time_of):
    """{baseline: comparison}. Every result is checked, and torch.compile, before the figures and after."""
    wanted, turns = oracle(loss, tensors), {}
    ours = Provider(loss, "ours", tensors)
    ours.check(wanted)
    for name in loss.baselines():
        other = Provider(loss, name, tensors)
        other.check(wanted)
        # what is many times slower needs no long run to say so
        count = rounds if other.compiled else max(rounds // 8, 5)
        turns[name] = compare(ours.both, other.both, count, time_of)
        other.check(wanted)
    copy = crd_machine.copy_of(loss.bytes(tensors["policy"].nbytes))
    return turns | {"copy": compare(ours.both, copy, rounds, time_of)}


def add_case(results, row, turns):
    """Writes the row of a case with what `turns()` measures; one that is refused gets the reason instead."""
    try:
        row["turns"] = turns()
        said = f"torch.compile / ours {row['turns']['torch.compile']['ratio']['median']:.2f}"
    except (WrongResult, NotCompiled) as refused:
        row["error"] = said = str(refused)
    results.add(row)
    print(f"{row['loss']}, {row['shape']}, K {row['samples']}: {said}", flush=True)


def finish(results):
    """Prints the table; the exit status is 1 if a case was refused."""
    print("\n" + table(results.about, results.rows))
    return 1 if any("error" in row for row in results.rows) else 0


def parser_of(doc, rounds):
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS")
    parser.add_argument("--out", type=Path, help="JSON lines, a case as soon as it is measured")
    return parser


def main(arguments=None):
    parser = parser_of(__doc__, rounds=200)
    clock_help = "cpu: of all threads, where others use the machine too"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=clock_help)
    options = parser.parse_args(arguments)
    about = {
        "kind": "turns",
        "what": f"forward and backward, bf16, {options.clock} clock, medians (quartiles) of rounds in turns",
        "clock": options.clock,
        "machine": crd_machine.describe(),
    }
    results, time_of = Results(options.out, about), stopwatch(CLOCKS[options.clock])
    for shape, samples in workloads(full=os.environ.get("CRD_BENCHMARK") == "full"):
        tensors = inputs(samples, SHAPES[shape])
        for name in options.losses:
            loss = LOSSES[name]
            row = {"loss": name, "shape": shape, "samples": samples}
            row["bytes"] = loss.bytes(tensors["policy"].nbytes)
            add_case(results, row, functools.partial(case, loss, tensors, options.rounds, time_of))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
