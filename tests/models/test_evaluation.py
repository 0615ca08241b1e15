"""Evaluations of a pipeline: not made where they are switched off, checked before anything is encoded."""

import pytest

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.models.pipeline import PipelineModel
from crd_fast.rewards import Rewards
from crd_fast.train.evaluate import HeldOut
from crd_fast.train.trainer import Trainer


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that text encoders are asked for."""
    prompts = []
    original = PipelineModel.encode

    def noted(self, now, ahead=(), *rest):
        now, ahead = list(now), list(ahead)
        prompts.extend([*now, *ahead])
        return original(self, now, ahead, *rest)

    monkeypatch.setattr(PipelineModel, "encode", noted)
    return prompts


@pytest.fixture
def off(tiny, recipe, tmp_path):
    """Values of a recipe without an evaluation, whose prompts and reward are for written words."""
    words = tmp_path / "words.txt"
    words.write_text('a sign that says "CAT"\na sign that says "DOG"\n')
    values = recipe(tiny("sd3"), f"rollout.prompts={words}", "rewards={ocr: {mode: word}}").model_dump()
    del values["evaluate"]["prompts"]
    return values


def test_an_evaluation_that_is_off_is_not_made(off, encoded, tmp_path):
    """The default's prompts have no written word: the reward would refuse them."""
    trainer = Trainer(build_recipe(off), tmp_path / "run")
    assert trainer.evaluation is None
    assert set(encoded) == {"", 'a sign that says "CAT"', 'a sign that says "DOG"'}
    off["evaluate"]["every"] = 1
    with pytest.raises(UserError, match=r"evaluate\.prompts: expected some of its own"):
        Trainer(build_recipe(off), tmp_path / "run")


def test_a_checkpoint_of_such_a_run_is_evaluated_on_prompts_that_are_given(off):
    recipe = build_recipe(off)
    with pytest.raises(UserError, match=r"set evaluate\.prompts$"):
        HeldOut(recipe, Rewards(recipe.rewards))
    recipe = build_recipe(off, [f"evaluate.prompts={off['rollout']['prompts']}"])
    assert len(HeldOut(recipe, Rewards(recipe.rewards)).entries) == 2


@pytest.mark.parametrize(
    "setting, words",
    [
        ("eval_rewards={pickscor: {}}", "did you mean 'pickscore'"),
        ("evaluate.prompts=none.txt", "none.txt: cannot be read"),
        ("eval_rewards={ocr: {}}", "ocr"),  # prompts without a word to read
    ],
)
def test_judges_and_prompts_are_checked_before_anything_is_encoded(
    tiny, recipe, encoded, tmp_path, setting, words
):
    with pytest.raises(UserError, match=words):
        Trainer(recipe(tiny("sd3"), "evaluate.every=1", setting), tmp_path / "run")
    assert not encoded
