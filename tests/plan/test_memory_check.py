"""The memory step of `make gpu`, with live tensors on the CPU in the place of CUDA's allocator."""

import contextlib
import json

import pytest
import torch

from tools import memory_check


@pytest.mark.slow
def test_plan_and_measurement_side_by_side(tmp_path, monkeypatch, capsys):
    case = "bf16, micro-batch 2"
    monkeypatch.setattr(memory_check, "CASES", {case: memory_check.CASES[case]})
    out = tmp_path / "memory.json"
    assert memory_check.main(["--json", str(out), "--tolerance", "0.1"]) == 0
    rows = json.loads(out.read_text())
    assert [row["phase"] for row in rows] == ["rollout", "update"]
    assert all(row["measured"] > 1 << 20 for row in rows)
    assert f"| {case} | update |" in capsys.readouterr().out


def test_a_plan_that_is_wrong_is_a_failure(monkeypatch):
    row = {"case": "x", "phase": "update", "planned": 2 << 20, "measured": 4 << 20, "ratio": 0.5}
    monkeypatch.setattr(memory_check, "compare", lambda meter: [row])
    assert memory_check.main([]) == 1
    assert memory_check.main(["--tolerance", "0.6"]) == 0


def test_cudas_meter_reads_the_peak_above_what_was_there(monkeypatch):
    asked = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: asked.append("peak") or 350)
    meter, peaks = memory_check.CudaMeter(), {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(meter.context())
        stack.enter_context(meter.phase("update", peaks))
    assert peaks == {"update": 250}
    assert asked == ["synchronize", "reset", "synchronize", "peak"]
