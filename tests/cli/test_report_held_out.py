"""The report of evaluations: differences with their paired errors, judges, and what is said of prompts."""

import dataclasses
import random

import pytest
from scipy import stats

from crd_fast.run.metrics import EVALUATED_ALIKE
from crd_fast.run.progress import before_and_after
from crd_fast.run.report import write_report
from crd_fast.run.scores import scores_path, write_scores
from tests.cli.report_runs import (
    CATEGORIES,
    CONFIG,
    Page,
    evaluation,
    fake_run,
    metrics,
    metrics_row,
    paired,
    prompts,
    report,
    scores_of,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return report(tmp_path_factory.mktemp("runs"), metrics(120))


def test_headline_says_the_result_and_its_error(full):
    error, _ = paired((metrics(120)[0], metrics(120)[-1]), "overall")
    assert 0.015 < error < 0.016
    expected = "Held-out correctness rose from 0.46 to 0.65 in 120 iterations (+0.18, standard error 0.02)."
    assert expected in full.text


def test_table_has_every_category_with_the_paired_error(full):
    ends = metrics(120)[0], metrics(120)[-1]
    for name, before, after, difference, measure in [
        ("Overall", "0.462", "0.645", "+0.183", "overall"),
        ("Clean", "0.360", "0.460", "+0.100", "clean"),
        ("Position", "0.220", "0.410", "+0.190", "position"),
        ("Color attr", "0.270", "0.250", "−0.020", "color_attr"),
    ]:
        part, chosen = measure, slice(None)
        if measure in CATEGORIES:
            place = list(CATEGORIES).index(measure)
            part, chosen = "overall", slice(64 * place, 64 * place + 64)
        error, p = paired(ends, part, chosen)
        assert full.row(name) == [before, after, f"{difference} ± {error:.3f}"]
        direction = "same" if p >= 0.05 else "up" if difference.startswith("+") else "down"
        assert full.direction(name) == direction
    assert full.direction("Color attr") == "same" and full.direction("Position") == "up"
    assert "Images" not in full.cells


def test_what_the_evaluation_is_and_its_prompts_are_said(full):
    assert "384 pictures of 192 prompts, none of which is among the prompts for training." in full.text
    assert "Iteration 0 is the base model" not in full.text  # the recipe does not say how it is drawn


def test_reward_hacking_is_named(tmp_path, no_charts):
    page = report(tmp_path, metrics(120, clean_gain=-0.12))
    assert (
        "overall correctness rises to 0.523 while held-out judges fall (clean 0.360 to 0.320 since iteration "
        "0): this may be reward hacking. Clean correctness fell: look for extra objects" in page.text
    )


def test_a_fall_that_chance_may_make_is_no_hacking(tmp_path, no_charts):
    rows = metrics(120, clean_gain=-0.02)
    assert paired((rows[0], rows[-1]), "clean")[1] > 0.01
    page = report(tmp_path, rows)
    assert "hacking" not in page.text


def judged_rows(quality, iterations=40):
    rows = metrics(iterations)
    for row in rows:
        if "eval/clean" in row:
            row["eval/judge/quality"] = 50 + quality * row["iteration"] / iterations
    return rows


CONFIG_JUDGED = CONFIG | {"eval_rewards": {"quality": {}}, "train": CONFIG["train"] | {"iterations": 40}}


@pytest.mark.parametrize(
    ("quality", "direction", "said"), [(-6.0, "down", True), (0.01, "same", False), (6.0, "up", False)]
)
def test_judges_stand_beside_the_reward_with_the_gap(tmp_path, no_charts, quality, direction, said):
    rows = judged_rows(quality)
    page = report(tmp_path, rows, config=CONFIG_JUDGED)
    ends = [scores_of(row) for row in (rows[0], rows[-1])]
    reward, judge = ([scores.values[name] for scores in ends] for name in ("reward", "judge/quality"))
    rise = [(after - before) / before.std() for before, after in (reward, judge)]
    gap = (rise[0] - rise[1]).reshape(-1, 2).mean(axis=1)
    error, p = paired((rows[0], rows[-1]), "judge/quality")
    assert (p < 0.05) == (direction != "same")
    start = page.cells.index("Quality")
    before, after, difference, shown = page.cells[start + 1 : start + 5]
    assert (before, after) == ("50.0", f"{50 + quality:.1f}")
    assert difference == f"{quality:+.1f} ± {error:.1f}".replace("-", "−")
    assert shown == f"{gap.mean():.2f} ± {stats.sem(gap):.2f}".replace("-", "−")
    assert page.direction("Quality") == direction
    warning = (
        "Iteration 20: overall correctness rises to 0.553 while held-out judges fall (quality 50.000 to "
    )
    assert (f"{warning}47.000 since iteration 0): this may be reward hacking." in page.text) == said
    assert ("hacking" in page.text) == said
    assert "Reward" in page.cells and "Clean" in page.cells


def test_a_judge_that_is_trained_on_is_said_to_be(tmp_path, no_charts):
    page = report(
        tmp_path, judged_rows(-6.0), config=CONFIG_JUDGED | {"rewards": {"geneval": 1, "quality": 1}}
    )
    assert "Quality (trained on as well)" in page.cells
    assert "Judge" not in page.text


def test_judges_have_a_chart(tmp_path):
    page = report(tmp_path, judged_rows(-6.0), config=CONFIG_JUDGED)
    assert page.charts()[:2] == ["Held-out result", "Reward and judges"]
    for name in ("reward", "clean", "quality"):
        assert f">{name}</text>" in page.html


def test_what_was_warned_of_while_it_ran_is_shown(tmp_path, no_charts):
    folder = fake_run(tmp_path, metrics(120))
    (folder / "warnings.txt").write_text("iteration 3: reward <mine> was 7 for each: it may be broken\n\n")
    page = Page(write_report(folder))
    assert "Before you trust this" in page.text
    assert "Iteration 3: reward <mine> was 7 for each: it may be broken." in page.text


@pytest.mark.parametrize("trained", [None, 1, 5, 192])
def test_never_trained_on_is_said_of_prompts_that_truly_were_not(tmp_path, no_charts, trained):
    page = report(tmp_path, metrics(120), trained=trained)
    assert "none of which is among" not in page.text and "never trained" not in page.text
    if trained is None:
        assert "384 pictures of 192 prompts. " in page.text and "Before you trust" not in page.text
        return
    shown = "all" if trained == 192 else trained
    assert f"of which {shown} are among the prompts for training." in page.text
    assert f"{trained} of the evaluated prompts {'is' if trained == 1 else 'are'} among those" in page.text
    assert "Correctness on the evaluated prompts rose from 0.46" in page.text and "Held-out" not in page.text


@pytest.mark.parametrize(
    "scale, how, other", [(1.0, "without guidance", "with"), (4.5, "with guidance scale 4.5", "without")]
)
def test_the_base_is_named_with_its_guidance(tmp_path, no_charts, scale, how, other):
    config = CONFIG | {"evaluate": CONFIG["evaluate"] | {"guidance_scale": scale}}
    text = report(tmp_path, metrics(120), config=config).text
    assert f"Iteration 0 is the base model; all pictures are drawn {how}." in text
    assert f"with the same seeds but {other} guidance was not measured." in text


def test_a_run_that_began_with_a_lora_does_not_call_it_the_base(tmp_path, no_charts):
    config = CONFIG | {"model": {"path": "builtin", "init_lora": "/a/lora"}}
    config |= {"evaluate": CONFIG["evaluate"] | {"guidance_scale": 1.0}}
    text = report(tmp_path, metrics(120), config=config).text
    assert "Iteration 0 is the LoRA that training began with; all" in text


def test_small_difference_is_not_a_result(tmp_path, no_charts):
    rows = [metrics(120)[0], metrics_row(1, 120, random.Random(0)) | evaluation(0.05)]
    page = report(tmp_path, rows, wobble=2.0)
    assert "cannot tell from no change" in page.text and page.direction("Overall") == "same"


def test_a_small_difference_that_is_sure_is_one(tmp_path, no_charts):
    """Means in [0, 1] are no coins: where all pictures rise alike, a little is a result."""
    rows = [metrics(120)[0], metrics_row(1, 120, random.Random(0)) | evaluation(0.02)]
    page = report(tmp_path, rows, wobble=0.004)
    error, p = paired(rows, "overall", wobble=0.004)
    assert p < 0.05 and error == pytest.approx(1.8e-4, rel=0.1)
    assert f"rose from 0.4617 to 0.4653 in 1 iteration (+0.0037, standard error {error:.4f})" in page.text


@pytest.mark.parametrize("wobble, said", [(4.0, False), (0.5, True)])
def test_category_may_fall_unnoticed_where_that_may_be_chance(tmp_path, no_charts, wobble, said):
    rows = [metrics(120)[0], metrics_row(1, 120, random.Random(0)) | evaluation(0.0)]
    rows[1]["eval/counting"] -= 0.15
    assert ("Counting fell by 0.15" in report(tmp_path, rows, wobble=wobble).text) == said


def test_without_scores_of_pictures_no_error_is_made_up(tmp_path, no_charts):
    folder = fake_run(tmp_path, metrics(120))
    scores_path(folder, 0).unlink()
    page = Page(write_report(folder))
    assert "(+0.18, standard error not known)" in page.text
    assert "evaluations/000000.jsonl could not be read: errors are not known" in page.text
    assert page.row("Overall") == ["0.462", "0.645", "+0.183"] and page.direction("Overall") == "unknown"
    scores_path(folder, 0).write_text("{")
    assert "evaluations/000000.jsonl could not be read" in Page(write_report(folder)).text


def test_evaluations_that_were_made_otherwise_are_left_out(tmp_path):
    """Of a run that went on with other settings: the page and the terminal compare what can be compared."""
    rows = metrics(120)
    rows = [row | ({EVALUATED_ALIKE: 41} if row["iteration"] > 40 else {}) for row in rows]
    rows[40] |= {"eval/overall": 0.99}  # the best there is, and no measure for the rest
    page = Page(write_report(fake_run(tmp_path / "run", rows, prompts(24), range(0, 121, 20))))
    first = next(row for row in rows if row["iteration"] == 60)
    assert "rose from 0.553 to 0.645 in 60 iterations" in page.text
    assert "From iteration 60 on the run was evaluated otherwise" in page.text
    assert "iteration 40" not in page.text and "base" not in page.text
    assert page.row("Overall")[0] == f"{first['eval/overall']:.3f}"
    assert not any("Iteration 40" in image["alt"] for image in page.images)
    table = before_and_after(tmp_path / "run", rows)
    assert table.title.endswith("iterations 60 and 120")


def test_what_a_reward_reports_is_not_the_result(tmp_path, no_charts):
    """A `report` of one's own may name anything; what the run is trained for is its reward."""
    rows = metrics(120)
    for row in rows:
        reward = row.get("eval/reward_mean")
        for name in [name for name in row if name.startswith("eval/") and name != "eval/images"]:
            del row[name]
        if reward is not None:
            row |= {"eval/dark_pixels": 0.1 + row["iteration"] / 1000, "eval/reward_mean": reward}
    page = Page(write_report(fake_run(tmp_path, rows)))
    assert "Held-out reward mean went from 0.73 to 0.82 in" in page.text
    assert page.row("Reward mean")[:2] == ["0.731", "0.823"]
    assert page.row("Dark pixels")[:2] == ["0.100", "0.220"]


def test_evaluations_of_other_prompts_are_not_paired(tmp_path, no_charts):
    folder = fake_run(tmp_path, metrics(120))
    first = scores_of(metrics(120)[0])
    write_scores(scores_path(folder, 0), dataclasses.replace(first, seeds=[s + 1 for s in first.seeds]))
    page = Page(write_report(folder))
    assert "(+0.18, standard error not known)" in page.text and page.direction("Overall") == "unknown"
