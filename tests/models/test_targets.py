"""Layers that get adapters: all linear ones of the blocks, as peft's `all-linear`."""

import pytest
import torch

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.models.streaming import repeated_blocks
from crd_fast.train.trainer import Trainer
from crd_fast.weights.make import make_weights
from tests.models.conftest import ALL, PROMPTS, by_pipeline, by_rollout, load_pipeline

ALL_LINEAR = "model.lora_targets=all-linear"


@pytest.mark.parametrize("family", ALL)
def test_all_linear_layers_of_the_blocks(tiny, recipe, tmp_path, family):
    """Each has adapters that matter, none outside has, and the pipeline draws the same with the exported."""
    settings = recipe(tiny(family), ALL_LINEAR, "model.lora_rank=2")
    model = load_model(settings, PROMPTS)
    blocks = repeated_blocks(model.transformer)
    layers = sum(isinstance(module, torch.nn.Linear) for block in blocks for module in block.modules())
    weights = make_weights(model, settings)
    assert len(weights.trained()) == 2 * layers
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    assert all(id(parameter) in within for parameter in weights.trained())
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.trained():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    weights.save_policy(tmp_path)
    images, _ = by_rollout(model)
    pipe = load_pipeline(tiny(family))
    pipe.load_lora_weights(str(tmp_path / "diffusers"))
    torch.testing.assert_close(images, by_pipeline(pipe, family)[0], rtol=1e-4, atol=1e-4)


def test_all_of_them_are_trained(tiny, recipe, tmp_path):
    trainer = Trainer(recipe(tiny("sd3"), ALL_LINEAR, "train.iterations=1"), tmp_path / "run")
    before = [parameter.detach().clone() for parameter in trainer.weights.trained()]
    assert trainer.run()
    changed = [not torch.equal(*pair) for pair in zip(before, trainer.weights.trained(), strict=True)]
    assert sum(changed) >= len(changed) // 2  # A has no gradient while B is 0


def test_a_target_that_is_also_another_module_is_refused(tiny, recipe):
    """peft would adapt a convolution as well, which no LoRA's reader here takes back."""
    words = r"expected linear layers, got 'proj', which is also the Conv2d pos_embed\.proj: write more"
    with pytest.raises(UserError, match=words):
        load_model(recipe(tiny("sd3"), "model.lora_targets=[proj]"))


def test_adapters_that_cannot_differ_by_sample_are_refused_with_streaming(tiny, recipe):
    """Z-Image makes one sequence of a batch before its blocks."""
    settings = recipe(tiny("z-image"), "model.lora_targets=[attention.to_q, cap_embedder.1]")
    assert load_model(settings).transformer
    with pytest.raises(UserError, match=r"inside the blocks with model\.streaming, got cap_embedder\.1"):
        load_model(build_recipe(settings.model_dump(), ["model.streaming=true", "train.checkpointing=true"]))


def test_another_word_is_refused():
    with pytest.raises(UserError, match=r"model\.lora_targets.* at least 1 item"):
        build_recipe({"model": {"lora_targets": []}})
    with pytest.raises(UserError, match=r"model.lora_targets: expected 'default' or 'all-linear' or a"):
        build_recipe({"model": {"lora_targets": "all_linear"}})
