"""Host time of one call, forward and backward, against torch.compile of the lean formula, taking turns.

    python -m benchmarks.host_time --out benchmarks/results/host_time.jsonl

Tiny tensors, so that what a call costs on the host is all it costs; time of the process on the CPU, on one
thread. Above 1 ours is faster.
"""

import contextlib
import functools
import sys
from pathlib import Path
from unittest import mock

import torch
from crd_kernels import dispatch, launch, passes
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))

import crd_machine
from compare_cpu import add_case, compare, finish, parser_of
from crd_providers import LOSSES, Provider, inputs, oracle
from crd_results import Results
from crd_turns import CLOCKS, stopwatch

SAMPLES, SHAPE = 8, (4, 4, 4)
CALLS = 20  # in one turn
PATH = 'impl="triton", launches left out'  # which of our paths `ours` is, for the table


def ours(loss, tensors):
    """The call that is timed as ours. What it computes is checked on the CPU: launches are left out."""
    Provider(loss, "ours", tensors, impl="cpu").check(oracle(loss, tensors))
    return Provider(loss, "ours", tensors, impl="triton").both


@contextlib.contextmanager
def no_launches():
    """The way to a GPU on this machine's tensors, up to the launch itself, which returns at once."""

    class Handle:
        def __getitem__(self, grid):
            return lambda *arguments: None

    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(mock.patch.object(JITFunction, "run", lambda self, *args, **options: Handle()))
        put(mock.patch.object(launch, "target", lambda: None))
        put(mock.patch.object(dispatch, "choose", lambda impl, device: impl))
        put(mock.patch.object(passes, "_PASSES", {}))
        yield


def case(loss, tensors, rounds):
    wanted, run = oracle(loss, tensors), ours(loss, tensors)
    compiled = Provider(loss, "torch.compile", tensors)
    compiled.check(wanted)
    with no_launches():
        turns = compare(run, compiled.both, rounds, stopwatch(CLOCKS["cpu"], CALLS))
    compiled.check(wanted)
    return {"torch.compile": turns}


def main(arguments=None):
    options = parser_of(__doc__, rounds=200).parse_args(arguments)
    torch.set_num_threads(1)
    shape = "x".join(map(str, SHAPE))
    what = (
        f"host time of a call, {PATH}, {SAMPLES} latents of {shape}, CPU clock, medians (quartiles) in turns"
    )
    about = {"kind": "turns", "what": what, "clock": "cpu", "machine": crd_machine.describe()}
    results, tensors = Results(options.out, about), inputs(SAMPLES, SHAPE)
    for name in options.losses:
        row = {"loss": name, "shape": shape, "samples": SAMPLES}
        add_case(results, row, functools.partial(case, LOSSES[name], tensors, options.rounds))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
