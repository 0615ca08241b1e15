"""What a report says to try next, and what it says the run took."""

from pathlib import Path

import pytest

from crd_fast.run.report import write_report
from crd_fast.run.report.advice import RULES, advice
from crd_fast.run.report.held_out import changes
from crd_fast.run.report.run import read_run
from tests.cli.report_runs import CONFIG, Page, fake_run, guided_base, metrics

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-run"
DONE = CONFIG | {
    "train": CONFIG["train"] | {"iterations": 40},
    "rewards": CONFIG["rewards"] | {"a": 1.0, "b": {"weight": 1.0}, "unwanted": -0.1, "watched": 0.0},
}


def advised(folder):
    run = read_run(folder)
    return {one.metric: one for one in advice(run, changes(run))}


def changed(rows, **values):
    """The training iterations with other metrics: a value, or a function of the run's progress."""
    trained = [row for row in rows if "reward_mean" in row]
    for row in trained:
        progress = row["iteration"] / len(trained)
        row |= {key: value(progress) if callable(value) else value for key, value in values.items()}
    return rows


def test_a_healthy_run_is_left_in_peace():
    assert advised(EXAMPLE) == {}


@pytest.mark.parametrize("iterations", [5, 120])
def test_nothing_is_off(tmp_path, no_charts, iterations):
    folder = fake_run(tmp_path, metrics(iterations))
    assert advised(folder) == {}
    assert "What to try next" not in Page(write_report(folder)).text


def noise(progress):
    return 0.5 + 0.02 * (round(progress * 40) % 4 - 1.5)


ALL_EQUAL = {"reward_mean": noise, "groups_equal": 0.9}
STILL = {"reward_mean": noise, "groups_equal": 0.1, "implicit_variance": 1e-6, "external_variance": 0.007}
# metrics of the run, the metric that is named, its value as it is shown, and one thing to try
CASES = [
    ({"reward_mean": noise}, "reward_mean", "0.500 to 0.500", "more train.iterations (now 40)"),
    (ALL_EQUAL, "reward_mean", "0.500 to 0.500", "partial credit"),
    (ALL_EQUAL, "groups_equal", "0.90 in the first fifth", "more rollout.samples_per_prompt (now 8)"),
    (STILL, "reward_mean", "0.500 to 0.500", "a smaller loss.beta (now 30.0)"),
    ({"reward_mean": 0.3, "reward_std": 0.0}, "reward_std", "0", "crd-fast score"),
    (
        {"implicit_variance": 1e-6, "external_variance": 0.007},
        *("implicit_variance", "0.00014 of external_variance", "a larger train.learning_rate (now 0.001)"),
    ),
    (
        {"implicit_variance": 0.7, "external_variance": 0.007},
        *("implicit_variance", "100 times external_variance", "a smaller train.learning_rate"),
    ),
    (
        {"old_deviation": lambda p: 1e-6 * 10 ** (4 * p)},
        "old_deviation",
        "to 0.00",
        "snapshots.old (now 0/0.25",
    ),
    ({"kl": lambda p: 0.01 * 30**p}, "kl", "in the middle of the run", "a larger loss.kl_beta (now 0.1)"),
    ({"grad_norm": 7.0}, "grad_norm", "7 (median)", "a larger train.max_grad_norm (now 1.0)"),
    ({"grad_norm": lambda p: 9.0 if p == 0.5 else 0.4}, "grad_norm", "9, median 0.4", "by half"),
    ({"steps_left_out": lambda p: int(p == 0.5)}, "steps_left_out", "1", "a smaller train.learning_rate"),
    ({"seconds_reward": 3.0}, "seconds_reward", "% of an iteration", "workers: auto"),
    (
        {"reward/a": lambda p: 0.8 - 0.2 * p + noise(p) / 10, "reward/b": lambda p: p},
        *("reward/a", "to 0.6", "a larger weight"),
    ),
    (
        {
            "reward/watched": lambda p: 0.8 - 0.2 * p + noise(p) / 10,
            "reward/unwanted": lambda p: 0.6 + 0.2 * p + noise(p) / 10,
        },
        *("reward/unwanted", "to 0.8", "a more negative weight"),
    ),
]


@pytest.mark.parametrize(("values", "metric", "value", "tries"), CASES, ids=lambda case: str(case)[:30])
def test_what_is_off_is_named_with_its_value(tmp_path, no_charts, values, metric, value, tries):
    folder = fake_run(tmp_path, changed(metrics(40), **values), config=DONE)
    found = advised(folder)[metric]
    assert value in found.value and tries in "; ".join(found.tries)
    page = Page(write_report(folder))
    assert "What to try next" in page.text and f"{metric} {found.value}: {found.said}" in page.text


def test_what_falls_as_it_is_to_fall_needs_no_advice(tmp_path, no_charts):
    falling = {f"reward/{name}": lambda p: 0.8 - 0.2 * p + noise(p) / 10 for name in ("unwanted", "watched")}
    folder = fake_run(tmp_path, changed(metrics(40), **falling), config=DONE)
    assert not any(name.startswith("reward/") for name in advised(folder))


def test_a_reward_that_rises_in_spite_of_equal_groups_at_the_end_is_healthy(tmp_path):
    rows = changed(metrics(40), groups_equal=lambda progress: 0.75 * progress)
    assert advised(fake_run(tmp_path, rows, config=DONE)) == {}


def test_evaluations_that_say_what_is_off(tmp_path):
    """A judge that falls, a best evaluation before the last one, a guided base out of reach."""
    rows = metrics(40)
    for row in rows:
        if "eval/clean" in row:
            row["eval/judge/quality"] = 50 - 6 * row["iteration"] / 40
    exploited = advised(fake_run(tmp_path / "a", rows, config=DONE | {"eval_rewards": {"quality": {}}}))
    assert exploited.keys() == {"eval/judge/quality"}
    assert exploited["eval/judge/quality"].value == "50.000 to 47.000 from iteration 0 to 20"

    rows = metrics(40)
    rows[20] |= {key: value for key, value in metrics(20)[20].items() if key.startswith("eval/")}
    rows[40] |= {key: value for key, value in metrics(120)[20].items() if key.startswith("eval/")}
    worse = advised(fake_run(tmp_path / "b", rows, config=DONE))
    assert worse.keys() == {"eval/overall"} and "at iteration 20" in worse["eval/overall"].value

    rows = metrics(40)
    rows[0] |= guided_base(tmp_path / "c", progress=1.5)
    below = advised(fake_run(tmp_path / "c", rows, config=DONE))
    assert below.keys() == {"eval/overall"} and "with the guided base" in below["eval/overall"].value
    rows[0] |= guided_base(tmp_path / "c", progress=0.5)
    assert advised(fake_run(tmp_path / "c", rows, config=DONE)) == {}


def test_every_rule_is_tried_here():
    known = {metric for _, metric, _, _ in CASES}
    assert len(RULES) == len(known) + 4  # two of two metrics, one of two, three above


def test_what_it_took(tmp_path, no_charts):
    rows = changed(
        metrics(60),
        seconds_rollout=3.0,
        seconds_reward=1.0,
        seconds_update=6.0,
        tflops=20.0,
        images_per_second=9.6,
        gpu_peak_bytes=21 * 2**30,
        **{"gpu_peak_bytes/rollout": 9 * 2**30, "gpu_peak_bytes/update": 21 * 2**30},
    )
    page = Page(write_report(fake_run(tmp_path, rows)))
    # 60 iterations of 10 s and 4 evaluations of 9.5 s; 60 of 120 iterations are left
    assert page.row("Rollout") == ["3.0 min", "28 %", "9.0 GiB"]
    assert page.row("Update") == ["6.0 min", "56 %", "21.0 GiB"]
    assert page.row("Evaluations")[:2] == ["38 s", "6 %"]
    for said in (
        "time 11 min",
        "an iteration 10 s (median)",
        "left, at this pace 11 min",
        "rollout and update 10.8 PFLOP",  # 60 times 9 s of 20 TFLOP/s
        "achieved 20 TFLOP/s",
        "GPU memory, at most 21.0 GiB",
        "host memory, at most 1.4 GiB",
    ):
        assert said in page.text


def test_on_the_cpu_nothing_is_said_of_a_gpu(tmp_path, no_charts):
    page = Page(write_report(fake_run(tmp_path, metrics(20))))
    assert page.row("Rollout")[1].endswith("%") and "GPU memory, at most" not in page.text
    assert "GiB" not in page.row("Rollout")[2] and "TFLOP" not in page.text
