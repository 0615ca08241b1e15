"""The GPU's benchmark where there is none: cases and results with a stand-in timer, order of calls."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compare_gpu
import crd_gpu_timer
import crd_results
from crd_providers import LOSSES, inputs

MACHINE = {"gpu": "a GPU", "torch": "2", "commit": "0" * 40 + "+changes"}
OVERHEAD = 0.5  # seconds that the stand-in timer finds in any run


class StandIn:
    """A clock that runs only where it is told to, and a timer that reads it."""

    def __init__(self):
        self.now = 0.0

    def cold(self, run):
        start = self.now
        run()
        return self.now - start + OVERHEAD

    def hot(self, run):
        return self.cold(run) / 2

    def captured(self, run):
        return run

    def slowed(self, function, seconds):
        def run(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return run


@pytest.fixture
def timer():
    return StandIn()


@pytest.fixture
def losses(timer, monkeypatch):
    """Flow matching alone; ours takes 1 s and the lean formula 2.5 s."""
    right = LOSSES["flow_matching"]
    slow = dataclasses.replace(
        right, fused=timer.slowed(right.fused, 1.0), lean=timer.slowed(right.lean, 2.5)
    )
    monkeypatch.setitem(LOSSES, "flow_matching", slow)


def run_cases(cases, path, timer, **keywords):
    results = crd_results.Results(path, {"kind": "gpu", "what": "stand-in", "machine": MACHINE})
    keywords = {"shapes": {"tiny": (4, 4)}, "names": ("ours", "eager"), "rounds": 3} | keywords
    return compare_gpu.run(cases, results, timer, "cpu", **keywords)


def test_headline_cases_come_first():
    headline = [(loss, "SD3.5-medium 512", 24) for loss in ("crd", "nft", "awm", "dpo", "flow_matching")]
    everything = compare_gpu.plan(headline_only=False, without_headline=False)
    assert everything[:5] == headline == compare_gpu.plan(True, False)
    assert everything[5:] == compare_gpu.plan(False, True) and len(everything) == 50 == len(set(everything))


def test_figures_of_a_gpu_case(timer, losses, tmp_path, capsys):
    assert run_cases([("flow_matching", "tiny", 8)], tmp_path / "r.jsonl", timer) == []
    about, (row,) = crd_results.load(tmp_path / "r.jsonl")
    assert row["bytes"] == 7 * 8 * 16 * 2  # 3 reads, 3 reads and the gradient
    ours, eager = row["providers"]["ours"], row["providers"]["eager"]
    assert ours["cold"] == ours["graph_cold"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert ours["hot"]["median"] == ours["graph_hot"]["median"] == 0.75 and eager["cold"]["median"] == 3.0
    ratios = {mode: spread["median"] for mode, spread in row["ratio"].items()}
    assert ratios == dict.fromkeys(crd_results.MODES, 2.0)
    assert ours["fraction_of_copy"] == dict.fromkeys(("cold", "graph_cold"), OVERHEAD / 1.5)
    table = crd_results.table(about, [row])
    assert "| flow_matching | tiny | 8 | ours | 1.5e+03 ms |" in table and "2.00 (2.00 to 2.00)" in table
    assert "commit 000000000000+changes" in table and "33%" in table


def test_what_fails_keeps_its_line_with_the_reason(timer, losses, tmp_path, monkeypatch):
    def no_capture(run):
        raise RuntimeError("cannot capture\nand a trace")

    slow = LOSSES["flow_matching"]

    def wrong(policy, *others, impl):
        return slow.fused(policy * 1.1, *others, impl=impl)

    monkeypatch.setitem(LOSSES, "wrong", dataclasses.replace(slow, fused=wrong))
    monkeypatch.setattr(timer, "captured", no_capture)
    cases = [("wrong", "tiny", 8), ("flow_matching", "tiny", 8), ("flow_matching", "absent", 8)]
    run_cases(cases, tmp_path / "r.jsonl", timer)
    about, rows = crd_results.load(tmp_path / "r.jsonl")
    refused, uncaptured, absent = (row["providers"]["ours"] for row in rows)
    assert refused == {"error": "WrongResult: ours: wrong result, no speed reported"}
    assert "cold" in rows[0]["providers"]["eager"] and rows[0]["ratio"] == {}
    assert uncaptured["graph_error"] == "RuntimeError: cannot capture" and "graph_cold" not in uncaptured
    assert set(rows[1]["ratio"]) == {"cold", "hot"}
    assert absent == {"error": "KeyError: 'absent'"}
    assert all(map(compare_gpu.failed, rows))
    assert "cannot capture" in crd_results.table(about, rows)


def test_a_provider_that_goes_wrong_while_it_is_timed_has_no_figure(timer, losses, tmp_path, monkeypatch):
    slow, calls = LOSSES["flow_matching"], []

    def wrong_later(*args, impl):
        calls.append(1)
        return slow.fused(args[0] * (1 if len(calls) < 9 else 1.1), *args[1:], impl=impl)

    monkeypatch.setitem(LOSSES, "later", dataclasses.replace(slow, fused=wrong_later))
    run_cases([("later", "tiny", 8)], tmp_path / "r.jsonl", timer)
    _, (row,) = crd_results.load(tmp_path / "r.jsonl")
    assert list(row["providers"]["ours"]) == ["error"] and row["ratio"] == {}


def test_a_stopped_run_leaves_what_it_had(timer, losses, tmp_path, monkeypatch):
    path, cases = tmp_path / "r.jsonl", [("flow_matching", "tiny", samples) for samples in (4, 6, 8)]
    assert run_cases(cases, path, timer, limit=0) == cases and crd_results.load(path)[1] == []

    def stopped(samples, *args, **kwargs):
        if samples == 8:
            raise KeyboardInterrupt
        return inputs(samples, *args, **kwargs)

    monkeypatch.setattr(compare_gpu, "inputs", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_cases(cases, path, timer)
    with path.open("a") as file:
        file.write('{"loss": "flow_mat')  # killed while writing
    assert [row["samples"] for row in crd_results.load(path)[1]] == [4, 6]
    crd_results.main([str(path), str(tmp_path / "never.jsonl")])


def test_order_of_a_cold_measurement(monkeypatch):
    """Without a GPU: torch.cuda's names and signatures, of things that only note that they were called."""
    cuda = mock.create_autospec(torch.cuda)
    event = cuda.Event.return_value
    event.query.side_effect = [True, False]  # at first the device has begun before the host was done
    event.elapsed_time.return_value = 0.25  # ms
    run, buffer = mock.Mock(), mock.Mock()
    for name, child in {"run": run, "flush": buffer.sum, "zeros": mock.Mock(return_value=buffer)}.items():
        cuda.attach_mock(child, name)
    monkeypatch.setattr(crd_gpu_timer, "torch", SimpleNamespace(cuda=cuda, zeros=cuda.zeros))
    cuda.get_device_properties.return_value = SimpleNamespace(L2_cache_size=2**27)

    timer = crd_gpu_timer.CudaTimer()
    cuda.zeros.assert_called_once_with(2**27, device="cuda")  # float32: four times the cache
    assert timer.cold(run) == 0.25e-3
    did = [call[0].removeprefix("Event().") for call in cuda.mock_calls]
    issued = ["flush", "_sleep", "Event", "Event", "record", "run", "record", "query"]
    assert did == ["get_device_properties", "zeros", *[*issued, "synchronize", "elapsed_time"] * 2]
    assert [call.args[0] for call in cuda._sleep.mock_calls] == [crd_gpu_timer.HOLD, 2 * crd_gpu_timer.HOLD]

    event.query.side_effect = None
    run.reset_mock()
    assert timer.hot(run) == 0.25e-3 / crd_gpu_timer.CALLS and run.call_count == crd_gpu_timer.CALLS + 1
    run.reset_mock()
    replay = timer.captured(run)
    assert replay() is run.return_value and run.call_count == 4  # 3 to warm up
    cuda.CUDAGraph.return_value.replay.assert_called_once_with()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_refuses_without_a_gpu(tmp_path, capsys):
    assert compare_gpu.main(["--out", str(tmp_path / "r.jsonl")]) == 2
    assert "expected a CUDA or ROCm device" in capsys.readouterr().err
