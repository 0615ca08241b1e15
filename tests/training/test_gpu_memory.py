"""Peaks of GPU memory by phase, with an allocator that is a number."""

import torch

from crd_fast.config import load_recipe
from crd_fast.run.gpu_memory import GpuMemory
from crd_fast.run.metrics import MEASURED, read_metrics
from crd_fast.run.observer import Observer
from crd_fast.run.progress import gpu_memory
from crd_fast.train.trainer import Trainer
from tests.pretend_gpu import pretend_gpu
from tests.training.short_runs import SETTINGS


class Allocator:
    """What torch counts, were there a GPU: a phase takes some memory and gives it back."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 100
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self):
        self.peak = self.now

    def take(self, size):
        self.peak = max(self.peak, self.now + size)


def test_each_phase_has_its_own_peak(monkeypatch):
    allocator, memory = Allocator(monkeypatch), GpuMemory()
    allocator.take(7)  # before any phase
    for name, size in (("rollout", 30), ("update", 500), ("rewards", 2)):
        with memory.phase("iteration"), memory.phase(name):
            allocator.take(size)
            with memory.phase("decode"):  # inside another, and none of those that are told
                allocator.take(size + 1)
    allocator.take(3)
    found = memory.metrics()
    assert found.pop("gpu_peak_bytes") == 601
    peaks = {name.partition("/")[2]: size for name, size in found.items()}
    assert peaks == {"rollout": 131, "update": 601, "rewards": 103}
    for size in (50, 20):  # drawn twice, by two guidance scales
        with memory.phase("guided base"):
            allocator.take(size)
    assert memory.metrics() == {"gpu_peak_bytes": 601, "gpu_peak_bytes/guided_base": 150}
    allocator.take(900)  # between phases
    assert memory.metrics() == {"gpu_peak_bytes": 1000}


def test_a_phase_that_fails_is_counted(monkeypatch):
    allocator, memory = Allocator(monkeypatch), GpuMemory()
    try:
        with memory.phase("update"):
            allocator.take(10)
            raise RuntimeError
    except RuntimeError:
        pass
    assert memory.metrics()["gpu_peak_bytes/update"] == 110


class Takes(Observer):
    """Takes memory in the phases of a run, as its tensors would."""

    def __init__(self, allocator, sizes):
        self.allocator, self.sizes = allocator, sizes

    def phase(self, name, total=None):
        self.allocator.take(self.sizes.get(name, 0))
        return super().phase(name, total)


SIZES = {"rollout": 40, "decode": 45, "update": 300, "evaluation": 60, "guided base": 90}


def test_a_run_tells_them_where_there_is_a_gpu(monkeypatch, tmp_path):
    settings = ("model.method=full", "train.precision=fp32", "train.optimizer=adamw")
    recipe = load_recipe("builtin", [*SETTINGS, *settings])
    Trainer(recipe, tmp_path / "cpu").run()
    on_cpu = read_metrics(tmp_path / "cpu")
    assert on_cpu and not any("gpu" in name for record in on_cpu for name in record)
    assert gpu_memory(on_cpu) is None
    with pretend_gpu(), monkeypatch.context() as patch:
        allocator = Allocator(patch)
        Trainer(recipe, tmp_path / "gpu", observer=Takes(allocator, SIZES)).run()
    records = read_metrics(tmp_path / "gpu")
    first, second = records[0], records[1]
    assert first["gpu_peak_bytes/evaluation"] == 160 and first["gpu_peak_bytes/guided_base"] == 190
    assert first["gpu_peak_bytes"] == 190 and "gpu_peak_bytes/update" not in first
    assert second["gpu_peak_bytes/rollout"] == 145 and second["gpu_peak_bytes/update"] == 400
    assert second["gpu_peak_bytes/rewards"] == 100 and second["gpu_peak_bytes"] == 400
    assert all(name.startswith(MEASURED) for name in second if "gpu" in name)
    line = gpu_memory([{"gpu_peak_bytes/update": 2**34}, {"gpu_peak_bytes/update": 2**33}, {}])
    assert line == "GPU memory, at most: update 16.0 GB"
