"""Mixed lists: rewards that do not score every picture, and what becomes of the rest."""

import json
import math

import numpy as np
import pytest

from crd_fast.errors import UserError
from crd_fast.prompts.source import PromptSource
from crd_fast.rewards import Rewards
from crd_fast.rewards.advantage import advantages, combine, kinds
from crd_fast.rewards.reports import means
from crd_fast.rewards.scoring import Reward, checked, with_none
from crd_fast.run.scores import compare, gap, mean_of, read_scores, write_scores
from crd_fast.run.watch import judge_metrics, reward_metrics
from tests.cli.conftest import SMALL, metrics
from tests.rewards.conftest import assert_refused
from tests.training.test_scores import drawn, scores

NAN = math.nan
MODULE = """
def plain(images, prompts, metadata):
    '''Of prompts without GenEval's metadata.'''
    return [None if "include" in entry else 10 * float(image.mean()) / 255
            for image, entry in zip(images, metadata)]

def some(images, prompts, metadata):
    return [None if "ring" in prompt else float(image.mean()) for image, prompt in zip(images, prompts)]

def nothing(images, prompts, metadata):
    return [None] * len(images)

class Refusing:
    def check(self, metadata):
        if any("include" in entry for entry in metadata):
            raise ValueError("not for this one")
    def score(self, images, prompts, metadata):
        self.check(metadata)
        return [float(image.mean()) for image in images]
    def report(self, images, prompts, metadata):
        self.check(metadata)
        return {"seen": len(images), "per_image": {"first": images[:, 0, 0, 0]}}
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A user's rewards, and a file of prompts that GenEval's rules cannot judge, in the current folder."""
    (tmp_path / "parts.py").write_text(MODULE)
    (tmp_path / "plain.txt").write_text("a red circle\na blue ring\n")
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def trained(inside, *settings):
    given = [argument for setting in settings for argument in ("--set", setting)]
    return inside("train", "small.yaml", "--output", "run", *given)


def test_advantages_are_of_what_was_scored():
    a = np.array([[0.0, 1.0, NAN, 3.0], [NAN] * 4, [5.0, 5.0, 7.0, 7.0]])
    b = np.array([[NAN] * 4, [100.0, 300.0, 200.0, NAN], [NAN] * 4])
    found, weights = {"a": a, "b": b}, {"a": 2.0, "b": 0.1}
    assert kinds(found, weights).tolist() in ([1, 0, 1], [0, 1, 0])
    total = combine(found, weights, "sum")
    np.testing.assert_array_equal(total, [[0, 2, NAN, 6], [10, 30, 20, NAN], [10, 10, 14, 14]])
    of_a, of_b = np.std([0, 2, 6, 10, 10, 14, 14]), np.std([10, 30, 20])
    mean = 8 / 3
    expected = [
        [-mean / of_a, (2 - mean) / of_a, 0, (6 - mean) / of_a],
        [-10 / of_b, 10 / of_b, 0, 0],
        [-2 / of_a, -2 / of_a, 2 / of_a, 2 / of_a],
    ]
    np.testing.assert_allclose(advantages(total, "global", kinds(found, weights)), expected, rtol=1e-12)
    by_group = advantages(total, "group")
    np.testing.assert_allclose(
        by_group[0], (np.array([0, 2, mean, 6]) - mean) / np.std([0, 2, 6]), atol=1e-12
    )
    gdpo = combine(found, weights, "gdpo")
    np.testing.assert_allclose(gdpo[1, :3], 0.1 * np.array([-1, 1, 0]) / np.std([-1, 1, 0]))
    assert np.isnan(gdpo[1, 3])


def test_the_mean_of_its_prompt_stands_in_where_others_scored():
    found = {"a": np.array([[1.0, NAN, 4.0]]), "b": np.array([[10.0, 20.0, 30.0]])}
    np.testing.assert_array_equal(combine(found, {"a": 1.0, "b": 1.0}, "sum"), [[11.0, 22.5, 34.0]])
    np.testing.assert_allclose(
        combine(found, {"a": 1.0, "b": 1.0}, "gdpo"), [[-1 - 1.5**0.5, 0, 1 + 1.5**0.5]], atol=1e-12
    )


def test_a_reward_of_weight_0_changes_nothing():
    """Whom it scores and whom not: mean, spread and advantages are of what is trained on."""
    a = {"a": np.array([[1.0, 2.0, NAN, 4.0], [NAN] * 4, [0.0, 10.0, 20.0, 30.0]])}
    both = a | {"b": np.array([[1.0] * 4, [1.0] * 4, [NAN] * 4])}
    weights = {"a": 1.0, "b": 0.0}
    for aggregate in ("sum", "gdpo"):
        assert np.array_equal(
            combine(both, weights, aggregate), combine(a, weights, aggregate), equal_nan=True
        )
    assert np.array_equal(kinds(both, weights), kinds(a, weights))
    metrics, alone = reward_metrics(both, weights), reward_metrics(a, weights)
    assert {key: metrics[key] for key in ("reward_mean", "reward_std")} == {
        key: alone[key] for key in ("reward_mean", "reward_std")
    }
    rewards = Rewards({"colorfulness": 1.0, "jpeg_compressibility": 0.0})
    values = {"colorfulness": both["a"].ravel(), "jpeg_compressibility": both["b"].ravel()}
    prompts = [{"prompt": str(i // 4)} for i in range(12)]
    assert np.array_equal(rewards.combined(values, prompts), values["colorfulness"], equal_nan=True)


def test_an_evaluation_combines_as_training_does():
    """What one reward left out has the mean of its prompt's others; in whatever order the pictures come."""
    weights = {"colorfulness": 1.0, "jpeg_compressibility": 2.0}
    a = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, NAN], [NAN, NAN, NAN]])
    b = np.array([[0.5, NAN, 1.0], [NAN, NAN, NAN], [NAN, 7.0, NAN]])
    expected = combine(dict(zip(weights, (a, b))), weights, "sum").ravel()
    prompts = [{"prompt": f"prompt {i // 3}"} for i in range(9)]
    order = np.random.default_rng(0).permutation(9)
    values = {name: of.ravel()[order] for name, of in zip(weights, (a, b))}
    found = Rewards(weights).combined(values, [prompts[i] for i in order])
    assert np.array_equal(found, expected[order], equal_nan=True)
    assert found[list(order).index(1)] == 2.0 + 2 * 0.75


def test_with_all_scored_nothing_changes():
    rng = np.random.default_rng(0)
    found, weights = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=(5, 4))}, {"a": 0.3, "b": 0.7}
    total = 0.3 * found["a"] + 0.7 * found["b"]
    assert np.array_equal(combine(found, weights, "sum"), total)
    centered = total - total.mean(axis=1, keepdims=True)
    assert np.array_equal(advantages(total, "global", kinds(found, weights)), centered / total.std())


def test_metrics_are_of_what_was_scored():
    found = reward_metrics(
        {"a": np.array([[1.0, NAN], [NAN, NAN]]), "b": np.array([[NAN, NAN], [0.1, 0.1]])},
        {"a": 1.0, "b": 2.0},
    )
    assert found["reward/a"] == 1.0 and found["scored/a"] == 0.25 and found["reward_std/a"] == 0.0
    assert found["reward/b"] == pytest.approx(0.1) and found["scored/b"] == 0.5
    assert found["reward_mean"] == pytest.approx((1.0 + 0.2 + 0.2) / 3) and found["groups_equal"] == 1.0
    judged = judge_metrics(np.array([1.0, NAN, 3.0]), {"j": np.array([NAN] * 3)}, ["a", "b", "c"])
    assert judged == {"eval/scored/judge/j": 0.0, "standard_error/reward": pytest.approx(1.0)}


def test_a_reward_and_a_judge_of_one_name_have_each_its_share():
    """As one reward has with other settings as a judge."""
    found = means({"a": np.array([1.0, NAN])}, "reward") | means(
        {"a": np.array([1.0, NAN, NAN, NAN])}, "judge"
    )
    assert found == {"reward/a": 1.0, "scored/a": 0.5, "judge/a": 1.0, "scored/judge/a": 0.25}


def test_none_is_not_scored_and_nan_is_refused():
    values = checked("mine", [None, 0.5, None], 3)
    np.testing.assert_array_equal(values, [NAN, 0.5, NAN])
    assert with_none(values) == [None, 0.5, None]
    for value in (NAN, math.inf, "0.5"):
        with pytest.raises(UserError, match="expected finite numbers"):
            checked("mine", [None, value], 2)


def test_scores_of_pictures_keep_it(tmp_path):
    before, after = drawn(0, 60)
    before[:20], after[10:30] = NAN, NAN
    other = np.arange(60.0)
    first, last = scores({"reward": before, "x": other}), scores({"reward": after, "x": 2 * other})
    write_scores(tmp_path / "first.jsonl", first)
    assert '"reward": null' in (tmp_path / "first.jsonl").read_text()
    np.testing.assert_array_equal(read_scores(tmp_path / "first.jsonl").values["reward"], before)
    both = compare(first, last, "reward")
    plain = compare(scores({"reward": before[30:]}), scores({"reward": after[30:]}), "reward")
    assert (both.prompts, both.pictures) == (30, 30)
    assert (both.difference, both.error) == pytest.approx((plain.difference, plain.error), rel=1e-12)
    assert mean_of(first, "reward")[0] == pytest.approx(before[20:].mean())
    assert math.isfinite(gap(first, last, "reward", "x").difference)
    unscored = scores({"reward": np.full(60, NAN)})
    assert all(map(math.isnan, mean_of(unscored, "reward")))
    with pytest.raises(UserError, match="expected pictures that were scored"):
        compare(first, unscored, "reward")


def test_a_run_of_two_kinds_of_prompts(inside, parts):
    """Each reward scores its own prompts; the held-out ones are GenEval's alone."""
    settings = ("rewards={geneval: {skip_others: true}, 'parts:plain': 1}", "rollout.prompts_per_iteration=4")
    settings += ("eval_rewards={'parts:nothing': {}, colorfulness: {}}",)  # a judge of none of these pictures
    code, _, err = trained(inside, *settings, "rollout.prompts={builtin: 3, plain.txt: 1}")
    assert code == 0, err
    records = metrics(parts / "run")
    for record in records[1:]:
        assert record["scored/geneval"] == 0.75 and record["scored/parts:plain"] == 0.25
        assert 0 <= record["reward/geneval"] <= 1 < record["reward/parts:plain"]
        expected = 0.75 * record["reward/geneval"] + 0.25 * record["reward/parts:plain"]
        assert record["reward_mean"] == pytest.approx(expected)
    assert records[0]["eval/scored/parts:plain"] == 0 and "eval/reward/parts:plain" not in records[0]
    assert records[0]["eval/reward_mean"] == pytest.approx(records[0]["eval/reward/geneval"])
    line = json.loads((parts / "run/evaluations/000002.jsonl").read_text().splitlines()[0])
    assert line["scores"]["reward/parts:plain"] is None and line["scores"]["reward/geneval"] is not None
    code, _, err = inside("report", "run")
    assert code == 0, err
    code, _, err = inside("eval", "run", "--allow-code", "--json", "found.json")
    assert code == 0 and "NaN" not in (parts / "found.json").read_text(), err


@pytest.mark.parametrize(
    "settings, words",
    [
        (("rewards={'parts:nothing': 1}",), "expected at least one that scores pictures of 'a red circle'"),
        (
            ("rewards={'parts:nothing': 1}", "evaluate.every=1"),
            "evaluation: expected a reward of some pictures, got None of all by parts:nothing",
        ),
        (
            ("rewards={geneval: {skip_others: true}}",),
            "reward geneval: expected prompts that it scores, got none",
        ),
        (
            ("rewards={geneval: {skip_others: true}}", "rollout.prompts={builtin: 1, plain.txt: 1}"),
            "expected at least one that scores pictures of 'a red circle'",
        ),
        (
            ("rewards={geneval: 1, 'parts:plain': 1}",),
            "; geneval: {skip_others: true} leaves such prompts to the other rewards",
        ),
        (("rewards={'parts:plain': {skip_others: true}}",), "expected of a reward that checks prompts"),
        (("rewards={geneval: {skip_others: 3}}",), "skip_others: expected true or false, got 3"),
    ],
)
def test_a_prompt_that_nothing_scores(inside, parts, settings, words):
    (parts / "plain.txt").write_text("a red circle\n")
    result = trained(inside, "evaluate.every=0", "rollout.prompts=plain.txt", *settings)
    assert_refused(result, words)


@pytest.mark.filterwarnings("error:All-NaN:RuntimeWarning")
def test_a_prompt_that_is_once_not_scored_ends_no_run(inside, parts, caplog):
    """Nothing is learned from it, as from one whose samples are all alike."""
    settings = ("rewards={'parts:some': 1}", "rollout.prompts=plain.txt", "evaluate.every=0")
    code, _, err = trained(inside, *settings, "rollout.prompts_per_iteration=2")
    assert code == 0, err
    for record in metrics(parts / "run"):
        assert record["scored/parts:some"] == 0.5 and record["groups_equal"] == 0.5
        assert record["grad_norm"] > 0
    warned = [text for text in caplog.messages if "expected at least one that scores" in text]
    assert len(warned) == 1 and "iteration 1: rewards: " in warned[0] and "'a blue ring'" in warned[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_is_asked_for_its_own_pictures(parts, workers):
    settings = {"skip_others": True} | ({"workers": 1} if workers else {})
    rewards = Rewards({"parts:Refusing": settings, "parts:plain": 1.0, "parts:nothing": 1.0}, device="cpu")
    judged = PromptSource("builtin").entries()[0]
    entries = [{"prompt": "a"}, judged, judged, {"prompt": "b"}]
    rewards.check(entries)
    rewards.check_cut(judged, "cut")
    images = np.arange(4 * 12, dtype=np.uint8).reshape(4, 2, 2, 3)
    values = rewards.score(images, entries)
    np.testing.assert_array_equal(values["parts:Refusing"], [5.5, NAN, NAN, 41.5])
    found, per_image = rewards.report(images, entries, values)
    assert found["seen"] == 2 and found["scored/parts:Refusing"] == 0.5
    np.testing.assert_array_equal(per_image["first"], [0, NAN, NAN, 36])
    rewards.close()


def test_a_servers_null_is_none(served_rewards):
    from tests.rewards.serving import serving, wait_until_ready

    with serving("some", token=None) as address:
        wait_until_ready(address)
        images = np.zeros((3, 4, 4, 3), dtype=np.uint8)
        values = Rewards({address: 1.0}).score(images, [{"prompt": p} for p in ("a", "skip", "b")])
    np.testing.assert_array_equal(values[address], [1.0, NAN, 1.0])


def test_what_fits_is_asked_of_each_prompt():
    reward = Reward("mine", lambda images, *_: [1.0] * len(images), fits=lambda entry: entry["n"] > 1)
    images = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    assert with_none(reward.values(images, ["a"] * 3, [{"n": n} for n in (1, 2, 3)])) == [None, 1.0, 1.0]
    assert with_none(reward.values(images[:1], ["a"], [{"n": 1}])) == [None]
