"""What a run leaves of every picture it evaluates, through the real command line."""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from crd_fast.commands.evaluate import print_both
from crd_fast.run.scores import guided_base_path, read_scores, scores_path
from crd_fast.train.evaluate import Evaluated
from tests.cli.conftest import metrics
from tests.cli.report_runs import Page

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs

SETTINGS = ("eval_rewards={colorfulness: {}}", "evaluate.samples_per_prompt=2", "evaluate.max_prompts=6")


def options(*settings):
    return [option for setting in settings for option in ("--set", setting)]


def test_scores_of_single_pictures_are_those_of_the_metrics_and_survive_a_resume(inside, small, tmp_path):
    run = tmp_path / "run"
    code, _, err = inside("train", small, "--output", run, *options(*SETTINGS))
    assert code == 0, err
    names = ["000000.jsonl", "000002.jsonl", "guided_base.jsonl"]
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == names
    for record in (metrics(run)[0], metrics(run)[-1]):
        scores = read_scores(scores_path(run, record["iteration"]))
        assert list(scores.index) == [i // 2 for i in range(12)] and len(set(scores.seeds)) == 12
        for measure, name in [
            ("reward", "reward_mean"),
            ("reward/geneval", "reward/geneval"),
            ("judge/colorfulness", "judge/colorfulness"),
        ]:
            assert scores.values[measure].mean() == pytest.approx(record[f"eval/{name}"], rel=1e-12)
        for measure in ("overall", "clean"):
            by_category = {}
            for category, value in zip(scores.categories, scores.values[measure]):
                by_category.setdefault(category, []).append(value)
            means = {category: np.mean(values) for category, values in by_category.items()}
            assert np.mean(list(means.values())) == pytest.approx(record[f"eval/{measure}"], rel=1e-12)
            if measure == "overall":
                assert all(record[f"eval/{category}"] == mean for category, mean in means.items())
    first = scores_path(run, 0).read_bytes()
    last = scores_path(run, 2).read_bytes()

    # what a run killed in the middle of its second iteration would leave, and a try of it with other weights
    shutil.rmtree(run / "checkpoints" / "iteration-000002")
    scores_path(run, 2).write_bytes(first)
    code, _, err = inside("train", "--resume", run)
    assert code == 0, err
    assert scores_path(run, 0).read_bytes() == first and scores_path(run, 2).read_bytes() == last

    # the checkpoint, scored again, is paired with the first evaluation
    both = [read_scores(scores_path(run, iteration)) for iteration in (0, 2)]
    for source in (run, run / "checkpoints" / "iteration-000002"):
        code, out, err = inside("eval", source)
        assert code == 0, err
        cells = {
            line.split()[1]: line.replace("│", "").split()[1:] for line in out.splitlines() if "│" in line
        }
        for name, measure in [("reward_mean", "reward"), ("judge/colorfulness", "judge/colorfulness")]:
            # 6 prompts of 2 pictures, in float64
            before, after = (s.values[measure].reshape(6, 2).mean(axis=1) for s in both)
            expected = [f"{after.mean():.3f}", f"{stats.sem(after):.3f}", f"{(after - before).mean():+.3f}"]
            sure = "*" if stats.ttest_rel(after, before).pvalue < 0.05 else ""
            assert cells[name] == [*expected, "±", f"{stats.sem(after - before):.3f}{sure}"]
    code, out, err = inside("eval", run, "--samples", 1)  # other pictures
    assert code == 0 and "reward_mean" in out and "since iteration 0" not in out and "paired" not in out


def test_the_base_with_guidance_is_that_of_the_untrained_model(inside, small, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone.json"
    code, out, err = inside("train", small, "--output", run)
    assert code == 0, err
    first, last = metrics(run)[0], metrics(run)[-1]
    code, _, err = inside("eval", small, "--guidance-scale", 4.5, "--json", alone)
    assert code == 0, err
    (source,) = json.loads(alone.read_text())["sources"]
    assert source["metrics"] and first["guided_base/guidance_scale"] == 4.5
    for name, found in source["metrics"].items():
        assert first[f"guided_base/{name}"] == found["value"]
    assert not any(name.startswith("guided_base/") for name in last)
    assert (run / "samples" / "guided_base.png").exists()

    base, after = read_scores(guided_base_path(run)), read_scores(scores_path(run, 2))
    assert base.pictures == after.pictures
    # the terminal's table and the page have the paired difference
    difference = after.values["overall"].mean() - base.values["overall"].mean()
    (row,) = [line.split() for line in out.splitlines() if line.startswith("overall ")]
    # name, first, last, change ± error, base with guidance, change ± error
    assert row[6] == f"{first['guided_base/overall']:.3f}" and row[7:9] == [f"{difference:+.3f}", "±"]
    text = Page(run / "report.html").text
    assert "The base with guidance scale 4.5 and the same seeds has correctness" in text
    assert "was not measured" not in text


@pytest.mark.parametrize("settings", ["evaluate.guided_base=false", "loss.guidance_scale=1"])
def test_the_base_with_guidance_is_left_out(inside, small, tmp_path, settings):
    run = tmp_path / "run"
    code, out, err = inside("train", small, "--output", run, "--max-iterations", 1, "--set", settings)
    assert code == 0, err
    assert not any(name.startswith("guided_base/") for name in metrics(run)[0])
    assert not guided_base_path(run).exists() and "against it" not in out


@pytest.mark.parametrize("shared", [0, 2])
def test_prompts_that_are_trained_on_as_well_are_known(inside, small, tmp_path, shared):
    words = {"train.txt": ["a red circle", "a blue ring"], "held.txt": ["a green cross", "a red square"]}
    if shared:
        words["held.txt"] = [" A  red CIRCLE", "a blue ring", "a green cross"]
    for name, lines in words.items():
        (tmp_path / name).write_text("\n".join(lines))
    settings = [
        f"rollout.prompts={tmp_path / 'train.txt'}",
        f"evaluate.prompts={tmp_path / 'held.txt'}",
        "rewards={colorfulness: 0.01}",
    ]
    run = tmp_path / "run"
    code, out, err = inside("train", small, "--output", run, "--max-iterations", 1, *options(*settings))
    assert code == 0, err
    assert ("2 of the prompts are trained on as well" in " ".join(out.split())) == bool(shared)
    assert ("Held-out prompts" in out) != bool(shared)
    found = [json.loads(line) for line in (run / "evaluations" / "000000.jsonl").read_text().splitlines()]
    assert [line["trained_on"] for line in found] == ([True, True, False] if shared else [False, False])
    assert read_scores(scores_path(run, 0)).trained_on() == (shared, len(found))


def test_what_one_of_two_scored_in_part_is_shown_of_both(monkeypatch):
    console = Console(width=120, file=io.StringIO())
    monkeypatch.setattr("crd_fast.commands.evaluate.console", console)
    nothing = np.zeros((0, 2, 2, 3), np.uint8)
    whole, part = (
        {"eval/images": 4, "eval/judge/vlm": 0.5},
        {"eval/judge/vlm": 0.75, "eval/scored/judge/vlm": 0.5},
    )
    print_both(["a", "b"], [Evaluated(metrics, nothing) for metrics in (whole, part)])
    cells = [line.replace("│", "").split() for line in console.file.getvalue().splitlines()]
    assert ["judge/vlm", "0.500", "0.750", "+0.250"] in cells
    assert ["scored/judge/vlm", "1.000", "0.500", "-0.500"] in cells
