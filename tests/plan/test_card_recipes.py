"""Recipes of models and cards: what the tool writes from the committed plans, and plans that still hold."""

import json

import pytest

from crd_fast.config import RECIPES, build_recipe, load_recipe
from crd_fast.plan.gpus import BY_NAME
from tools.card_recipes import (
    CARDS,
    HOURS,
    MODELS,
    PAPER,
    RESULT,
    planned,
    published,
    recipe_name,
    yaml_text,
)

PLANS = json.loads(RESULT.read_text())["plans"]


def test_every_model_has_its_plans():
    assert PLANS.keys() == MODELS.keys()
    assert all(list(sizes) == [*map(str, CARDS), PAPER] for sizes in PLANS.values())


@pytest.mark.parametrize("size", [*map(str, CARDS), PAPER])
@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_the_one_that_was_planned(name, size):
    plan, path = PLANS[name][size], RECIPES / f"{recipe_name(name, size)}.yaml"
    assert path.exists() == plan["fits"]
    if not plan["fits"]:
        return
    assert path.read_text() == yaml_text(name, size, plan)
    loaded = load_recipe(recipe_name(name, size))
    assert loaded == build_recipe(published(name, size).model_dump(), plan["overrides"])
    assert plan["needed_bytes"] <= BY_NAME[plan["card"]].memory
    assert loaded.rollout.samples_per_prompt >= 8
    if size == PAPER:
        assert (loaded.rollout.prompts_per_iteration, loaded.rollout.samples_per_prompt) == (48, 24)
        assert loaded.train.timesteps == "all" and loaded.loss.anchor_fraction == 1
    elif plan["hours"]["estimate"] > HOURS:  # then nothing was left to take
        assert (loaded.train.iterations, loaded.rollout.resolution) == (100, 256)


@pytest.mark.slow
def test_committed_plan_still_holds():
    """The smallest model's, planned again, without the search for hours (test_hours.py)."""
    committed, found = PLANS["sana-1.6b"][PAPER], planned("sana-1.6b", PAPER)
    assert found["overrides"] == committed["overrides"]
    assert found["needed_bytes"] == pytest.approx(committed["needed_bytes"], rel=0.01)
    assert found["hours"]["estimate"] == pytest.approx(committed["hours"]["estimate"], rel=0.01)
