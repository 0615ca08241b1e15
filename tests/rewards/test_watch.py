"""Warnings about rewards, from made-up metrics and scores of pictures."""

import json

import numpy as np
import pytest
import yaml
from scipy import stats

from crd_fast.config import load_recipe
from crd_fast.rewards.advantage import advantages, combine
from crd_fast.run.log import RunLog
from crd_fast.run.metrics import EVALUATED_ALIKE, TRAINED_ALIKE
from crd_fast.run.report.advice import advice
from crd_fast.run.report.held_out import changes, compared, ends, exploited
from crd_fast.run.report.run import read_run
from crd_fast.run.report.warnings import warnings
from crd_fast.run.report.words import sentence
from crd_fast.run.scores import Scores, scores_path, write_scores
from crd_fast.run.watch import WARNINGS, Watch, judge_metrics, reward_metrics


def iteration(number, equal=0.0, std=1.0, reward=0.5, best=None):
    rewards = {"reward_mean": reward, "reward/ocr": reward, "reward_std/ocr": std}
    rewards["reward_best/ocr"] = reward if best is None else best
    return {"iteration": number, "groups_equal": equal, **rewards}


def evaluation(number, reward, judges, error=0.01):
    record = {"iteration": number, "eval/reward_mean": reward, "standard_error/reward": error}
    for name, value in judges.items():
        record |= {f"eval/judge/{name}": value, f"standard_error/judge/{name}": error}
    return record


@pytest.fixture
def watch(tmp_path):
    return Watch(tmp_path, prompts=4, samples=4)


def test_quiet_where_all_is_well(watch, tmp_path):
    for i in range(30):
        assert watch.see(iteration(i, equal=0.4)) == []
        assert watch.see(evaluation(i, 0.3 + 0.01 * i, {"a": 0.5 + 0.01 * i, "b": 0.5})) == []
    assert not (tmp_path / WARNINGS).exists()


def test_a_constant_reward_is_named_once(watch, tmp_path, caplog):
    assert watch.see(iteration(1, std=0.0)) == []  # 16 images may be chance
    [warning] = watch.see(iteration(2, std=0.0))
    assert warning == "iteration 2: reward ocr was 0.5 for each of the last 32 images: it may be broken"
    assert watch.see(iteration(3, std=0.0)) == []
    assert [record.getMessage() for record in caplog.records] == [f"warning: {warning}"]
    assert (tmp_path / WARNINGS).read_text() == f"{warning}\n"


def test_pictures_that_are_all_right_are_no_broken_reward(watch):
    """0 or 1, late in a good run."""
    for i, share in enumerate([0.0, 0.2, 0.9, 1.0, 1.0, 1.0, 0.9, 1.0, 1.0]):
        std, best = (0.0, share) if share in (0, 1) else (0.3, 1.0)
        assert watch.see(iteration(i, std=std, reward=share, best=best)) == []


@pytest.mark.parametrize("value", [0.0, 0.7, 5.0])
def test_another_constant_than_the_best_is_suspicious(watch, value):
    for i in range(3):
        assert watch.see(iteration(i, reward=0.5, std=0.2, best=0.9)) == []
    assert watch.see(iteration(3, std=0.0, reward=value)) == []
    [warning] = watch.see(iteration(4, std=0.0, reward=value))
    assert f"reward ocr was {value:g} for each of the last 32 images: it may be broken" in warning


def test_a_reward_that_scores_nothing_any_more_is_named_once(watch):
    """Beside another one, without which the run would end. Now and then a list has none of its prompts."""
    for i in range(30):
        scored = {"scored/face": 0.0 if i % 10 else 0.1} | ({} if i % 10 == 5 else {"scored/hand": 0.0})
        assert watch.see(iteration(i) | scored) == []
    found = [w for i in range(30, 60) for w in watch.see(iteration(i) | {"scored/face": 0.0})]
    assert found == [
        "iteration 30: reward face scored none of the pictures of the last 10 iterations: they are trained "
        "on without it"
    ]


def test_what_scores_nothing_of_an_evaluation_is_named_once(watch):
    """As `diversity` does where there is one picture of each prompt."""
    record = evaluation(0, 0.3, {"a": 0.5}) | {"eval/scored/a": 0.4, "eval/scored/judge/diversity": 0.0}
    assert watch.see(record) == [
        "iteration 0: judge/diversity scored none of the pictures of the evaluation, which says nothing of it"
    ]
    assert watch.see(record | {"iteration": 1}) == []


def test_a_reward_that_varies_again_is_not_broken(watch):
    for i, std in enumerate([0.0, 0.1, 0.0, 0.1]):
        assert watch.see(iteration(i, std=std)) == []


def test_trained_pictures_that_get_worse_are_named_once(tmp_path):
    """As a run does whose rollout has too few steps for what it has learned: up to 0.9, and down to 0.7."""
    noise = np.random.default_rng(3).normal(0, 0.05, 120)
    rewards = np.interp(np.arange(120), [0, 40, 60, 110], [0.5, 0.9, 0.9, 0.7]) + noise
    records = [iteration(i, reward=float(reward)) for i, reward in enumerate(rewards, start=1)]
    watch = Watch(tmp_path, prompts=4, samples=4)
    found = [warning for record in records for warning in watch.see(record)]
    assert len(found) == 1 and "rollout.steps" in found[0]
    assert found[0].startswith("iteration 100: the pictures that are trained on had a mean reward of 0.7")
    resumed = Watch(tmp_path / "resumed", prompts=4, samples=4, records=records[:95])
    (tmp_path / "resumed").mkdir()
    assert [warning for record in records[95:] for warning in resumed.see(record)] == found


def test_other_prompts_are_no_fall(tmp_path):
    """A run that goes on with harder ones."""
    noise = np.random.default_rng(3).normal(0, 0.05, 60)
    records = [iteration(i, reward=float((0.9 if i <= 35 else 0.6) + noise[i])) for i in range(60)]
    records = [record | ({TRAINED_ALIKE: 36} if record["iteration"] > 35 else {}) for record in records]
    watch = Watch(tmp_path, prompts=4, samples=4)
    assert [warning for record in records for warning in watch.see(record)] == []
    watch = Watch(tmp_path, prompts=4, samples=4)
    for record in records:
        watch.see({key: value for key, value in record.items() if key != TRAINED_ALIKE})
    assert "trained pictures" in watch.given


def test_a_reward_that_goes_up_and_down_by_chance_is_no_fall(tmp_path):
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(300):
        watch = Watch(tmp_path, prompts=4, samples=4)
        for i, reward in enumerate(rng.normal(0.5, 0.2, 400)):
            alarms += len(watch.see(iteration(i, reward=float(reward))))
    assert alarms <= 4


def test_groups_without_a_signal(watch):
    found = [watch.see(iteration(i, equal=0.75)) for i in range(8)]
    assert [len(warnings) for warnings in found] == [0, 0, 0, 0, 1, 0, 0, 0]  # at 20 groups, once
    assert "75% of the last 20 groups had one reward" in found[4][0]


def test_groups_that_are_equal_as_all_is_learned(watch):
    noise = np.random.default_rng(3).normal(0, 0.02, 60)
    rewards = np.interp(np.arange(60), [0, 40], [0.4, 0.95]) + noise
    found = [
        warning
        for i, reward in enumerate(rewards)
        for warning in watch.see(iteration(i, equal=0.2 if reward < 0.9 else 0.8, reward=float(reward)))
    ]
    assert len(found) == 1 and "most pictures are right by now" in found[0]


def test_reward_hacking(watch):
    assert watch.see(evaluation(0, 0.30, {"aesthetic": 0.50})) == []
    assert watch.see(evaluation(10, 0.40, {"aesthetic": 0.55})) == []
    assert watch.see(evaluation(20, 0.50, {"aesthetic": 0.54})) == []  # within two standard errors
    [warning] = watch.see(evaluation(30, 0.60, {"aesthetic": 0.50}))
    assert "reward rises to 0.600" in warning
    assert "aesthetic 0.550 to 0.500 since iteration 10" in warning
    assert watch.see(evaluation(40, 0.70, {"aesthetic": 0.30})) == []


def test_only_evaluations_that_were_made_alike_are_compared(watch):
    """A run that goes on with more steps, say: neither its judges nor its reward are what they were."""
    since = {EVALUATED_ALIKE: 21}
    assert watch.see(evaluation(0, 0.30, {"a": 0.50}) | {"eval/clean": 0.5}) == []
    assert watch.see(evaluation(20, 0.90, {"a": 0.90})) == []
    assert watch.see(evaluation(30, 0.95, {"a": 0.50}) | since) == []  # no fall from 0.9
    [warning] = watch.see(evaluation(40, 0.99, {"a": 0.40}) | since)
    assert "a 0.500 to 0.400 since iteration 30" in warning


def test_a_fall_after_the_settings_have_changed_is_not_missed(watch):
    assert watch.see(evaluation(0, 0.80, {"a": 0.90})) == []  # above all that follows
    assert watch.see(evaluation(30, 0.50, {"a": 0.50}) | {EVALUATED_ALIKE: 21}) == []
    [warning] = watch.see(evaluation(40, 0.60, {"a": 0.40}) | {EVALUATED_ALIKE: 21})
    assert "a 0.500 to 0.400 since iteration 30" in warning


def test_judges_that_fall_with_the_reward_are_no_hacking(watch):
    for number, value in enumerate([0.6, 0.5, 0.4, 0.3]):
        assert watch.see(evaluation(number, value, {"a": value})) == []


def test_each_judge_that_falls_is_named(watch):
    watch.see(evaluation(0, 0.3, {"a": 0.5, "b": 0.5, "c": 0.5}))
    [warning] = watch.see(evaluation(1, 0.5, {"a": 0.6, "b": 0.3, "c": 0.3}))
    assert "(b 0.500 to 0.300 since iteration 0; c 0.500 to 0.300 since iteration 0)" in warning


def test_what_is_trained_on_is_no_judge(tmp_path):
    watch = Watch(tmp_path, 4, 4, {"a": 1.0})
    watch.see(evaluation(0, 0.3, {"a": 0.5}))
    assert watch.see(evaluation(1, 0.5, {"a": 0.2})) == []


PROMPTS = 40


def by_picture(tmp_path, number, **gains):
    """An evaluation of which each picture's scores are kept: hard and easy prompts, and what was gained."""
    rng = np.random.default_rng([7, number])
    hard = np.random.default_rng(99).uniform(0, 1, PROMPTS)
    values = {
        name: hard + gain + rng.normal(0, 0.02, PROMPTS)
        for name, gain in {"reward": 0.1 * number, **gains}.items()
    }
    prompts = [f"prompt {i}" for i in range(PROMPTS)]
    index, seeds = range(PROMPTS), [1] * PROMPTS
    scores = Scores(index, prompts, seeds, [""] * PROMPTS, [False] * PROMPTS, values)
    write_scores(scores_path(tmp_path, number), scores)
    judged = {name.removeprefix("judge/"): of for name, of in values.items() if name.startswith("judge/")}
    metrics = judge_metrics(values["reward"], judged, prompts) | {
        "eval/reward_mean": float(values["reward"].mean())
    }
    metrics |= {"eval/clean": float(values["clean"].mean())} if "clean" in values else {}
    return {"iteration": number} | metrics


def test_evaluations_are_paired_picture_by_picture(watch, tmp_path):
    """Prompts differ from one another far more than a prompt does from itself."""
    first = by_picture(tmp_path, 0, **{"judge/a": 0.0})
    later = by_picture(tmp_path, 10, **{"judge/a": -0.03})
    for record in (first, later):
        assert record["standard_error/judge/a"] > 0.03
    assert watch.see(first) == []
    [warning] = watch.see(later)
    assert "the trained reward rises to" in warning and "a 0." in warning
    # without what each picture got, the two means' errors do not tell it from chance
    for number in (0, 10):
        scores_path(tmp_path, number).unlink()
    unpaired = Watch(tmp_path / "unpaired", 4, 4)
    (tmp_path / "unpaired").mkdir()
    assert unpaired.see(first) == unpaired.see(later) == []


def test_clean_pictures_are_a_judge(watch, tmp_path):
    assert watch.see(by_picture(tmp_path, 0, clean=0.0)) == []
    [warning] = watch.see(by_picture(tmp_path, 10, clean=-0.1))
    assert "(clean 0." in warning


JUDGES, EVALUATIONS = 4, 12


def evaluated(folder, falls, run=0):
    """The evaluations of a run in which the reward rises and one of the judges falls, the others do not."""
    for number in range(EVALUATIONS):
        gains = {f"judge/{i}": 0.0 for i in range(JUDGES)} | {"judge/2": falls(number)}
        yield by_picture(folder, number + EVALUATIONS * run, **gains)


def watched(folder, run, falls=lambda number: 0.0):
    """What is warned of in it."""
    folder.mkdir()
    watch = Watch(folder, 4, 4, evaluations=EVALUATIONS - 1)
    for record in evaluated(folder, falls, run):
        watch.see(record)
    return watch.given.get("hacking", "")


def test_chance_is_none(tmp_path):
    """Many judges, many evaluations, and nothing but noise: in one run of twenty at most."""
    warned = sum(bool(watched(tmp_path / str(run), run)) for run in range(40))
    assert warned <= 2, warned


def test_among_many_comparisons_a_fall_is_found(tmp_path):
    """Of one judge of several, late, and by a third of what the prompts differ by."""
    found = [watched(tmp_path / str(run), run, lambda number: -0.03 * (number >= 9)) for run in range(10)]
    assert all("(2 0." in text and ";" not in text.partition("(2 0.")[2] for text in found), found


def test_a_reward_of_weight_0_is_a_judge_as_well(tmp_path):
    """Kept beside the trained one, with a judge of its name: in the run's alarm and in its report."""
    recipe = load_recipe("builtin", ["rewards={geneval: 1.0, colorfulness: 0.0}"])
    assert list(RunLog(tmp_path / "log", recipe)._watch.rewards) == ["geneval"]
    for weight, expected in ((0.0, ["judge/2"]), (0.5, [])):
        config = CONFIG | {"rewards": {"ocr": {"weight": 1.0}, "2": {"weight": weight}}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        records = evaluated(tmp_path, lambda number: -0.05 * (number >= 9))
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        assert [fall.judge for fall in exploited(read_run(tmp_path))] == expected


def test_errors_that_are_not_known_say_nothing(watch):
    """Of one prompt, without what each picture got."""
    assert watch.see(evaluation(0, 0.3, {"a": 0.5}, error=0.0)) == []
    assert watch.see(evaluation(1, 0.5, {"a": 0.4}, error=0.0)) == []


CONFIG = {"rewards": {"ocr": 1.0}, "train": {"iterations": 110}, "evaluate": {"every": 10}}
# of one judge, in a run by its seed, and whether it is hacking
FALLS = {
    "nothing": (0, lambda number: 0.0, False),
    "no more than so many comparisons": (54, lambda number: -0.004 * (number == 11), False),
    "between": (0, lambda number: -0.03 * (4 <= number < 8), True),
    "at the end": (0, lambda number: -0.03 * (number >= 9), True),
}


@pytest.mark.parametrize("name", FALLS)
def test_the_report_says_the_same(tmp_path, name):
    """With and without what was warned of while it ran: the same sentence, once, or none."""
    seed, fall, hacking = FALLS[name]
    text = watched(tmp_path / "run", seed, fall)
    assert bool(text) == hacking
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    records = evaluated(tmp_path / "run", fall, seed)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    run = read_run(tmp_path / "run")
    assert [line for line in run.warned if "hacking" in line] == [text] * hacking
    for warned in (run.warned, []):
        run.warned = warned
        found = [line for line in warnings(run, changes(run)) if "hacking" in line]
        assert found == [sentence(text)] * hacking
    assert hacking == any(one.metric == "eval/judge/2" for one in advice(run, changes(run)))
    if seed:  # of the first and the last evaluation alone one would call it a fall
        first, last = (row["iteration"] for row in ends(run))
        assert compared(run, first, last, "judge/2").direction(among=JUDGES) < 0


def test_a_resumed_run_knows_what_was_given(watch, tmp_path):
    records = [iteration(i, equal=0.75, std=0.0) for i in range(4)]
    for record in records:
        watch.see(record)
    before = (tmp_path / WARNINGS).read_text()
    resumed = Watch(tmp_path, 4, 4, (), records)
    assert (tmp_path / WARNINGS).read_text() == before
    following = iteration(5, equal=0.75, std=0.0)
    assert resumed.see(following) == watch.see(following) and resumed.given == watch.given


def test_metrics_of_an_iteration():
    scores = {"a": np.array([[1.0, 1.0], [0.0, 1.0]]), "b": np.full((2, 2), 0.1)}
    found = reward_metrics(scores, {"a": 2.0, "b": 1.0})
    assert found["reward_mean"] == pytest.approx(1.6) and found["reward_std"] == pytest.approx(
        2 * np.sqrt(3) / 4
    )
    assert found["groups_equal"] == 0.5
    assert found["reward/a"] == 0.75 and found["reward_std/b"] == 0.0 and found["reward_std/a"] > 0
    assert found["reward_best/a"] == 1.0
    fewer = {"a": np.array([[0.25, 0.5], [np.nan, 3.0]])}
    assert reward_metrics(fewer, {"a": -1.0})["reward_best/a"] == 0.25


def test_metrics_of_judges():
    values = np.array([0.0, 1.0, 1.0, 0.0])
    for prompts, expected in [
        ("abcd", stats.sem(values)),
        ("abba", stats.sem([0.0, 1.0])),  # as two prompts
        ("aaaa", 0.0),
    ]:
        found = judge_metrics(2 * values, {"clip": values}, list(prompts))
        assert found == {
            "eval/judge/clip": 0.5,
            "standard_error/reward": pytest.approx(2 * expected),
            "standard_error/judge/clip": pytest.approx(expected),
        }


def test_gdpo_against_a_direct_computation():
    """Each reward standardised in its group, summed by weight, then by the batch (arXiv 2601.05242)."""
    rng = np.random.default_rng(0)
    scores = {"a": rng.normal(5, 100, (3, 4)), "b": rng.uniform(0, 0.01, (3, 4)), "c": np.full((3, 4), 0.1)}
    weights = {"a": 1.0, "b": 0.5, "c": 9.0}
    summed = [[0.0] * 4 for _ in range(3)]
    for name, weight in weights.items():
        for p in range(3):
            group = scores[name][p].tolist()
            mean = sum(group) / 4
            spread = (sum((x - mean) ** 2 for x in group) / 4) ** 0.5
            for k in range(4):
                summed[p][k] += weight * (group[k] - mean) / max(spread, 1e-6)
    flat = [x for row in summed for x in row]
    mean = sum(flat) / 12
    spread = (sum((x - mean) ** 2 for x in flat) / 12) ** 0.5
    expected = [[(x - mean) / spread for x in row] for row in summed]
    found = advantages(combine(scores, weights, "gdpo"), "global")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # the sum of the raw rewards follows the one with the largest spread, GDPO hears both
    plain = advantages(combine(scores, weights, "sum"), "global")
    assert abs(np.corrcoef(plain.ravel(), scores["b"].ravel())[0, 1]) < abs(
        np.corrcoef(found.ravel(), scores["b"].ravel())[0, 1]
    )
