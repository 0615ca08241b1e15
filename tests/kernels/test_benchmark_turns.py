"""The benchmarks' own logic on the CPU: turns, ratios, and the two commands on tiny tensors."""

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compare_cpu
import crd_results
import host_time
from crd_turns import Spread, ratio, stopwatch, take_turns


def test_both_of_a_round_follow_the_same_one():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timed = take_turns(runs, 4, lambda run: run() or 1.0)
    assert "".join(calls) == "abbaabba" and [len(timed[name]) for name in "ab"] == [4, 4]
    with pytest.raises(ValueError, match="one or two"):
        take_turns(dict.fromkeys("abc"), 1, lambda run: 1.0)


def test_ratios_are_of_rounds_and_above_one_where_ours_is_faster():
    timed = {"ours": [1.0, 1.0, 10.0, 1.0, 1.0], "other": [2.0, 5.0, 30.0, 1.0, 4.0]}
    assert ratio(timed, "other", "ours") == Spread(median=3.0, low=2.0, high=4.0)


def test_a_stopwatch_gives_the_mean_of_its_calls():
    now, calls = [0.0], []

    def run():
        calls.append(gc.isenabled())
        now[0] += 2.0

    timed = take_turns({"run": run}, 2, stopwatch(lambda: now[0], calls=5))
    assert timed["run"] == [2.0, 2.0] and len(calls) == 10
    assert not any(calls) and gc.isenabled()  # no garbage collection in anyone's turn


@pytest.mark.slow
def test_the_commands_on_the_cpu(tmp_path, monkeypatch, capsys):
    """The real thing on tiny tensors; then with a torch.compile that falls back, which is refused."""
    monkeypatch.setitem(compare_cpu.SHAPES, "tiny", (4, 4))
    monkeypatch.setattr(compare_cpu, "workloads", lambda full: [("tiny", 8)])
    path = tmp_path / "r.jsonl"
    arguments = ["--rounds", "3", "--losses", "flow_matching", "--out", str(path)]
    baselines_of = {compare_cpu: ["torch.compile", "eager", "copy"], host_time: ["torch.compile"]}
    for command, baselines in baselines_of.items():
        assert command.main(arguments) == 0
        (row,) = crd_results.load(path)[1]
        assert list(row["turns"]) == baselines
        assert row["turns"]["torch.compile"]["ratio"]["median"] > 0

    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert host_time.main(arguments) == 1
    (row,) = crd_results.load(path)[1]
    assert "turns" not in row and "expected 1 graph" in row["error"]
    assert "no speed reported" in capsys.readouterr().out
    monkeypatch.undo()
    torch._dynamo.reset()
