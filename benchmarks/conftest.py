"""Devices, shapes and the fields of every result.

    python -m pytest benchmarks --benchmark-json results.json
    python benchmarks/table.py results.json

On the CPU only the shapes of SD3.5-medium run unless CRD_BENCHMARK=full; on a GPU all of them. Each figure is
taken alone and by the wall clock, the host's part included: what is faster than what is for compare_cpu and
compare_gpu to say, which take turns.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import crd_machine
from crd_providers import SHAPES, inputs, workloads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = DEVICE == "cuda" or os.environ.get("CRD_BENCHMARK") == "full"


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        sizes = workloads(FULL)
        metafunc.parametrize("workload", sizes, ids=[f"{n} K{k}" for n, k in sizes], scope="module")


@pytest.fixture(scope="module")
def device():
    return DEVICE


@pytest.fixture(scope="module")
def tensors(workload, device):
    name, samples = workload
    return inputs(samples, SHAPES[name], device=device)


@pytest.fixture(scope="session")
def bandwidth():
    """Bytes per second of a copy that moves as many; measured once per size."""
    measured = {}

    def of(nbytes):
        if nbytes not in measured:
            measured[nbytes] = crd_machine.copy_bandwidth(nbytes, DEVICE)
        return measured[nbytes]

    return of


@pytest.fixture
def timed(benchmark, bandwidth, device):
    """timed(phase, run, nbytes, ...): runs the benchmark, records bytes and share of the bandwidth.

    `check` is called before the rounds and after; where it fails, nothing is reported. `setup` makes the
    arguments of one run, untimed.
    """

    def measure(phase, run, nbytes, setup=None, check=lambda: None, rounds=30, warmup_rounds=2):
        def once(*args):
            run(*args)
            crd_machine.synchronize(device)

        check()
        benchmark.pedantic(once, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
        benchmark.has_error = True  # pytest-benchmark leaves such a result out
        check()
        benchmark.has_error = False
        floor = nbytes / bandwidth(nbytes)
        benchmark.extra_info |= {
            "phase": phase,
            "bytes": nbytes,
            "fraction_of_copy_bandwidth": floor / benchmark.stats.stats.median,
            "device": device,
        }

    return measure


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["crd"] = crd_machine.describe(DEVICE)
