"""Ranges for a profiler: around the phases of a real run, balanced, and nowhere unless asked for."""

import pytest
import torch
from crd_kernels import launch

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.run import profiling
from crd_fast.run.observer import Observers
from crd_fast.train.trainer import Trainer

SETTINGS = ["rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4", "rollout.steps=2"]
SETTINGS += ["train.timesteps=1", "train.iterations=2", "train.steps_per_iteration=1", "evaluate.every=0"]


class Ranges(list):
    """Every range that was pushed, with its parents; `open` are those not popped yet."""

    def __init__(self):
        self.open = []

    def push(self, name):
        self.open.append(name)
        self.append("/".join(self.open))


@pytest.fixture
def ranges(monkeypatch):
    """What torch's NVTX is told."""
    seen = Ranges()
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", seen.open.pop)
    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda name: None)
    monkeypatch.delenv("CRD_NVTX", raising=False)
    yield seen
    monkeypatch.delenv("CRD_NVTX", raising=False)
    profiling.start(False)


@pytest.mark.parametrize("asked", ["recipe", "environment", "nobody"])
def test_phases_of_a_run(tmp_path, monkeypatch, ranges, asked):
    if asked == "environment":
        monkeypatch.setenv("CRD_NVTX", "1")
    Trainer(load_recipe("builtin", [*SETTINGS, f"train.profile={asked == 'recipe'}"]), tmp_path / "run").run()
    assert ranges.open == []
    if asked == "nobody":
        assert ranges == []
        return
    rollout, update = "iteration/rollout", "iteration/update"
    assert list(dict.fromkeys(ranges)) == [
        *("iteration", rollout, f"{rollout}/prompts", f"{rollout}/sampler forward", f"{rollout}/decode"),
        *("iteration/rewards", update, f"{update}/reference", f"{update}/reference/reference forward"),
        *(f"{update}/policy forward", f"{update}/measure", f"{update}/center"),
        *(f"{update}/backward", f"{update}/optimizer", "iteration/snapshots"),
        *(f"{update}/old", f"{update}/old/old forward", "checkpoint"),  # in the second, where it differs
    ]


def test_a_phase_that_fails_is_closed(ranges):
    observer = Observers(profiling.start(True))
    with pytest.raises(ZeroDivisionError), observer.phase("outer"), observer.branch("policy", 1):
        1 / 0  # noqa: B018
    assert ranges == ["outer", "outer/policy forward"] and ranges.open == []


@pytest.mark.skipif(torch.version.cuda or torch.version.hip, reason="this torch has NVTX")
def test_without_nvtx_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train.profile, CRD_NVTX: expected a torch with NVTX.*got"):
        Trainer(load_recipe("builtin", [*SETTINGS, "train.profile=true"]), tmp_path / "run")
    assert launch.observer is None  # and it stays off
