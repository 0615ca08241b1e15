"""Devices, shapes and the fields of every result.

    python -m pytest benchmarks --benchmark-json results.json
    python benchmarks/plot.py results.json

On the CPU only the shapes of SD3.5-medium run unless CRD_BENCHMARK=full; on a GPU all of them.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import crd_machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "SD3.5-medium 512": (16, 64, 64),
    "SD3.5-medium 1024": (16, 128, 128),
    "FLUX.1 1024, packed": (4096, 64),
    "Qwen-Image 1328, packed": (6889, 64),
    "Wan 2.1 480p 81 frames": (16, 21, 60, 104),
}
FULL = DEVICE == "cuda" or os.environ.get("CRD_BENCHMARK") == "full"


def pytest_generate_tests(metafunc):
    if "workload" in metafunc.fixturenames:
        names = list(SHAPES) if FULL else ["SD3.5-medium 512", "SD3.5-medium 1024"]
        sizes = [(name, samples) for name in names for samples in (8, 24)]
        if not FULL:
            sizes.remove(("SD3.5-medium 1024", 24))
        metafunc.parametrize("workload", sizes, ids=[f"{n} K{k}" for n, k in sizes], scope="module")


@pytest.fixture(scope="module")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def bandwidth():
    """Bytes per second that a copy of the buffers' size moves; measured once per size."""
    measured = {}

    def of(nbytes):
        if nbytes not in measured:
            measured[nbytes] = crd_machine.copy_bandwidth(nbytes, DEVICE)
        return measured[nbytes]

    return of


@pytest.fixture
def timed(benchmark, bandwidth, device):
    """timed(phase, run, nbytes, setup=None): runs the benchmark, records bytes and share of the bandwidth."""

    def measure(phase, run, nbytes, setup=None, rounds=30):
        import nvtx

        def once(*args):
            with nvtx.annotate(phase):
                run(*args)
                crd_machine.synchronize(device)

        benchmark.pedantic(once, setup=setup, rounds=rounds, warmup_rounds=2)
        floor = nbytes / bandwidth(nbytes // 2)
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
