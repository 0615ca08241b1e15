"""Blocks streamed from host memory: the same numbers, few weights on the device, few passes over them."""

import copy
import weakref

import pytest
import torch
from safetensors.torch import load_file

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.models import compile_blocks, load_model, streaming
from crd_fast.run.metrics import MEASURED, read_metrics
from crd_fast.schema import LossConfig
from crd_fast.train.trainer import Trainer
from crd_fast.train.update import Updater
from crd_fast.weights.make import make_weights
from tests.models.conftest import (
    ALL,
    GROUP,
    GUIDANCE,
    PROMPTS,
    as_short,
    by_pipeline,
    by_rollout,
    load_pipeline,
    packed,
    pairs_of_two_prompts,
    round_by_place,
    short,
)


@pytest.fixture(autouse=True, scope="module")
def every_tensor():
    """Tensors of tiny blocks are all too small to be streamed otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SMALLEST", 0)
        yield


@pytest.fixture(scope="module")
def loaded(tiny, recipe):
    def load(family, *overrides, streamed=True, smaller=None):
        folder = smaller if smaller else tiny(family)
        settings = recipe(folder, short(family), *overrides, f"model.streaming={str(streamed).lower()}")
        model = load_model(settings, PROMPTS)
        weights = make_weights(model, settings)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # weights that differ
            for parameter in weights.trained():
                parameter.add_(
                    (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.device)
                )
            weights.blend("old", 0.4)
            weights.blend("sampler", 0.7)
        return model, weights, settings

    return load


def gradients(loaded, micro_batch, one_pass, equal=False, anchor=None, **loss):
    """Metrics and gradient of one optimizer step of two groups."""
    model, weights, settings = loaded
    if equal:
        weights.blend("old", 0.0)
    device, count = model.device, 2 * GROUP
    latents = torch.randn(count, *model.latent_shape(64), generator=torch.Generator().manual_seed(1))
    pairs = pairs_of_two_prompts(anchor)
    config = LossConfig(**{"beta": 5.0, "guidance_scale": GUIDANCE} | loss)
    updater = Updater(
        model,
        weights,
        config,
        advantage_clip=5.0,
        precision=settings.train.precision,
        micro_batch=micro_batch,
        one_pass=one_pass,
    )
    embeddings = model.encode_prompts(PROMPTS)
    metrics = updater.accumulate(pairs, latents.to(device), embeddings, model.encode_prompts([""]))
    # compiled code gives zeros where a last block's text stream leads nowhere
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights.trained()]
    gradient = torch.cat([g.flatten() for g in found])
    for parameter in weights.trained():
        parameter.grad = None
    return metrics, gradient


class Counter:
    """Fetched blocks, and how many of them lived at once."""

    def __init__(self, model):
        self.fetched, self.most, self._alive = [], 0, []
        self.blocks, fetch = len(model.streaming.blocks), model.streaming.fetch

        def counted(index):
            copies, event = fetch(index)
            self.fetched.append(index)
            self._alive.append([weakref.ref(copy.untyped_storage()) for copy in copies])
            self.most = max(self.most, self.alive())
            return copies, event

        model.streaming.fetch = counted

    def alive(self):
        return sum(any(ref() is not None for ref in block) for block in self._alive)


ROUNDING = (
    3e-4  # in float32, of the largest gradient: policy and old are close, and the loss is their difference
)


def close(found, expected, tolerance):
    (metrics, gradient), (expected_metrics, expected_gradient) = found, expected
    scale = expected_gradient.abs().max()
    assert (gradient - expected_gradient).abs().max() < tolerance * scale
    for name in ("policy_loss", "kl_loss", "kl"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=tolerance), name


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "nft", "beta": 0.5},
        {"method": "awm", "clip_range": 0.1, "old_kl_beta": 0.2, "weighting": "t"},
        {"method": "flow_matching"},
    ],
    ids=lambda settings: settings["method"],
)
def test_other_methods_share_the_pass(loaded, settings):
    """At a micro-batch that leaves a rest, with one measured and trained at a time."""
    plain = "train.precision=fp32", "model.text_length=default"
    resident, streamed = loaded("sd3", *plain, streamed=False), loaded("sd3", *plain)
    expected = gradients(resident, 2 * GROUP, False, **settings)
    close(gradients(streamed, 2, True, **settings), expected, 1e-4)


@pytest.mark.parametrize(
    ("family", "quantization", "precision"),
    [
        *((family, "none", "fp32") for family in ALL),
        ("sd3", "nf4", "fp32"),
        ("flux", "int8", "fp32"),
        ("qwen-image", "nf4", "bf16"),
        ("sd3", "none", "bf16"),
    ],
)
def test_the_same_as_without(loaded, family, quantization, precision):
    """Rollout to the bit; loss and gradient to rounding, and to the bit where the branches are apart."""
    settings = (f"model.quantization={quantization}", f"train.precision={precision}")
    resident, streamed = loaded(family, *settings, streamed=False), loaded(family, *settings)
    with resident[1].use("sampler"), streamed[1].use("sampler"):
        assert torch.equal(by_rollout(resident[0])[1], by_rollout(streamed[0])[1])
    counter = Counter(streamed[0])
    expected = gradients(resident, 2, one_pass=False)
    metrics, gradient = gradients(streamed, 2, one_pass=False)
    assert metrics == expected[0] and torch.equal(gradient, expected[1])
    tolerance = ROUNDING if precision == "fp32" else 0.05
    close(gradients(streamed, 2, one_pass=True), expected, tolerance)
    close(gradients(streamed, GROUP, one_pass=True), expected, tolerance)
    extra = (
        family == "qwen-image"
    )  # whose last block has a text stream that goes nowhere, saved until the end
    assert counter.most <= 2 + extra and counter.alive() == 0
    assert all(tensor.device.type == "cpu" for tensor in streamed[0].streaming.host_tensors())


@pytest.mark.parametrize("micro_batch", [1, 2, GROUP])
def test_three_passes_over_the_weights(loaded, micro_batch):
    """A pass fetches every block once; forwards are as many as ever."""
    model, *_ = setting = loaded("flux")
    counter, rows, calls = Counter(model), [], []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for block in streaming.repeated_blocks(model.transformer):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(setting, micro_batch, one_pass=True)
    steps = 2 * GROUP // micro_batch
    assert len(counter.fetched) == len(calls) == 3 * counter.blocks * steps
    assert sum(rows) == (4 if micro_batch == GROUP else 5) * 2 * GROUP


@pytest.mark.parametrize("loss", [{"guidance_scale": 1.0}, {"kl_beta": 0.0, "kl_min": 0.0}, {}])
def test_branches_in_one_batch_with_part_of_the_anchor(loaded, loss):
    anchor = torch.tensor([2.0, 0, 2, 0, 0, 0, 2, 2])
    setting = loaded("sd3")
    expected = gradients(setting, 3, one_pass=False, anchor=anchor, **loss)
    found = gradients(setting, 3, one_pass=True, anchor=anchor, **loss)
    close(found, expected, ROUNDING)


@pytest.fixture(scope="module")
def two_blocks(tiny, tmp_path_factory):
    """Stable Diffusion 3 without the first of its three blocks, which takes half the time."""
    return of_blocks(tiny("sd3"), tmp_path_factory.mktemp("smaller") / "sd3", 1, 2)


def of_blocks(pipeline, folder, *indices):
    """Stable Diffusion 3 of copies of these of its blocks: not of the first, which is of another kind."""
    pipe = load_pipeline(pipeline)
    blocks = [copy.deepcopy(pipe.transformer.transformer_blocks[index]) for index in indices]
    pipe.transformer.transformer_blocks = torch.nn.ModuleList(blocks)
    pipe.transformer.register_to_config(num_layers=len(blocks), dual_attention_layers=())
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["none-fp32", "nf4-bf16", "int8-bf16"])
def once(request, loaded, two_blocks):
    quantization, precision = request.param.split("-")
    settings = f"model.quantization={quantization}", f"train.precision={precision}"
    return loaded("sd3", *settings, smaller=two_blocks)


@pytest.fixture
def uneven(once):
    """Loaded for several cases, each of which finds the same policy. Equal rows leave it unequal."""
    model, weights, _ = once
    before = [parameter.detach().clone() for parameter in weights.trained()]
    hook = round_by_place(model.transformer, by_call=True)
    yield once
    hook.remove()
    with torch.no_grad():
        for parameter, value in zip(weights.trained(), before, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize("micro_batch", [1, 3, GROUP])
@pytest.mark.parametrize("one_pass", [True, False])
def test_equal_policy_and_old_have_no_implicit_reward(uneven, micro_batch, one_pass):
    """Exactly none, whatever the rounding; and some, where a single number of a single tensor differs."""
    setting = _, weights, _ = uneven
    metrics, gradient = gradients(setting, micro_batch, one_pass, equal=True)
    assert metrics["implicit_reward_abs"] == metrics["old_deviation"] == 0
    assert metrics["kl"] > 0 and gradient.norm() > 0
    with torch.no_grad():
        weights.trained()[-1][-1, -1] += 0.5
    metrics, _ = gradients(setting, micro_batch, one_pass)
    assert metrics["implicit_reward_abs"] > 0 and metrics["old_deviation"] > 0


@pytest.mark.parametrize("micro_batch", [3, GROUP])
@pytest.mark.parametrize("anchor", [torch.ones(2 * GROUP), torch.tensor([0.0] * GROUP + [2, 0, 0, 2])])
def test_equal_policy_and_old_in_one_batch(loaded, micro_batch, anchor):
    """To rounding what the branches apart give, without old's forward, and no pass where none is anchored."""
    setting = model, *_ = loaded("sd3")
    expected = gradients(setting, micro_batch, one_pass=False, equal=True, anchor=anchor)
    rows, counter = [], Counter(model)
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    found = gradients(setting, micro_batch, one_pass=True, equal=True, anchor=anchor)
    close(found, expected, ROUNDING)
    measured = 0 if micro_batch == GROUP else 2 * GROUP
    assert sum(rows) == 2 * GROUP + measured + 2 * int(anchor.count_nonzero())
    passes = 3 * (2 if micro_batch == GROUP else 4)
    unanchored = micro_batch == GROUP and not anchor.all()
    assert len(counter.fetched) == (passes - unanchored) * counter.blocks


def test_a_forward_that_ends_early_leaves_the_network_whole(loaded):
    setting = model, *_ = loaded("flux")
    expected = gradients(setting, 2, one_pass=True)
    block = streaming.repeated_blocks(model.transformer)[1]
    for when in (2, 5):
        seen = []

        def fail(*_, seen=seen, when=when):
            seen.append(1)
            if len(seen) == when:
                raise torch.OutOfMemoryError("CUDA out of memory")

        handle = block.attn.register_forward_pre_hook(fail)
        metrics, gradient = gradients(setting, 4, one_pass=True)  # goes on with half the micro-batch
        handle.remove()
        assert len(seen) > when
        close((metrics, gradient), expected, ROUNDING)
    metrics, gradient = gradients(setting, 2, one_pass=True)
    assert metrics == expected[0] and torch.equal(gradient, expected[1])


def test_a_streamed_run_resumes_and_its_adapter_leaves(tiny, recipe, tmp_path):
    """The same bits as without the stop; the LoRA draws in diffusers what it draws here."""
    # old is the policy where the run is stopped, and again is not one step later
    settings = "model.streaming=true", "train.micro_batch=2", "snapshots.old=3/0/0.1/0.9", short("flux")

    def run(*overrides, resume=False, **options):
        trainer = Trainer(recipe(tiny("flux"), *settings, *overrides), resume=resume, **options)
        assert trainer.iteration == resume
        assert trainer.weights.is_policy("old") and trainer.model.streaming.host_tensors()
        round_by_place(trainer.model.transformer)
        trainer.run()
        return trainer

    run(output=tmp_path / "whole")
    run("train.iterations=1", output=tmp_path / "stopped")
    trainer = run(output=tmp_path / "stopped", resume=True)
    records = [read_metrics(tmp_path / name) for name in ("whole", "stopped")]
    kept = [[{k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in f] for f in records]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    checkpoints = [tmp_path / run / "checkpoints" / "iteration-000002" for run in ("whole", "stopped")]
    expected, found = (load_file(folder / "training.safetensors") for folder in checkpoints)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    pipe = load_pipeline(tiny("flux"))
    _, untrained = by_pipeline(pipe, "flux", **as_short("flux"))
    pipe.load_lora_weights(checkpoints[1] / "diffusers")
    _, trained = by_pipeline(pipe, "flux", **as_short("flux"))
    assert (trained - untrained).abs().max() > 1e-3
    _, latents = by_rollout(trainer.model)
    torch.testing.assert_close(packed(pipe, latents), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks(loaded, tiny, tmp_path):
    """Traced and run by torch's own kernels. Batches of 6 come with one set of weights and with many.

    Each kind of block is traced for each of these batches, with each adapter in it: here are two kinds, not
    three, and adapters of one layer of either stream, not of all.
    """
    settings = "model.quantization=int8", "model.lora_targets=[to_v, add_k_proj]"
    folder = of_blocks(tiny("sd3"), tmp_path / "sd3", 1, 1, 2)
    eager, compiled = (loaded("sd3", *settings, smaller=folder) for _ in range(2))
    compile_blocks(compiled[0].transformer, backend="aot_eager")
    counter = Counter(compiled[0])
    plain = [by_rollout(model, GUIDANCE)[1] for model, *_ in (eager, compiled)]
    torch.testing.assert_close(*plain, rtol=1e-4, atol=1e-4)
    for micro_batch, anchor in ((3, [0, 0, 0, 0, 2, 2, 2, 2]), (2, [2, 0] * GROUP)):
        anchor = torch.tensor(anchor).float()
        expected, found = (gradients(s, micro_batch, one_pass=True, anchor=anchor) for s in (eager, compiled))
        close(found, expected, ROUNDING)
    assert counter.most == 2 and counter.alive() == 0


def test_pinned_copies(monkeypatch):
    """Cut from slabs, aligned, equal; without a GPU memory cannot be pinned."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(streaming, "SLAB", 4096)
    pinned = streaming.Pinned()
    tensors = [torch.randn(3, 5), torch.randn(1000).bfloat16(), torch.tensor(2.0), torch.randn(2000)]
    copies = [pinned.copy(tensor) for tensor in tensors]
    assert all(torch.equal(*pair) for pair in zip(tensors, copies))
    assert all(copy.data_ptr() % 4 == 0 for copy in copies)
    assert copies[0].untyped_storage().data_ptr() == copies[2].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.method=full"], "model: streaming: expected false with method full"),
        (["train.compile=true", "model.quantization=nf4"], "train.compile: expected false with nf4"),
        (["train.checkpointing=false"], "train.checkpointing: expected true with model.streaming"),
    ],
)
def test_what_streaming_cannot_go_with(overrides, message):
    with pytest.raises(UserError, match=message):
        build_recipe({"model": {"streaming": True}}, overrides)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_on_a_gpu(loaded, quantization):
    """Copies of their own stream, and what remains on the device."""
    settings = (f"model.quantization={quantization}", "train.precision=bf16")
    resident, streamed = loaded("flux", *settings, streamed=False), loaded("flux", *settings)
    assert all(tensor.is_pinned() for tensor in streamed[0].streaming.host_tensors())
    assert all(parameter.is_cuda for parameter in streamed[1].trained())
    expected = gradients(resident, 2, one_pass=False)
    for _ in range(20):  # a race would not show each time
        metrics, gradient = gradients(streamed, 2, one_pass=False)
        assert metrics == expected[0] and torch.equal(gradient, expected[1])
    close(gradients(streamed, 2, one_pass=True), expected, 0.05)
