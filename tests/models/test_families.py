"""Every family against its own diffusers pipeline, and a training run of each from end to end."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from crd_fast.models import load_model
from crd_fast.run.metrics import read_metrics
from crd_fast.train.forwards import autocast
from crd_fast.train.trainer import Trainer
from tests.models.conftest import (
    ALL,
    GUIDANCE,
    GUIDED,
    PROMPTS,
    RESOLUTION,
    STEPS,
    as_short,
    by_pipeline,
    by_rollout,
    load_pipeline,
    packed,
    short,
)


@pytest.mark.parametrize("family", ALL)
def test_rollout_is_the_pipelines(tiny, recipe, family):
    """Same seeds, same schedule, same prompts: same latents and images, without and with guidance."""
    model = load_model(recipe(tiny(family)))
    pipe = load_pipeline(tiny(family))
    unguided = None
    for guidance_scale in (1.0, GUIDANCE):
        images, latents = by_rollout(model, guidance_scale)
        expected_images, expected_latents = by_pipeline(pipe, family, guidance_scale)
        torch.testing.assert_close(packed(pipe, latents), expected_latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(images, expected_images, rtol=1e-4, atol=1e-4)
        assert images.std() > 0.01  # not one saturated colour, which would be equal whatever we did
        assert unguided is None or (latents - unguided).abs().max() > 1e-2
        unguided = latents
    one_by_one, _ = by_rollout(model, GUIDANCE, micro_batch=1)
    torch.testing.assert_close(one_by_one, images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_bfloat16_is_the_pipelines(tiny, recipe, family):
    """Without and with autocast: every step's time, and the velocity of the first step, to the bit."""
    pipe = DiffusionPipeline.from_pretrained(tiny(family), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny("sd3"), subfolder="scheduler")
    # a shift that puts times where bfloat16 rounds twice to another number
    pipe.scheduler.register_to_config(shift=2.6, use_dynamic_shifting=False)
    pipe.scheduler.set_shift(2.6)
    model = load_model(recipe(tiny(family), "train.precision=bf16"), PROMPTS[:1])
    noise = torch.randn(1, *model.latent_shape(RESOLUTION), generator=torch.Generator().manual_seed(5))
    noise = noise.bfloat16()
    expected_times, expected = watched_network(pipe.transformer)
    given = noise if family in ("flux2-klein", "z-image") else packed(pipe, noise)
    settings = GUIDED[family](1.0) | ({"use_resolution_binning": False} if family == "sana" else {})
    pipe(
        prompt=PROMPTS[:1],
        latents=given.float() if family == "z-image" else given,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=STEPS,
        output_type="latent",
        **settings,
    )
    times, found = watched_network(model.transformer)
    for precision in ("fp32", "bf16"):
        times.clear(), found.clear()
        for sigma in pipe.scheduler.sigmas[:-1]:
            with torch.no_grad(), autocast("cpu", precision):
                model.velocity(noise.float(), sigma.expand(1), model.encode_prompts(PROMPTS[:1]))
        assert len(times) >= STEPS and torch.equal(torch.cat(times), torch.cat(expected_times))
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


def watched_network(network):
    """Lists of the times (and guidance) that reach the embedding, and of the velocities."""
    times, velocities = [], []
    names = ("time_proj", "t_embedder")
    embedding = next(module for name, module in network.named_modules() if name.endswith(names))
    embedding.register_forward_pre_hook(lambda module, args: times.append(args[0].float()))
    network.register_forward_hook(lambda module, args, output: velocities.append(output[0]))
    return times, velocities


def test_sana_is_its_own_solver_at_order_one(tiny, recipe):
    """Up to its schedule, which begins at 0.999, and its times, which are whole numbers."""
    pipe = DiffusionPipeline.from_pretrained(tiny("sana"))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    _, expected = by_pipeline(pipe, "sana")
    model = load_model(recipe(tiny("sana")))
    torch.testing.assert_close(model.sigmas(STEPS, RESOLUTION), pipe.scheduler.sigmas, rtol=1e-3, atol=0)
    _, latents = by_rollout(model)
    assert (latents - expected).norm() / expected.norm() < 0.03


def test_a_hub_id_is_downloaded_and_takes_the_same_way(tiny, recipe, monkeypatch):
    config = DiffusionPipeline.load_config(tiny("z-image"))
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda path: {"org/name": config}[path])
    monkeypatch.setattr(DiffusionPipeline, "download", lambda path: {"org/name": tiny("z-image")}[path])
    assert load_model(recipe("org/name")).name == "Z-Image"


def test_a_resumed_run_ends_with_the_same_bits(tiny, recipe, tmp_path):
    def trained(run):
        return load_file(run / "checkpoints" / "iteration-000002" / "training.safetensors")

    whole = recipe(tiny("sd3"), "model.quantization=nf4", "train.precision=bf16", "model.text_length=8")
    half = recipe(
        tiny("sd3"),
        "model.quantization=nf4",
        "train.precision=bf16",
        "model.text_length=8",
        "train.iterations=1",
    )
    Trainer(whole, tmp_path / "whole").run()
    Trainer(half, tmp_path / "resumed").run()
    Trainer(whole, tmp_path / "resumed", resume=True).run()
    expected, found = trained(tmp_path / "whole"), trained(tmp_path / "resumed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("family", ALL)
def test_training_and_its_lora_in_the_pipeline(tiny, recipe, tmp_path, family):
    """Two iterations with the guided anchor; `load_lora_weights` takes the file, and draws the same.

    So it does without what the file says beside its tensors.
    """
    trainer = Trainer(recipe(tiny(family), short(family)), tmp_path / "run")
    assert trainer.run()
    records = read_metrics(tmp_path / "run")
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert all(record["kl_loss"] > 0 and record["grad_norm"] > 0 for record in records)

    pipe = load_pipeline(tiny(family))
    untrained, _ = by_pipeline(pipe, family, **as_short(family))
    exported = tmp_path / "run" / "checkpoints" / "iteration-000002" / "diffusers"
    images, _ = by_rollout(trainer.model)
    (file,) = exported.glob("*.safetensors")
    for lora in (exported, load_file(file)):
        pipe.load_lora_weights(lora)
        drawn, _ = by_pipeline(pipe, family, **as_short(family))
        torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-4)
        assert (untrained - drawn).abs().max() > 1e-3
        pipe.unload_lora_weights()
