"""Settings that fit a GPU, through the command line too."""

import json
from types import SimpleNamespace

import pytest

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.plan.fit import RESERVED, TILES, Fit, fit, for_training, overridden
from crd_fast.plan.gpus import GIB, parse_memory
from crd_fast.plan.planner import Planner
from tools.card_recipes import PAPER, published


def sizes(recipe):
    return recipe.train.micro_batch, recipe.rollout.micro_batch


def test_micro_batches_are_the_largest_that_fit(recipe):
    settings = recipe("builtin", "train.precision=fp32", "train.checkpointing=false")
    planner = Planner(settings)
    memory = planner.plan(3, 5).peak + RESERVED + 1000
    chosen = for_training(settings, memory)
    update, rollout = sizes(chosen)
    assert (update, update + 1) == (3, 4) or planner.plan(update + 1, 1).peak + RESERVED > memory
    assert planner.plan(update, rollout, chosen.train.kept_graphs).peak + RESERVED <= memory
    assert update >= 3


def test_named_micro_batches_stay(recipe):
    sizes = ("train.micro_batch=2", "rollout.micro_batch=3")
    named = recipe("builtin", *sizes, "train.checkpointing=false", "train.kept_graphs=device")
    assert for_training(named, parse_memory("24 GiB")) == named


def test_what_is_faster_is_taken_where_there_is_room(recipe):
    """Nothing is recomputed then, and a group that is split has its graphs kept."""
    settings = recipe("builtin", "train.precision=fp32", "train.micro_batch=2")
    chosen = for_training(settings, parse_memory("24GB")).train
    assert (chosen.checkpointing, chosen.kept_graphs, chosen.micro_batch) == (False, "device", 2)
    small = recipe("builtin", "train.precision=fp32", "train.micro_batch=2", "rollout.micro_batch=1")
    device, host = (Planner(small).plan(kept_graphs=where).peak for where in ("device", "host"))
    assert host < device
    (first,) = fit(small, host + RESERVED)
    assert first.overrides[-1] == "train.kept_graphs=host" and not first.missing
    assert "train.checkpointing=false" not in first.overrides


def test_as_many_blocks_as_fit_are_not_checkpointed(recipe):
    """The last one for nothing, and each further one where its activations have room. Groups stay whole."""
    settings = recipe("builtin", "train.precision=fp32", "rollout.micro_batch=1")
    group = settings.rollout.samples_per_prompt
    peaks = {
        share: Planner(recipe("builtin", "train.precision=fp32", f"train.checkpointing={share}"))
        .plan(group, 1)
        .phases["update"]
        .bytes
        for share in ("true", "0.8", "0.6", "false")
    }
    assert peaks["true"] >= peaks["0.8"] < peaks["0.6"] < peaks["false"]
    for memory, share in ((peaks["0.6"], 0.6), (peaks["0.6"] - 1, 0.8), (2 * peaks["false"], False)):
        (found,) = fit(settings, memory + RESERVED)
        chosen = build_recipe(settings.model_dump(), found.overrides).train
        assert (chosen.checkpointing, chosen.micro_batch) == (share, 2 * group if share is False else group)
        assert found.needed <= memory + RESERVED
    host = recipe("builtin", "train.precision=fp32", "train.micro_batch=2", "train.kept_graphs=host")
    assert for_training(host, 2 * peaks["false"] + RESERVED).train.checkpointing is True
    named = recipe("builtin", "train.precision=fp32", "rollout.micro_batch=1", "train.checkpointing=0.8")
    assert for_training(named, peaks["false"] + RESERVED).train.checkpointing == 0.8


def test_the_cheapest_setting_comes_first(recipe):
    settings = recipe("builtin", "train.checkpointing=false", "train.precision=fp32")
    checkpointed = recipe("builtin", "train.precision=fp32")
    memory = Planner(checkpointed).plan(1, 1).peak + RESERVED
    assert memory < Planner(settings).plan(1, 1).peak + RESERVED
    message = r"too much; it fits with --set train\.checkpointing=0\.80 --set train\.micro_batch=1"
    with pytest.raises(UserError, match=message):
        for_training(settings, memory)


@pytest.mark.slow
def test_in_tiles_a_model_is_planned_as_one_made_so():
    values = {"model": {"path": "sd3.5-medium"}, "rollout": {"resolution": 1536}, "evaluate": {"every": 0}}
    whole = build_recipe(values)
    tiled = overridden(whole, [TILES])
    planner = Planner(whole)
    before = planner.plan(1, 1)
    planner.decode_in_tiles(tiled)
    after = planner.plan(1, 1)
    assert after == Planner(tiled).plan(1, 1)
    assert after.phases["decode"].bytes < before.phases["decode"].bytes


def test_the_built_in_model_has_no_tiles():
    planner = Planner(build_recipe({}))
    before = planner.plan(1, 1)
    tiled = overridden(planner.recipe, [TILES])
    assert tiled is not None
    planner.decode_in_tiles(tiled)
    assert planner.plan(1, 1) == before


@pytest.mark.parametrize("in_tiles", [4, 6], ids=["less in tiles", "of one tile"])
def test_a_saving_that_makes_room_for_whole_pictures_has_no_tiles(monkeypatch, in_tiles):
    """Peaks as of a large model: unquantised nothing fits, in 4 bits all does."""

    def largest(planner, memory):
        settings = planner.recipe
        small, tiled = settings.model.quantization == "nf4", settings.model.vae_tiling == "always"
        peaks = {"decode": 2 if small else in_tiles if tiled else 6, "update": 3 if small else 5}
        phases = {name: SimpleNamespace(bytes=peak) for name, peak in peaks.items()}
        return Fit([], SimpleNamespace(phases=phases), memory)

    class Unplanned:
        def __init__(self, recipe):
            self.recipe = recipe

        decode_in_tiles = __init__

    monkeypatch.setattr("crd_fast.plan.fit._largest", largest)
    monkeypatch.setattr("crd_fast.plan.fit._faster", lambda planner, found, memory: found)
    monkeypatch.setattr("crd_fast.plan.fit.Planner", Unplanned)
    first, second = fit(published("flux.1-dev", PAPER), 3 + RESERVED, ("model.quantization=nf4",))
    assert first.missing and first.overrides == ["model.vae_tiling=always"] * (in_tiles < 6)
    assert not second.missing and second.overrides == ["model.quantization=nf4"]


@pytest.mark.parametrize("own", [(), ("model.dtype=bf16", "model.snapshots=host")], ids=["plain", "bf16"])
def test_a_lora_in_place_of_all_weights_is_quantised_before_it_is_streamed(monkeypatch, own):
    """Also where the recipe has what full fine-tuning alone has. Peaks as of a large model."""

    def largest(planner, memory):
        model = planner.recipe.model
        peak = 1 if model.streaming or (model.method, model.quantization) == ("lora", "nf4") else 9
        return Fit([], SimpleNamespace(phases={"update": SimpleNamespace(bytes=peak)}), memory)

    class Unplanned:
        def __init__(self, recipe):
            self.recipe = recipe

        decode_in_tiles = __init__

    monkeypatch.setattr("crd_fast.plan.fit._largest", largest)
    monkeypatch.setattr("crd_fast.plan.fit._faster", lambda planner, found, memory: found)
    monkeypatch.setattr("crd_fast.plan.fit.Planner", Unplanned)
    full = build_recipe(published("flux.1-dev", PAPER).model_dump(), ["model.method=full", *own])
    *_, last = fit(full, 1 + RESERVED)
    model = build_recipe(full.model_dump(), last.overrides).model
    assert (model.method, model.quantization, model.streaming) == ("lora", "nf4", False)
    assert ("model.dtype=default" in last.overrides) == bool(own)


@pytest.mark.parametrize("text", ["much", "", "-3GB", "0", "24TB"])
def test_memory_that_is_none(text):
    with pytest.raises(UserError, match="expected a size like 24GB"):
        parse_memory(text)


def test_commands(inside, tmp_path):
    small = ("--set", "rollout.samples_per_prompt=4", "--set", "rollout.prompts_per_iteration=2")
    code, out, _ = inside("plan", "builtin-lora", *small, "--gpu", "8GB", "--json", tmp_path / "plan.json")
    assert code == 0 and "base weights" in out and "fits" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["peak_bytes"] == max(phase["bytes"] for phase in written["phases"].values())
    assert written["needed_bytes"] == written["peak_bytes"] + RESERVED < 8 * GIB

    sized = ("train", "builtin-lora", *small, "--print-config", "--gpu-memory")
    code, out, _ = inside(*sized, "24GB")
    assert code == 0 and out.count("micro_batch: 96") == 2  # whole groups where there is room
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # so that nothing is trained
    taken = ("train", "builtin-lora", *small, "--output", tmp_path / "run", "--gpu-memory", "24GB")
    code, out, err = inside(*taken)
    assert code == 2 and "already holds a run" in err
    assert "by the plan: train.micro_batch 'auto' -> 96" in out
    code, _, err = inside(*sized, "0.7GB")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert "GB too much" in err and "nearest with --set train.checkpointing=true" in err

    code, _, err = inside("plan", "--set", "model.path=some/model")
    assert code == 2 and "no configs of 'some/model' here" in err and "flux.1-dev" in err
