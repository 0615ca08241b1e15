"""Equal blocks that are run once, against the same network with every block run."""

import dataclasses
from types import SimpleNamespace

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from crd_fast.config import build_recipe
from crd_fast.plan import blocks, encoding
from crd_fast.plan.fake_models import fake_model
from crd_fast.plan.fit import SAVINGS, Fit, fit
from crd_fast.plan.planner import Planner
from tools.card_recipes import PAPER, published

DEEP = {"path": "builtin", "lora_rank": 4}


def both(settings, micro_batches, monkeypatch):
    """Plans with equal blocks run once, and with each run."""
    found = []
    for least in (blocks.LEAST, 1 << 30):
        monkeypatch.setattr(blocks, "LEAST", least)
        planner = Planner(settings)
        found.append([dataclasses.asdict(planner.plan(size, size)) for size in micro_batches])
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.checkpointing=false",),
        ("model.method=full",),
        ("loss.method=nft",),
    ],
    ids=["checkpointed", "kept", "full", "nft"],
)
def test_plans_are_the_same_to_the_byte(monkeypatch, overrides):
    """The built-in model has five blocks, of which four are equal."""
    values = {"model": DEEP, "rollout": {"prompts_per_iteration": 2, "samples_per_prompt": 6, "steps": 3}}
    once, each = both(build_recipe(values, overrides), (4, 6), monkeypatch)
    assert once == each


@pytest.mark.parametrize("model", ["sana-1.6b", "sd3.5-medium"])
def test_text_encoders_too(monkeypatch, model):
    """A decoder, whose layers leave keys and values in a cache, and three encoders."""
    settings, mode = build_recipe({"model": {"path": model}}), FakeTensorMode(allow_non_fake_inputs=True)
    fake, found = fake_model(settings, mode), []
    for least in (blocks.LEAST, 1 << 30):
        monkeypatch.setattr(blocks, "LEAST", least)
        monkeypatch.setattr(encoding, "_ENCODINGS", {})
        found.append(encoding.encoding(fake, mode))
    assert found[0] == found[1]


@pytest.mark.slow
def test_with_some_blocks_checkpointed(monkeypatch):
    """Seven of thirteen equal blocks compute again: they are told from the other six."""
    values = {"model": {"path": "sd3.5-medium"}, "rollout": {"resolution": 64, "prompts_per_iteration": 2}}
    settings = build_recipe(values, ["train.checkpointing=0.3", "rollout.samples_per_prompt=2"])
    once, each = both(settings, (2,), monkeypatch)
    assert once == each


def test_equal_blocks_are_run_once(monkeypatch):
    values = {"model": DEEP, "rollout": {"prompts_per_iteration": 2, "samples_per_prompt": 6, "steps": 3}}
    replayed = []
    original = blocks.Blocks._replayed
    monkeypatch.setattr(
        blocks.Blocks, "_replayed", lambda self, *rest: replayed.append(rest) or original(self, *rest)
    )
    Planner(build_recipe(values)).plan(6, 6)
    assert len(replayed) > 5


def test_a_verdict_names_no_setting_twice(monkeypatch):
    """int8 and then nf4: the second takes the place of the first."""

    def largest(settings, memory):
        phases = {"update": SimpleNamespace(bytes=2 * memory)}
        return Fit(["train.micro_batch=1", "rollout.micro_batch=1"], SimpleNamespace(phases=phases), memory)

    monkeypatch.setattr("crd_fast.plan.fit._largest", largest)
    fits = list(fit(published("sana-1.6b", PAPER), 1 << 20))
    settings = [[override.partition("=")[0] for override in found.overrides] for found in fits]
    assert all(len(set(names)) == len(names) for names in settings)
    assert any("model.quantization=int8" in found.overrides for found in fits)
    assert "model.quantization=nf4" in fits[-1].overrides and "model.streaming=true" in fits[-1].overrides
    assert {saving for saving in SAVINGS if "quantization" in saving} == {
        "model.quantization=int8",
        "model.quantization=nf4",
    }


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_second_plan_is_the_first(recipe, method):
    """The first block, whose inputs need no gradient where adapters are trained, is replayed then as well."""
    planner = Planner(recipe("builtin", f"model.method={method}", "train.precision=fp32"))
    first, second = planner.plan(2, 2), planner.plan(2, 2)
    assert second.to_json() == first.to_json()
    assert first.row_flops["backward"] > first.row_flops["policy_with_gradient"]
