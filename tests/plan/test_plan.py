"""What is planned on fake tensors against what a real run has, and against published facts."""

import dataclasses
import json
import math

import diffusers
import pytest
import torch

from crd_fast import models
from crd_fast.models import builtin, checks, family_of, load_model, streaming
from crd_fast.plan.fake_models import CONFIGS, config_folder, shipped
from crd_fast.plan.planner import Planner, count_parameters
from tests.plan.conftest import GROUP, PROMPT, Real
from tools.make_tiny_pipeline import FAMILIES

FULL = ("model.method=full", "train.precision=fp32", "train.checkpointing=true", "train.optimizer=adamw8bit")
NARROW = (
    *("model.method=full", "model.dtype=bf16", "model.snapshots=host", "train.precision=bf16"),
    *("train.checkpointing=true", "train.optimizer=adamw8bit"),
)
# of the transformers; those with digits to the last from the published safetensors
PUBLISHED = {
    "sd3.5-medium": 2_243_171_520,
    "sd3.5-large": 8_056_627_520,
    "flux.1-dev": 11_901_408_320,
    "flux.2-klein-4b": 3.9e9,
    "qwen-image": 20_430_401_088,
    "z-image": 6.15e9,
    "sana-1.6b": 1.6e9,
}


class ForPeople(str):
    """A name that may be shown, and that nothing may depend on."""

    def _compared(self, *other):
        raise AssertionError(f"a plan depends on the name {self}")

    __eq__ = __ne__ = __hash__ = __contains__ = startswith = _compared


def assert_close(recipe, micro_batches, tolerance=0.02, planner=None):
    """Returns the planner, and what it planned last."""
    planner, real = planner or Planner(recipe), Real(recipe)
    for micro_batch in micro_batches:
        planned = planner.plan(micro_batch, micro_batch)
        measured = real.peaks(micro_batch)
        update = max(planned.phases["measure"].bytes, planned.phases["update"].bytes)
        assert planned.phases["rollout"].bytes == pytest.approx(measured["rollout"], rel=tolerance)
        assert update == pytest.approx(measured["update"], rel=tolerance)
        assert all(sum(peak.parts.values()) == peak.bytes for peak in planned.phases.values())
    return planner, planned


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("train.precision=fp32", "train.checkpointing=false"), id="fp32"),
        pytest.param(("train.precision=bf16",), id="bf16-checkpointed"),
        pytest.param(("train.checkpointing=0.4",), id="two-of-five-blocks-checkpointed"),
        pytest.param(FULL, id="full", marks=pytest.mark.slow),
        pytest.param(NARROW, id="full-bf16-host", marks=pytest.mark.slow),
    ],
)
def test_builtin_model(recipe, overrides, monkeypatch):
    """At micro-batch 1, at 4 of a group of 6, which leaves a rest, and with the whole group at once."""
    kind = dataclasses.replace(builtin.KINDS["builtin"], name=ForPeople("Another"))
    monkeypatch.setitem(builtin.KINDS, "builtin", kind)
    micro_batches = (1, 4, GROUP) if overrides[0].endswith("fp32") else (4,)
    planner, _ = assert_close(recipe("builtin", *overrides), micro_batches)
    assert str.__eq__(planner.model.name, "Another")


@pytest.mark.parametrize("method, branches", [("nft", {"policy", "old", "reference"}), ("awm", {"policy"})])
def test_other_methods(recipe, method, branches):
    """One forward of the policy where CRD, at such a micro-batch, needs two."""
    plain = ("train.precision=fp32", "train.checkpointing=false", f"loss.method={method}")
    settings = recipe("builtin", *plain, f"loss.kl_beta={0.1 if 'reference' in branches else 0}")
    _, planned = assert_close(settings, (4, 1))
    forwards = planned.forwards
    assert forwards.keys() - {"rollout"} == branches and forwards["policy"] == 1


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_kept_graphs(recipe, checkpointing):
    """Those of a group's other micro-batches are held beside the one that goes backward; on the host all."""
    plain = ("train.precision=fp32", f"train.checkpointing={checkpointing}")
    planner, _ = assert_close(recipe("builtin", *plain, "train.kept_graphs=device"), (2,))
    none, device, host = (planner.plan(2, 2, where) for where in ("none", "device", "host"))
    forward = none.rows["policy"] * none.row_flops["policy"]
    for kept in (device, host):
        assert kept.forwards["policy"] == 1 == none.forwards["policy"] - 1
        assert kept.flops["update"] == pytest.approx(none.flops["update"] - forward)
    others = device.phases["update"].bytes - host.phases["update"].bytes  # of three micro-batches two
    pieces = math.ceil(others * 3 / 2 / streaming.SLAB)
    assert host.host_bytes - none.host_bytes == pieces * streaming.SLAB and others > 0


def test_nf4(tiny, recipe):
    """Kept; checkpointed it is among the families and the streamed."""
    settings = ("model.quantization=nf4", "train.checkpointing=false")
    assert_close(recipe(tiny("sd3"), *settings), (4,))


@pytest.mark.parametrize("family, quantization", [("sd3", "nf4"), ("flux", "none")])
def test_streaming(tiny, recipe, monkeypatch, family, quantization):
    """Tiny blocks are streamed whole; what they take in host memory is no part of the peak."""
    monkeypatch.setattr(streaming, "SMALLEST", 0)
    settings = (f"model.quantization={quantization}", "model.streaming=true")
    planner, streamed = assert_close(recipe(tiny(family), *settings), (GROUP, 4), 0.05)
    base = Planner(recipe(tiny(family), settings[0])).live.live["base weights"]
    assert streamed.phases["checkpoint"].parts["base weights"] == base - planner.streamed
    assert base / 2 < planner.streamed < streamed.host_bytes == streaming.SLAB  # one piece of pinned memory
    assert sum(n for name, n in streamed.forwards.items() if name != "rollout") == 5


@pytest.mark.parametrize(
    "family, quantization",
    [
        pytest.param("sd3", "int8", marks=pytest.mark.slow),
        ("flux", "none"),
        pytest.param("flux2-klein", "nf4", marks=pytest.mark.slow),
        ("qwen-image", "none"),
        pytest.param("z-image", "nf4", marks=pytest.mark.slow),
        pytest.param("sana", "none", marks=pytest.mark.slow),
    ],
)
def test_families(tiny, recipe, monkeypatch, family, quantization):
    folder = tiny(family)
    settings = recipe(folder, f"model.quantization={quantization}")
    with monkeypatch.context() as patch:
        kind = family_of(str(folder), checks.read_index(folder))
        patch.setattr(kind, "name", ForPeople("Another"))
        planner = Planner(settings)
    planner.model.name = ForPeople("Another")
    assert_close(settings, (4,), planner=planner)


def test_what_cudas_autocast_widens_is_planned(tiny, recipe, monkeypatch):
    """Of a network whose norms are as CUDA's autocast has them: float32."""
    settings = recipe(tiny("flux"))
    narrow = Planner(settings).plan(4, 4)
    monkeypatch.setattr("crd_fast.models.base.keep_dtypes", lambda network: None)
    assert_close(settings, (4,))
    wide = Planner(settings).plan(4, 4)
    assert all(wide.phases[name].bytes > 1.02 * narrow.phases[name].bytes for name in ("rollout", "update"))


def test_the_optimizers_state(recipe):
    """Large enough tensors for bitsandbytes to keep in 8 bits."""
    settings = recipe("builtin", "model.lora_rank=64", "train.optimizer=adamw8bit")
    planned = Planner(settings).plan(1, 1).phases["checkpoint"].parts["optimizer"]
    real = Real(settings)
    states = real.optimizer.state.values()
    kept = {id(t): t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor)}
    assert any(t.dtype == torch.uint8 for state in states for t in state.values() if hasattr(t, "dtype"))
    assert planned == pytest.approx(sum(kept.values()), rel=0.01)


@pytest.mark.parametrize("micro_batch, forwards", [(4, 5), (GROUP, 4)])
def test_forwards(recipe, micro_batch, forwards):
    """Samples that go through the network in an update, by a hook, for each sample that is trained."""
    settings = recipe("builtin", "train.checkpointing=false")
    real, seen = Real(settings), []
    network = real.model.transformer
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    real.update(torch.randn(GROUP * 2, 3, 32, 32), micro_batch)
    assert sum(seen) == forwards * 2 * GROUP
    planned = Planner(settings).plan(micro_batch, 1).forwards
    assert sum(n for name, n in planned.items() if name != "rollout") == forwards


def test_flops(recipe):
    """A forward of the built-in model by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    settings = recipe("builtin", "train.precision=fp32", "train.checkpointing=false")
    real = Real(settings)
    count, steps = GROUP * 2, settings.rollout.steps
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        embeddings = {key: value[:1].expand(4, *value.shape[1:]) for key, value in real.embeddings.items()}
        real.model.velocity(torch.randn(4, 3, 32, 32), torch.full((4,), 0.5), embeddings)
    planned = Planner(settings).plan(4, 4).flops["rollout"]
    tokens, width, layers = 64 + 12, 128, 5  # torch does not count attention on the CPU
    attention = layers * 4 * tokens**2 * width
    assert planned == pytest.approx((counter.get_total_flops() / 4 + attention) * count * steps, rel=0.02)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_configs_have_the_published_size(name):
    config = json.loads((CONFIGS / name / "transformer" / "config.json").read_text())
    cls = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        network = cls.from_config(config)
    published = PUBLISHED[name]
    exact = isinstance(published, int)
    assert count_parameters(network) == (published if exact else pytest.approx(published, rel=0.03))


def test_every_shipped_config_is_tested():
    assert shipped() == sorted(PUBLISHED)
    assert config_folder("black-forest-labs/FLUX.1-dev").name == "flux.1-dev"


def test_hub_ids_have_configs_that_ship():
    ids = {
        hub_id: name
        for pipeline in models.FAMILIES
        for hub_id, name in models.family(pipeline).configs.items()
    }
    assert set(ids.values()) == set(shipped())
    assert all(config_folder(hub_id).name == name for hub_id, name in ids.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_embeddings_are_those_of_a_prompt_that_fills_all_tokens(tiny, recipe, family):
    settings = recipe(tiny(family), "model.text_length=8")
    real = load_model(settings, [PROMPT])
    expected = real.encode_prompts([PROMPT])
    for found in (real.longest_embeddings(1), Planner(settings).model.longest_embeddings(1)):
        assert {key: (v.shape, v.dtype) for key, v in found.items()} == {
            key: (v.shape, v.dtype) for key, v in expected.items()
        }
        read = [key for key, value in found.items() if not value.is_meta]
        assert all(torch.equal(found[key], expected[key]) for key in read)
