"""The logic of the one-card check, on a machine without a card."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compare_gpu

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


def test_figures_of_another_run_are_not_taken_for_its(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "headline.jsonl").write_text("{}")
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "has a run already, expected a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["headline.jsonl"]


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


def test_the_headline_comes_first_and_its_command_is_understood(capsys):
    planned = gpu_check.steps("out")
    assert planned[0].name == "headline" and planned[0].seconds <= 150 and "--headline" in planned[0].command
    if not torch.cuda.is_available():
        for step in planned:
            if "benchmarks.compare_gpu" in step.command:
                assert compare_gpu.main(step.command[3:]) == 2
                assert "compare_gpu: expected a CUDA or ROCm device" in capsys.readouterr().err


def test_the_page_is_there_after_each_step(tmp_path):
    page = tmp_path / "page.md"
    look = script("look", f"print(open({str(page)!r}).read().count('| first | passed |'), 'seen')")
    gpu_check.check([script("first", ""), look], tmp_path)
    assert "1 seen" in page.read_text()


def test_figures_of_a_stopped_step_are_on_the_page(tmp_path):
    figures = gpu_check.steps(tmp_path)[-1]
    machine = {"gpu": "a GPU", "torch": "2", "commit": "unknown"}
    about = {"kind": "gpu", "what": "what ran", "machine": machine}
    (tmp_path / "headline.jsonl").write_text(json.dumps(about) + '\n{"loss": "cr')
    verdict = gpu_check.run_step(figures, left=60)
    assert verdict.outcome == "passed", verdict.output
    assert "what ran; a GPU" in verdict.output and "other_shapes.jsonl: not written" in verdict.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(capsys):
    assert gpu_check.main([]) == 2
    assert "expected a CUDA or ROCm device" in capsys.readouterr().err
