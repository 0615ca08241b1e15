"""LoRA on 8- and 4-bit layers, against dense layers with the same values."""

import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.models.quantize import Int8Linear, quantize, quantized_layers
from crd_fast.run.metrics import read_metrics
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from crd_fast.weights.make import make_weights
from tests.models.conftest import PROMPTS

KINDS = ("int8", "nf4")
LAYERS = {"int8": Int8Linear, "nf4": bnb.nn.Linear4bit}


def is_quantized(module):
    return isinstance(module, tuple(LAYERS.values()))


def dense(network):
    """The same network with ordinary layers of the quantized values."""
    for name, module in list(network.named_modules()):
        if is_quantized(module):
            if isinstance(module, Int8Linear):
                weight = module.weight.float() * module.scale[:, None] / 127
            else:
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            layer.weight.data = weight
            layer.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer)
    return network


def velocity(model, requires_grad=True):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *model.latent_shape(64), generator=generator)
    with torch.set_grad_enabled(requires_grad):
        return model.velocity(x, torch.tensor([0.9, 0.3]), model.encode_prompts(PROMPTS))


def lora_gradient(model, recipe, forward_first=False):
    weights = make_weights(model, recipe)
    torch.manual_seed(5)
    for parameter in weights.trained():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if forward_first:
        velocity(model, requires_grad=False)
    out = velocity(model)
    out.square().mean().backward()
    # Qwen-Image's last block has a text stream that goes nowhere
    gradients = [p.grad for p in weights.trained() if p.grad is not None]
    assert len(gradients) > 0.9 * len(weights.trained())
    return out.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["sd3", "qwen-image"])
def test_gradient_is_that_of_dense_layers(tiny, recipe, family, kind):
    """With checkpointing, and after a forward without gradient, in which bitsandbytes may repack weights."""
    settings = recipe(tiny(family), f"model.quantization={kind}")
    found, gradient = lora_gradient(load_model(settings), settings, forward_first=True)

    plain = recipe(tiny(family), f"model.quantization={kind}", "train.checkpointing=false")
    model = load_model(plain)
    dense(model.transformer)
    expected, expected_gradient = lora_gradient(model, plain)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_in_blocks_are_quantized(tiny, recipe, kind):
    base = velocity(load_model(recipe(tiny("qwen-image"))), requires_grad=False)
    model = load_model(recipe(tiny("qwen-image"), f"model.quantization={kind}"))
    names = {name for name, module in model.transformer.named_modules() if is_quantized(module)}
    assert all(isinstance(model.transformer.get_submodule(name), LAYERS[kind]) for name in names)
    assert {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mod.1"} <= names
    assert not {"proj_out", "img_in", "txt_in", "transformer_blocks.0.img_mod.1"} & names
    found = velocity(model, requires_grad=False)
    error = (found - base).norm() / base.norm()
    assert 1e-4 < error < {"int8": 0.02, "nf4": 0.2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_batch(tiny, recipe, kind):
    model = load_model(recipe(tiny("sd3"), f"model.quantization={kind}"))
    x = torch.randn(2, *model.latent_shape(64), generator=torch.Generator().manual_seed(3))
    x[1] *= 50  # an outlier beside it
    sigma, embeddings = torch.tensor([0.9, 0.3]), model.encode_prompts(PROMPTS)
    with torch.no_grad():
        both = model.velocity(x, sigma, embeddings)[:1]
        alone = model.velocity(x[:1], sigma[:1], {key: value[:1] for key, value in embeddings.items()})
    torch.testing.assert_close(alone, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training(tiny, recipe, tmp_path, kind):
    settings = recipe(
        tiny("flux"),
        f"model.quantization={kind}",
        "train.precision=bf16",
        "train.micro_batch=1",
        "train.steps_per_iteration=1",
        "model.text_length=8",
    )
    trainer = Trainer(settings, tmp_path / "run")
    before = trainer.weights.trained()[1].clone()
    assert trainer.run()
    assert not torch.equal(trainer.weights.trained()[1], before)
    records = read_metrics(tmp_path / "run")
    assert len(records) == 2
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert all(record["grad_norm"] > 0 for record in records)
    assert records[0]["implicit_reward_abs"] == 0  # policy and old are equal, to the bit
    assert records[1]["implicit_reward_abs"] > 0


def test_layers_by_name(tiny, recipe):
    network = load_model(recipe(tiny("z-image"))).transformer
    names = quantized_layers(network, keep=("layers.0.feed_forward",))
    assert "noise_refiner.0.attention.to_q" in names and "layers.1.feed_forward.w1" in names
    assert not any(name.startswith(("layers.0.feed_forward", "t_embedder", "cap_embedder")) for name in names)


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
def test_rows_of_any_size_keep_their_digits_in_int8(size):
    """float16 would lose small ones, and make large ones infinite."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    layer.weight.data.normal_().mul_(size)
    layer.weight.data[3] = 0
    weight = layer.weight.detach()
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"linear": layer})])})
    quantize(network, "int8", torch.float32, torch.device("cpu"))
    found = network.blocks[0]["linear"]
    assert isinstance(found, Int8Linear)
    error = (found.weight * found.scale[:, None] / 127 - weight).abs().amax(1)
    assert (error <= weight.abs().amax(1) / 254 * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_on_a_quantized_base_is_fused_into_the_original(tiny, recipe, tmp_path, inside, caplog, kind):
    run = tmp_path / "run"
    settings = recipe(tiny("sd3"), f"model.quantization={kind}", "train.iterations=1")
    assert Trainer(settings, run).run()
    code, _, errors = inside("export", run, "--to", "fused", "--out", tmp_path / "fused")
    assert code == 0 and "another base" not in caplog.text, errors
    older = checkpoint.read_state(checkpoint.find(run))
    del older["model"]["fingerprint"]
    older["model"]["parameters"] //= 2  # earlier versions counted the bytes of 4 bits
    model = load_model(recipe(tiny("sd3")))
    if kind == "nf4":
        checkpoint.check_same_model(older, model, run)
    else:
        with pytest.raises(UserError, match="a checkpoint of another model"):
            checkpoint.check_same_model(older, model, run)
