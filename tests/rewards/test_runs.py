"""Rewards in a run: beside the rollout, when they fail, as judges."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crd_fast.config import load_recipe
from tests.cli.conftest import metrics, no_charts  # noqa: F401
from tests.rewards.conftest import assert_refused, recipe_file

pytestmark = pytest.mark.usefixtures("no_charts")  # nobody looks at the charts of these runs

SETTINGS = ("rollout.micro_batch=3", "evaluate.every=0", "train.iterations=2")


def train(recipe, output, overrides=SETTINGS):
    from crd_fast.train.trainer import Trainer

    trainer = Trainer(load_recipe(recipe, overrides), output)
    trainer.run()
    return metrics(output), load_file(sorted((output / "checkpoints").iterdir())[-1] / "training.safetensors")


class Afterwards:
    """Scores one call after another when asked for results: no thread, nothing at the same time."""

    def __init__(self, rewards):
        self.rewards, self.calls = rewards, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def put(self, images, metadata):
        self.calls.append((images, [entry["prompt"] for entry in metadata], metadata))

    def results(self):
        return {
            reward.name: np.concatenate([np.array(reward.score(*call)) for call in self.calls])
            for reward in self.rewards
        }


def test_results_do_not_depend_on_the_overlap(mine, tmp_path, monkeypatch):
    recipe = recipe_file(
        tmp_path, "rewards: {geneval: 1.0, 'mine:redness': 0.5}\nadvantage: {aggregate: gdpo}\n"
    )
    found, found_weights = train(recipe, tmp_path / "beside")
    calls = mine().calls
    assert {thread for thread, _ in calls} == {"reward mine:redness"}
    # tried out, then two iterations of two prompts by four samples
    assert [len(prompts) for _, prompts in calls] == [4] * 5
    assert all(len(set(prompts)) == 1 for _, prompts in calls)
    monkeypatch.setattr("crd_fast.rewards.registry.Scoring", Afterwards)
    expected, expected_weights = train(recipe, tmp_path / "after")
    assert found == expected
    assert all(torch.equal(found_weights[name], value) for name, value in expected_weights.items())
    record = found[-1]
    assert record["reward_mean"] == pytest.approx(
        record["reward/geneval"] + 0.5 * record["reward/mine:redness"]
    )
    assert "groups_equal" in record and "reward_std/geneval" in record


def test_a_reward_that_fails_ends_the_run_and_keeps_its_checkpoints(inside, mine, tmp_path):
    recipe = recipe_file(tmp_path, "rewards: {'mine:third_time': 1.0}\n")
    overrides = [
        item for setting in ("evaluate.every=0", "train.iterations=9") for item in ("--set", setting)
    ]
    result = inside("train", recipe, "--output", tmp_path / "run", *overrides)
    assert_refused(
        result,
        "iteration 3: reward mine:third_time: RuntimeError: no more",
        "checkpoints up to the last one are intact",
    )
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "iteration-000001",
        "iteration-000002",
    ]
    assert [record["iteration"] for record in metrics(tmp_path / "run")] == [1, 2]


def test_a_reward_that_hangs_ends_the_run(inside, mine, tmp_path):
    recipe = recipe_file(tmp_path, "rewards: {'mine:slow': {timeout: 0.2}}\n")
    result = inside("train", recipe, "--output", tmp_path / "run", "--set", "evaluate.every=0")
    assert_refused(result, "error: reward mine:slow: expected values within 0.2 s, got none")


def test_judges_are_scored_at_evaluations_and_never_trained_on(inside, mine, tmp_path):
    judged = recipe_file(
        tmp_path, "rewards: {'mine:redness': 1.0}\neval_rewards: {diversity: {}, colorfulness: 5.0}\n"
    )
    alone = recipe_file(tmp_path, "rewards: {'mine:redness': 1.0}\n", "alone.yaml")
    settings = ["evaluate.samples_per_prompt=2", "evaluate.guided_base=false"]
    found, found_weights = train(judged, tmp_path / "judged", settings)
    expected, expected_weights = train(alone, tmp_path / "alone", settings)
    extra = {"eval/judge/diversity", "eval/judge/colorfulness"}
    errors = {"standard_error/reward", "standard_error/judge/diversity", "standard_error/judge/colorfulness"}
    assert [set(a) - set(b) for a, b in zip(found, expected)] == [extra | errors, set(), extra | errors]
    assert [{k: v for k, v in r.items() if k not in extra | errors} for r in found] == expected
    assert all(torch.equal(found_weights[name], value) for name, value in expected_weights.items())
    assert found[0]["eval/judge/diversity"] > 0
    refused = recipe_file(tmp_path, "eval_rewards: {ocr: 1.0}\n", "refused.yaml")
    pytest.importorskip("rapidocr", reason="needs rapidocr and onnxruntime")
    assert_refused(
        inside("train", refused, "--output", tmp_path / "refused"),
        "reward ocr: expected a text in double quotes",
    )


def test_a_reward_that_is_constant_is_warned_of_once(mine, tmp_path, caplog):
    recipe = recipe_file(tmp_path, "rewards: {'mine:Thing': {sharpness: 7.0}}\n")
    train(recipe, tmp_path / "run", ["evaluate.every=0", "train.iterations=5"])
    warning = "iteration 4: reward mine:Thing was 7 for each of the last 32 images: it may be broken"
    assert (tmp_path / "run" / "warnings.txt").read_text() == f"{warning}\n"
    assert [r.getMessage() for r in caplog.records if r.name == "crd_fast"] == [f"warning: {warning}"]


@pytest.mark.parametrize("key", ["rewards", "eval_rewards"])
@pytest.mark.parametrize(
    "broken, words",
    [
        ("{'mine:fails': 1.0}", "reward mine:fails: RuntimeError: broken"),
        ("{'mine:slow': {timeout: 0.2}}", "reward mine:slow: expected values within 0.2 s, got none"),
        ("{'mine:nothing_there': 1.0}", "'mine:nothing_there' cannot be imported"),
    ],
)
def test_rewards_and_judges_are_tried_out_before_anything_is_loaded(
    inside, mine, tmp_path, monkeypatch, key, broken, words
):
    def loaded(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("crd_fast.train.trainer.load_model", loaded)
    rewards = "" if key == "rewards" else "rewards: {'mine:redness': 1.0}\n"
    recipe = recipe_file(tmp_path, f"{rewards}{key}: {broken}\n")
    assert_refused(inside("train", recipe, "--output", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()


def test_what_a_reward_is_tried_out_with(mine, tmp_path):
    """One prompt's samples, as in training, and so few that a slow reward is no burden."""
    from crd_fast.rewards import Rewards

    Rewards({"mine:redness": 1.0}).try_out([{"prompt": "a"}], 10**6, samples=24)
    assert [prompts for _, prompts in mine().calls] == [["a"] * 4]


def test_a_full_disk_is_found_before_anything_is_loaded(inside, mine, tmp_path, monkeypatch):
    monkeypatch.setattr("crd_fast.train.trainer.SMALLEST_SPACE", 1e18)
    recipe = recipe_file(tmp_path, "rewards: {'mine:redness': 1.0}\n")
    refused = inside("train", recipe, "--output", tmp_path / "new" / "run")
    assert_refused(refused, "run: expected 931322574.62 GB free on its disk for checkpoints")
    assert not (tmp_path / "new").exists() and not mine().calls


def test_a_run_goes_on_where_its_own_checkpoints_fill_the_disk(inside, tmp_path, monkeypatch):
    """Of three that there will be two are there."""
    run = tmp_path / "run"
    small = ("--set", "evaluate.every=0", "--gpu", "rtx-4090")
    assert inside("train", recipe_file(tmp_path, ""), "--output", run, *small)[0] == 0
    one = sum(path.stat().st_size for path in next((run / "checkpoints").iterdir()).rglob("*"))
    monkeypatch.setattr("crd_fast.train.trainer.SMALLEST_SPACE", 0)
    going_on = ("train", "--resume", run, "--max-iterations", "3", "--gpu", "rtx-4090")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=one // 2))
    assert_refused(inside(*going_on), "free on its disk for checkpoints")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * one // 2))
    assert inside(*going_on)[0] == 0
