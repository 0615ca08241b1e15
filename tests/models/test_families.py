"""Every family against its own diffusers pipeline, and a training run of each from end to end."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from crd_fast.models import load_model
from crd_fast.run.metrics import read_metrics
from crd_fast.train.trainer import Trainer
from tests.models.conftest import (
    ALL,
    GUIDANCE,
    RESOLUTION,
    STEPS,
    by_pipeline,
    by_rollout,
    load_pipeline,
    packed,
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
    """Two iterations with the guided anchor; the file loads with `load_lora_weights`, and draws the same."""
    trainer = Trainer(recipe(tiny(family)), tmp_path / "run")
    assert trainer.run()
    records = read_metrics(tmp_path / "run")
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert all(record["kl_loss"] > 0 and record["grad_norm"] > 0 for record in records)

    pipe = load_pipeline(tiny(family))
    untrained, _ = by_pipeline(pipe, family)
    pipe.load_lora_weights(tmp_path / "run" / "checkpoints" / "iteration-000002" / "diffusers")
    drawn, _ = by_pipeline(pipe, family)
    images, _ = by_rollout(trainer.model)
    torch.testing.assert_close(images, drawn, rtol=1e-4, atol=1e-4)
    assert (untrained - drawn).abs().max() > 1e-3
