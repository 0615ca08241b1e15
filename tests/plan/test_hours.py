"""A recipe made to finish in a number of hours, through the command line too."""

import json

import pytest

from crd_fast.config import build_recipe, load_recipe
from crd_fast.errors import UserError
from crd_fast.plan.cost import cost
from crd_fast.plan.fit import Fit
from crd_fast.plan.gpus import BY_NAME, GIB
from crd_fast.plan.hours import LESS, _rungs, within
from crd_fast.plan.planner import Planner

CARD = BY_NAME["rtx-4090"]


def run(tiny, *overrides):
    values = {
        "model": {"path": str(tiny("sd3")), "lora_rank": 4, "text_length": 24},
        "rollout": {
            "resolution": 64,
            "prompts_per_iteration": 24,
            "samples_per_prompt": 12,
            "micro_batch": 12,
        },
        "train": {"iterations": 400, "checkpointing": False, "micro_batch": 12},
        "evaluate": {"every": 0},
    }
    return build_recipe(values, overrides)


def hours(recipe):
    return cost(recipe, Planner(recipe).plan(), CARD).hours


def test_each_change_is_made_only_when_those_before_it_do_not_suffice(tiny):
    recipe = run(tiny)
    whole = hours(recipe)
    assert not [o for o in within(recipe, 24 * GIB, CARD, 1.01 * whole).overrides if "micro_batch" not in o]
    wanted = ["rollout.samples_per_prompt=8", "rollout.prompts_per_iteration=16"]
    enough = hours(build_recipe(recipe.model_dump(), [*LESS, *wanted]))
    found = within(recipe, 24 * GIB, CARD, 1.01 * enough).overrides
    assert [o for o in found if "micro_batch" not in o] == [*LESS, *wanted]
    assert enough < whole / 4


def test_pictures_become_smaller_last(tiny):
    """Where fewer iterations spare them a step they do; where they do not the run keeps more of them."""
    recipe = build_recipe(run(tiny).model_dump(), ["rollout.resolution=512"])
    taken = []
    for rung in _rungs(recipe):
        changed = build_recipe(recipe.model_dump(), rung)
        assert len({override.partition("=")[0] for override in rung}) == len(rung)
        taken.append((changed.rollout.resolution, changed.train.iterations))
    steps = [(512, 100), (512, 75), (384, 100), (384, 75), (256, 100)]
    assert taken[-5:] == steps
    assert all(resolution == 512 and iterations >= 100 for resolution, iterations in taken[:-5])


def test_what_is_computed_again_to_fit_is_in_the_estimate(monkeypatch):
    """A recipe without checkpointing that has to have some on a smaller card."""
    small = ("rollout.samples_per_prompt=8", "rollout.prompts_per_iteration=4", "evaluate.every=0")
    groups = ("train.micro_batch=8", "rollout.micro_batch=8", "train.precision=bf16")
    recipe = load_recipe("builtin", [*small, *groups, "rollout.steps=10", "train.checkpointing=false"])

    def fit(recipe, memory, savings):
        fitting = build_recipe(recipe.model_dump(), ["train.checkpointing=true"])
        yield Fit(["train.checkpointing=true"], Planner(fitting).plan(), memory)

    monkeypatch.setattr("crd_fast.plan.hours.fit", fit)
    monkeypatch.setattr("crd_fast.plan.hours.FEWER", {})  # a rung is enough, and each takes seconds
    wanted = 1.01 * hours(recipe)
    found = within(recipe, 24 * GIB, CARD, wanted)
    assert cost(build_recipe(recipe.model_dump(), found.overrides), found.plan, CARD).hours <= wanted


def test_what_contradicts_the_recipe_is_left_out():
    """Steps that share an iteration's prompts, and the part of the denoising that is trained."""
    recipe = run(str, "train.steps_per_iteration=18", "train.timestep_range=0.2")
    taken = list(_rungs(recipe))
    assert all(build_recipe(recipe.model_dump(), rung) for rung in taken)
    assert taken[0] == ["train.timesteps=2", "loss.anchor_fraction=0.25"]
    assert any("train.iterations=100" in rung for rung in taken)


def test_no_estimate_for_float32(tiny):
    with pytest.raises(UserError, match=r"expected train\.precision bf16"):
        within(run(tiny, "train.precision=fp32"), 24 * GIB, CARD, 1.0)


def test_less_is_what_the_settings_take():
    assert load_recipe("builtin", [o for o in LESS])


def test_commands(tiny, inside, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(run(tiny).to_yaml())
    whole = hours(run(tiny))
    options = ("plan", path, "--gpu", "rtx-4090", "--hours")
    code, out, err = inside(*options, whole / 4, "--json", tmp_path / "plan.json")
    assert code == 0, err
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["hours"]["estimate"] <= whole / 4 and set(LESS) <= set(written["overrides"])
    assert all(f"--set {override}" in out for override in LESS)
    code, out, _ = inside(*options, whole / 1e6)  # which all that there is does not suffice for
    assert code == 1 and "not reached" in out
    assert all(f"--set {o}" in out for o in ("train.iterations=100", "rollout.samples_per_prompt=8"))
    code, _, err = inside("plan", path, "--gpu", "24GB", "--hours", "1")
    assert code == 2 and "--hours: goes with the name of a card" in err
