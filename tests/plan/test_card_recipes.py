"""Recipes of models and cards: what the tool writes from the committed plans, and plans that still hold."""

import json

import pytest

from crd_fast.config import RECIPES, build_recipe, load_recipe
from crd_fast.plan.fit import RESERVED
from crd_fast.plan.gpus import GIB
from crd_fast.plan.planner import Planner
from tools.card_recipes import CARDS, IN_ROLLOUT, IN_UPDATE, MODELS, RESULT, choose, recipe, yaml_text

PLANS = json.loads(RESULT.read_text())["plans"]


def test_every_model_has_its_plans():
    assert PLANS.keys() == MODELS.keys()


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", MODELS)
def test_recipe_is_the_one_that_fits(name, card):
    chosen = choose(PLANS[name], card)
    path = RECIPES / f"{name}-{card}gb.yaml"
    assert path.exists() == (chosen is not None)
    if chosen is None:
        return
    assert path.read_text() == yaml_text(name, card, chosen)
    loaded = load_recipe(f"{name}-{card}gb")
    base, update, rollout = chosen
    assert loaded == build_recipe(recipe(name, base, update, rollout))
    for size, phases in ((update, IN_UPDATE), (rollout, IN_ROLLOUT)):
        planned = PLANS[name][base][str(size)]["phases"]
        assert max(planned[phase]["bytes"] for phase in phases) <= card * GIB - RESERVED


@pytest.mark.slow
def test_committed_plan_still_holds():
    """The smallest model's, planned again."""
    committed = PLANS["sana-1.6b"]["bfloat16"]["4"]["phases"]
    planned = Planner(build_recipe(recipe("sana-1.6b", "bfloat16", 1, 1))).plan(4, 4).phases
    for phase, peak in planned.items():
        assert peak.bytes == pytest.approx(committed[phase]["bytes"], rel=0.01), phase
