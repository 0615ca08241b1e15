"""Recipes: every mistake is one line that names the key and what was wanted."""

import math

import pytest

from crd_fast.config import RECIPES, Recipe, Schedule, build_recipe, load_recipe, recipe_names
from crd_fast.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_defaults_are_the_published_recipe():
    recipe = Recipe()
    assert recipe.loss.temperature == math.inf and recipe.loss.guidance_scale == 4.5
    assert (recipe.rollout.samples_per_prompt, recipe.rollout.prompts_per_iteration) == (24, 48)
    assert recipe.training_steps() == list(range(10))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.betta=3"], "unknown key 'loss.betta', did you mean 'beta'?"),
        (["lsos.beta=3"], "unknown section 'lsos', did you mean 'loss'?"),
        (["loss.beta"], "expected section.key=value"),
        (["loss.beta=high"], "loss.beta: expected a valid number"),
        (["loss.beta=0"], "loss.beta: expected greater than 0, got 0"),
        (["loss.kl_min=0.2"], "kl_min: expected at most kl_beta (0.1), got 0.2"),
        (
            ["rollout.samples_per_prompt=1"],
            "rollout.samples_per_prompt: expected greater than or equal to 2, got 1",
        ),
        (["train.timesteps=11"], "train.timesteps: expected all or 1 to 10"),
        (["train.timesteps=some"], "train.timesteps: expected"),
        (["train.micro_batch=0"], "train.micro_batch: expected auto or at least 1, got 0"),
        (["train.steps_per_iteration=49"], "expected at most rollout.prompts_per_iteration (48), got 49"),
        (["snapshots.old=0/0.25"], "snapshots.old: expected begin/start/slope/end"),
        (["snapshots.old=0/0.25/0.005/2"], "decays between 0 and 1"),
        (["model.quantization=int4"], "model.quantization: expected 'none', 'int8' or 'nf4', got 'int4'"),
        (["loss.method=dpo"], "loss.method: expected 'crd', 'nft', 'awm' or 'flow_matching', got 'dpo'"),
        (["loss.method=nft", "loss.temperature=1"], "temperature: expected inf with method nft, got 1.0"),
        (["loss.clip_range=0.1"], "clip_range: expected null with method crd, got 0.1"),
        (["rewards.geneval=.nan"], "rewards: geneval: expected a finite weight"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError) as error:
        build_recipe({}, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {learning_rate: 3e-4}\nloss: {temperature: .inf}\n")
    recipe = load_recipe(path, ["loss.kl_beta=1e-2"])
    assert recipe.train.learning_rate == 3e-4 and recipe.loss.kl_beta == 0.01


@pytest.mark.parametrize(
    "content, message",
    [
        (b"train: [1, 2", "is not YAML"),
        (b"- train\n- loss", "expected sections with keys, got list"),
        (b"train: \xff\xfe", "expected UTF-8"),
        (b"train: 3", "train: expected"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'builtin'"):
        load_recipe("buitlin")
    assert RECIPES.is_dir()


def test_schedule():
    old = Schedule.parse("0/0.25/0.005/0.999")
    assert [old(0), old(10), old(1000)] == [0.25, pytest.approx(0.3), 0.999]
    sampler = Schedule.parse("75/0/0.0075/0.999")
    assert [sampler(0), sampler(74), sampler(75), sampler(85)] == [0, 0, 0, pytest.approx(0.075)]
