"""What a run is said to take before it starts, and what it is measured to take."""

import io
import json

import pytest
from rich.console import Console

from crd_fast.run.progress import Bars, duration

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_a_card_says_hours_and_measures_tflops(inside, small, tmp_path):
    settings = ("--set", "train.precision=bf16", "--set", "evaluate.every=0")
    code, out, _ = inside("train", small, *settings, "--gpu", "rtx-4090", "--output", tmp_path / "run")
    said = " ".join(out.split())
    assert code == 0 and "an iteration on rtx-4090 (165.2 TFLOP/s in bfloat16)" in said
    assert "at 40% of the peak, an assumption" in said
    assert said.index("an iteration on rtx-4090") < said.index("iteration 1/2")
    plan = tmp_path / "plan.json"
    assert inside("plan", small, *settings, "--json", plan)[0] == 0
    planned = sum(json.loads(plan.read_text())["flops_per_iteration"].values())
    first, second = records(tmp_path / "run")
    for record in (first, second):
        seconds = [record[f"seconds_{phase}"] for phase in ("rollout", "reward", "update")]
        assert record["images_per_second"] == pytest.approx(8 / sum(seconds))
        record["flops"] = record["tflops"] * 1e12 * (seconds[0] + seconds[2])
        assert "gpu_peak_bytes" not in record  # there is no GPU
    assert second["flops"] == pytest.approx(planned, rel=0.01)
    assert first["flops"] < 0.95 * planned  # old is still the policy, and is not run


def test_without_a_card_nothing_is_planned(inside, small, tmp_path):
    code, out, _ = inside("train", small, "--set", "evaluate.every=0", "--output", tmp_path / "run")
    assert code == 0 and "TFLOP/s" not in out
    assert all(
        "tflops" not in record and record["images_per_second"] > 0 for record in records(tmp_path / "run")
    )
    code, _, err = inside("train", small, "--gpu", "24GB", "--output", tmp_path / "other")
    assert code == 2 and "expected the name of a card" in err and not (tmp_path / "other").exists()


def test_the_time_left_is_known_from_the_first_iteration():
    out = io.StringIO()
    bars = Bars(Console(file=out, width=200), iterations=61)
    seconds = {"seconds_rollout": 60.0, "seconds_reward": 20.0, "seconds_update": 120.0}
    for iteration in (1, 2):
        record = {"iteration": iteration, "reward_mean": 0.5, "kl": 0.0, **seconds}
        bars.iteration_done(record | ({"seconds_eval": 200.0} if iteration == 2 else {}))
    first, second = out.getvalue().splitlines()
    assert first.endswith("left 3.3 h")  # 60 iterations of 200 s
    assert second.endswith("left 4.9 h")  # 59 of 300 s, with what the evaluation takes


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.25, "0.2 s"),
        (90, "90 s"),
        (150, "2.5 min"),
        (7000, "117 min"),
        (7200, "2.0 h"),
        (1e6, "278 h (12 days)"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
