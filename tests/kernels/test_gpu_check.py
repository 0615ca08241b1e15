"""The logic of the one-card check, on a machine without a card."""

import sys

import pytest
import torch

from tools import gpu_check
from tools.gpu_check import Step


def script(name, code, seconds=30, needs=""):
    return Step(name, (sys.executable, "-c", code), seconds, needs)


def test_page_and_status(tmp_path):
    good, bad = script("good", "print('all well')"), script("bad", "raise SystemExit('went wrong')")
    absent = script("absent", "", needs="no/such/folder")
    assert gpu_check.check([good, absent], tmp_path) == 0
    assert gpu_check.check([good, bad, absent], tmp_path) == 1
    text = (tmp_path / "page.md").read_text()
    for line in ("| good | passed |", "| bad | failed |", "| absent | skipped |", "all well", "went wrong"):
        assert line in text
    assert "- commit: " in text and "- torch: " in text


def test_a_step_is_stopped_at_its_limit(tmp_path):
    slow = script("slow", "import time; print('begun', flush=True); time.sleep(60)", seconds=2)
    assert gpu_check.check([slow], tmp_path) == 1
    text = (tmp_path / "page.md").read_text()
    assert "| slow | timed out |" in text and "begun" in text


def test_nothing_runs_beyond_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BUDGET", 0)
    assert gpu_check.check([script("late", "print('ran')")], tmp_path) == 0
    assert "no time left" in (tmp_path / "page.md").read_text()


def test_limits_fit_the_budget():
    assert sum(step.seconds for step in gpu_check.steps("out")) <= gpu_check.BUDGET


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(capsys):
    assert gpu_check.main([]) == 2
    assert "expected a CUDA or ROCm device" in capsys.readouterr().err
