"""snapshots.ema: an average of the policy as diffusers' EMAModel makes it, that changes nothing else."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.plan.planner import Planner
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from tests.training.short_runs import SETTINGS

pytestmark = pytest.mark.usefixtures("all_shallow")

KINDS = {
    "lora": ("model.method=lora",),
    "full": ("model.method=full",),
    "host": ("model.method=full", "model.snapshots=host"),
}
EMA = 0.4  # more than 2 / 11 and 3 / 12, less than 7 / 16: both rules are at work


def recipe(*more):
    steps = ("train.steps_per_iteration=2", "train.iterations=4", "evaluate.every=0")
    return load_recipe("builtin", [*SETTINGS, *steps, *more])


def weights_in(run):
    return load_file(checkpoint.find(run, "newest") / checkpoint.TENSORS)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_average(kind, tmp_path):
    trainer = Trainer(recipe(*KINDS[kind], f"snapshots.ema={EMA}"), tmp_path / "run")
    theirs = EMAModel(trainer.weights.trained(), decay=EMA)
    trainer.optimizer.register_step_post_hook(lambda *_: theirs.step(trainer.weights.trained()))
    assert trainer.run()
    assert theirs.optimization_step == trainer.step == 8
    found = {k: v for k, v in trainer.weights.state().items() if k.startswith("ema/")}
    policy = [v for k, v in trainer.weights.state().items() if k.startswith("policy/")]
    for value, wanted in zip(found.values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)
    assert sum(not torch.equal(*pair) for pair in zip(found.values(), policy)) > len(policy) // 2
    with trainer.weights.use("ema"):
        of_network = dict(trainer.weights.network.named_parameters())
        for key, value in found.items():
            name = key.removeprefix("ema/")
            assert kind == "lora" or torch.equal(of_network[name], value)


@pytest.mark.parametrize("kind", ["lora", "host"])
def test_resumed_it_has_the_same_bits(kind, tmp_path):
    settings = (*KINDS[kind], f"snapshots.ema={EMA}", "checkpoint.every=1")
    assert Trainer(recipe(*settings), tmp_path / "whole").run()
    assert Trainer(recipe(*settings, "train.iterations=1"), tmp_path / "two").run()
    assert Trainer(recipe(*settings), tmp_path / "two", resume=True).run()
    whole, two = weights_in(tmp_path / "whole"), weights_in(tmp_path / "two")
    assert sum(key.startswith("weights/ema/") for key in whole) > 10
    assert whole.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in whole.items())


def test_it_changes_nothing_else(tmp_path):
    assert Trainer(recipe(), tmp_path / "without").run()
    assert Trainer(recipe(f"snapshots.ema={EMA}"), tmp_path / "with").run()
    without, with_it = weights_in(tmp_path / "without"), weights_in(tmp_path / "with")
    assert {key for key in with_it if "/ema/" not in key} == set(without)
    assert all(torch.equal(value, with_it[key]) for key, value in without.items())
    with pytest.raises(UserError, match=r"made with another recipe: snapshots.ema None -> 0.9"):
        Trainer(recipe("snapshots.ema=0.9", "train.iterations=5"), tmp_path / "without", resume=True)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_plan_counts_it(kind):
    without, with_it = (Planner(recipe(*KINDS[kind], *more)) for more in ((), ("snapshots.ema=0.9",)))
    trained = sum(parameter.nbytes for parameter in without.trained)
    assert with_it.sizes["checkpoint"] - without.sizes["checkpoint"] == trained
    parts = [planner.plan().phases["update"].parts["snapshots"] for planner in (without, with_it)]
    assert parts[1] - parts[0] == pytest.approx(trained, rel=0.02)  # in blocks of 512 bytes


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", ".nan", "0/0.9/0/0.9"])
def test_decays_that_are_none(value):
    with pytest.raises(UserError, match=r"snapshots.ema: expected"):
        recipe(f"snapshots.ema={value}")


def test_an_evaluation_of_it_needs_it():
    with pytest.raises(UserError, match=r"evaluate.weights: ema needs a decay in snapshots.ema"):
        recipe("evaluate.weights=ema")
