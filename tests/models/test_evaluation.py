"""Evaluations of a pipeline: not made where they are switched off, checked before anything is encoded."""

import pytest
import torch

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.models.pipeline import PipelineModel
from crd_fast.rewards import Rewards
from crd_fast.run.scores import read_scores, scores_path
from crd_fast.train.evaluate import HeldOut, to_uint8
from crd_fast.train.inference import Source
from crd_fast.train.inference import evaluated as evaluated_sources
from crd_fast.train.trainer import Trainer
from tests.models.conftest import short


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
    """Of two prompts none can be held out."""
    trainer = Trainer(build_recipe(off), tmp_path / "run")
    assert trainer.evaluation is None
    assert set(encoded) == {"", 'a sign that says "CAT"', 'a sign that says "DOG"'}
    off["evaluate"]["every"] = 1
    with pytest.raises(UserError, match=r"evaluate\.prompts: 2 different prompts for training are too few"):
        Trainer(build_recipe(off), tmp_path / "run")


def test_a_checkpoint_of_such_a_run_is_evaluated_on_prompts_that_are_given(off):
    recipe = build_recipe(off)
    with pytest.raises(UserError, match=r"evaluate\.prompts: expected a file"):
        HeldOut(recipe, Rewards(recipe.rewards))
    recipe = build_recipe(off, [f"evaluate.prompts={off['rollout']['prompts']}"])
    assert len(HeldOut(recipe, Rewards(recipe.rewards)).entries) == 2


def test_more_pictures_than_any_machine_holds_are_refused():
    recipe = load_recipe("builtin", ["evaluate.samples_per_prompt=1000000", "evaluate.max_prompts=6"])
    words = r"evaluate\.samples_per_prompt: expected at most 1000000 pictures .* 1000000 of each of 6 prompts"
    with pytest.raises(UserError, match=words):
        HeldOut(recipe, Rewards(recipe.rewards))


def test_guided_evaluations_of_unguided_rollouts_leave_the_rollouts_micro_batch(tmp_path, monkeypatch):
    """Their forwards are twice as large: what they do not fit with says nothing about the rollout."""
    trainer = Trainer(load_recipe("builtin", ["rollout.micro_batch=8"]), tmp_path / "run")
    evaluation, drawn = trainer.evaluation, []
    monkeypatch.setattr(evaluation, "run_with", lambda sampling, observer: drawn.append(sampling))
    for guided, rollout in ((1.0, 1.0), (4.5, 1.0), (4.5, 4.5)):
        changes = [f"evaluate.guidance_scale={guided}", f"rollout.guidance_scale={rollout}"]
        evaluation.recipe = build_recipe(trainer.recipe.model_dump(), changes)
        evaluation.run()
    assert [sampling.micro_batch.size for sampling in drawn] == [8, 4, 8]
    assert [sampling.guidance_scale for sampling in drawn] == [1.0, 4.5, 4.5]
    assert [sampling.micro_batch is evaluation.micro_batch for sampling in drawn] == [True, False, True]


def test_held_out_prompts_of_a_file_are_evaluated_and_not_trained_on(tiny, recipe, tmp_path, caplog):
    prompts, run = tmp_path / "many.txt", tmp_path / "run"
    prompts.write_text("\n".join(f"a red circle, {i}" for i in range(80)))
    settings = ["evaluate.every=2", "evaluate.steps=1", "evaluate.prompts=auto", "evaluate.guided_base=false"]
    settings += ["rollout.prompts_per_iteration=72", "rollout.samples_per_prompt=2", "rollout.steps=1"]
    settings += ["train.timesteps=1", "train.iterations=1", f"rollout.prompts={prompts}"]
    drawn = recipe(tiny("sd3"), short("sd3"), *settings)
    trainer = Trainer(drawn, run)
    assert trainer.run()
    assert sum("held out: 8 of 80 prompts" in record.getMessage() for record in caplog.records) == 1
    evaluated = read_scores(scores_path(run, 0))
    assert len(evaluated) == 8 and evaluated.trained_on() == (0, 8)
    trained = {entry["prompt"] for entry in trainer.prompts.drawn(0)}
    assert len(trained) == 72 and not trained & set(evaluated.prompts)
    source = Source.of(str(run))
    assert HeldOut(source.recipe, trainer.rewards).entries == trainer.evaluation.metadata
    caplog.clear()
    list(evaluated_sources([source]))
    assert "held-out prompts are not those" not in caplog.text
    prompts.write_text("\n".join(f"a red circle, {i}" for i in range(160)))  # other prompts are held out now
    list(evaluated_sources([source]))
    assert "of 16 held-out prompts are not those of before and may have been trained on" in caplog.text


@pytest.mark.parametrize(
    "setting, words",
    [
        ("eval_rewards={pickscor: {}}", "did you mean 'pickscore'"),
        ("evaluate.prompts=none.txt", "none.txt: no such file"),
        ("eval_rewards={ocr: {}}", "ocr"),  # prompts without a word to read
    ],
)
def test_judges_and_prompts_are_checked_before_anything_is_encoded(
    tiny, recipe, encoded, tmp_path, setting, words
):
    with pytest.raises(UserError, match=words):
        Trainer(recipe(tiny("sd3"), "evaluate.every=1", setting), tmp_path / "run")
    assert not encoded


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pictures_that_are_not_finite_are_counted_and_refused(value):
    pictures = torch.rand(5, 4, 4, 3)
    assert to_uint8(pictures).shape == (5, 4, 4, 3)
    pictures[1, 0, 0, 0] = pictures[3, 2, 1, 2] = value
    with pytest.raises(UserError, match="got NaN or infinity in 2 of 5") as error:
        to_uint8(pictures)
    assert "\n" not in str(error.value)


def test_a_sampler_that_diverged_ends_the_run_in_one_line(tiny, recipe, tmp_path):
    trainer = Trainer(recipe(tiny("sd3")), tmp_path / "run")
    for name, tensor in trainer.weights.state().items():
        if name.startswith("sampler/") and "lora_B" in name:
            tensor.fill_(float("nan"))
    with pytest.raises(
        UserError, match=r"iteration 1: pictures: .* in 3 of 3.*checkpoints .* intact"
    ) as error:
        trainer.run()
    assert "\n" not in str(error.value)
