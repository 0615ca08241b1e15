"""Training that starts from a LoRA: at the strength that the pipeline gives the same file."""

import logging

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from crd_fast.weights.lora import LoraWeights
from crd_fast.weights.make import make_weights
from tests.models.conftest import PROMPTS, load_pipeline
from tests.models.test_families import ALL, by_pipeline, by_rollout


def written(folder, recipe, path):
    """A LoRA of rank 2 that matters, as diffusers writes it, with a strength of its own in its metadata."""
    model = load_model(recipe(folder, "model.lora_rank=2", "model.lora_alpha=3"), PROMPTS)
    weights = make_weights(model, recipe(folder, "model.lora_rank=2", "model.lora_alpha=3"))
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.trained():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    weights.save_policy(path)
    (file,) = (path / "diffusers").glob("*.safetensors")
    return file


def drawn_from(file, folder, recipe, *overrides):
    """Pictures of a run's policy before its first step."""
    trainer = Trainer(recipe(folder, f"model.init_lora={file}", *overrides), file.parent / "run")
    return by_rollout(trainer.model)[0], trainer


def drawn_by_pipeline(file, folder, family):
    pipe = load_pipeline(folder)
    pipe.load_lora_weights(str(file))
    return by_pipeline(pipe, family)[0]


@pytest.mark.parametrize("family", ALL)
def test_it_draws_as_the_pipeline_with_the_file(tiny, recipe, tmp_path, family):
    file = written(tiny(family), recipe, tmp_path)
    images, trainer = drawn_from(file, tiny(family), recipe)  # of rank 4 and alpha 8
    torch.testing.assert_close(images, drawn_by_pipeline(file, tiny(family), family), rtol=1e-4, atol=1e-4)
    assert (images - by_pipeline(load_pipeline(tiny(family)), family)[0]).abs().max() > 1e-3
    assert all(trainer.weights.is_policy(name) for name in ("old", "sampler"))
    assert "read" not in str(list(trainer.weights.state()))


def test_kohya_names_and_alpha(tiny, recipe, tmp_path):
    """As sd-scripts writes FLUX: names of the original code, alpha beside the tensors."""
    generator = torch.Generator().manual_seed(1)
    width = load_pipeline(tiny("flux")).transformer.inner_dim
    state = {
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.randn(
            2, width, generator=generator
        ),
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.randn(width, 2, generator=generator),
        "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "kohya.safetensors")
    images, _ = drawn_from(tmp_path / "kohya.safetensors", tiny("flux"), recipe)
    expected = drawn_by_pipeline(tmp_path / "kohya.safetensors", tiny("flux"), "flux")
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_kohya_names_of_the_first_and_last_layers(tiny, recipe, tmp_path):
    """diffusers gives them names that its pipeline passes over, the last ones without their alpha."""
    network = load_model(recipe(tiny("flux")), PROMPTS).transformer
    generator, state, expected = torch.Generator().manual_seed(1), {}, {}
    for name, layer in {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer_linear": "proj_out",
        "final_layer_adaLN_modulation_1": "norm_out.linear",
    }.items():
        height, width = network.get_submodule(layer).weight.shape
        down, up = torch.randn(2, width, generator=generator), torch.randn(height, 2, generator=generator)
        tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
        state |= {f"lora_unet_{name}.{part}": tensor for part, tensor in tensors.items()}
        if layer == "norm_out.linear":  # there diffusers has shift and scale in the other order
            up = torch.cat(up.chunk(2)[::-1])
        expected[layer] = 0.5 * up @ down
    file = tmp_path / "kohya.safetensors"
    save_file(state, file)
    found = changes(LoraWeights.of_file(network, file, FluxLoraLoaderMixin))
    for layer, change in expected.items():
        torch.testing.assert_close(found.pop(layer), change)
    assert not any(change.any() for change in found.values())  # of layers whose names end alike


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_alpha_beside_names_of_diffusers(tiny, recipe, tmp_path, prefix):
    """Which the pipeline of this family refuses; it reads none without a prefix."""
    file = written(tiny("sd3"), recipe, tmp_path)
    state = load_file(file)
    key = QUERY.replace("to_q", "to_k")
    more = {f"{prefix}{QUERY}.alpha": torch.tensor(1.0), f"{prefix}{key}.alpha": torch.tensor(6.0)}
    named = {name.replace("transformer.", prefix, 1): value for name, value in state.items()}
    save_file(named | more, tmp_path / "alpha.safetensors")
    model = load_model(recipe(tiny("sd3")), PROMPTS)
    found = changes(LoraWeights.of_file(model.transformer, tmp_path / "alpha.safetensors", model.lora_loader))
    for layer, change in found.items():
        down, up = (state[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
        strength = {QUERY: 0.5, key: 3.0}.get(layer, 1.0)
        torch.testing.assert_close(change, strength * up @ down)


def changes(weights):
    """What each adapter adds to its layer's weight."""
    state = weights.state()
    return {
        name.removeprefix("policy/").removesuffix(".lora_A.weight"): state[name.replace("lora_A", "lora_B")]
        @ down
        for name, down in state.items()
        if name.startswith("policy/") and "lora_A" in name
    }


QUERY = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "name, words",
    [
        (f"transformer.{QUERY}.lora_magnitude_vector", "expected a LoRA, got a DoRA"),
        (f"transformer.{QUERY}.dora_scale", "expected a LoRA, got a DoRA"),
        (f"transformer.{QUERY}.lokr_w1", "expected a LoRA, got a LoKr"),
        (f"transformer.{QUERY}.hada_w1_a", "expected a LoRA, got a LoHa"),
        (f"transformer.{QUERY}.lora_B.bias", f"expected adapters without a bias, got one of {QUERY}$"),
    ],
)
def test_what_a_and_b_are_not_all_of_is_refused(tiny, recipe, tmp_path, name, words):
    """The pipeline draws with the rest, or without a word about it."""
    file = written(tiny("sd3"), recipe, tmp_path)
    state = load_file(file)
    width = len(state[f"transformer.{QUERY}.lora_B.weight"])
    save_file(state | {name: torch.ones(width)}, file)
    with pytest.raises(UserError, match=f"LoRA .*safetensors: {words}"):
        Trainer(recipe(tiny("sd3"), f"model.init_lora={file}"), tmp_path / "run")


@pytest.mark.parametrize("part", "AB")
def test_a_layer_without_one_of_the_two_is_refused(tiny, recipe, tmp_path, part):
    """peft would begin with its own random numbers in that place."""
    file = written(tiny("sd3"), recipe, tmp_path)
    state = load_file(file)
    del state[f"transformer.{QUERY}.lora_{part}.weight"]
    save_file(state, file)
    with pytest.raises(UserError, match=f"expected A and B of each layer, got no {part} of {QUERY}"):
        Trainer(recipe(tiny("sd3"), f"model.init_lora={file}"), tmp_path / "run")


def test_numbers_that_are_none_are_refused(tiny, recipe, tmp_path):
    file = written(tiny("sd3"), recipe, tmp_path)
    state = load_file(file)
    state[f"transformer.{QUERY}.lora_A.weight"][0, 0] = torch.nan
    save_file(state, file)
    with pytest.raises(UserError, match=f"expected finite numbers, got NaN or infinity in {QUERY}"):
        Trainer(recipe(tiny("sd3"), f"model.init_lora={file}"), tmp_path / "run")


def test_a_file_is_taken_as_it_is_onto_a_base_in_bfloat16(tiny, recipe, tmp_path):
    """Adapters are in float32 there too."""
    file = written(tiny("sd3"), recipe, tmp_path)
    model = load_model(recipe(tiny("sd3"), "train.precision=bf16"), PROMPTS)
    assert model.transformer.dtype == torch.bfloat16
    weights = LoraWeights.of_file(model.transformer, file, model.lora_loader)
    state = load_file(file)
    for name, value in weights.state().items():
        if name.startswith("policy/"):
            assert torch.equal(value, state[f"transformer.{name.removeprefix('policy/')}"])


def test_folders_of_a_checkpoint(tiny, recipe, tmp_path):
    """The checkpoint's own means the LoRA in it, which the one for peft is too."""
    settings = recipe(tiny("sd3"), "train.iterations=1")
    assert Trainer(settings, tmp_path / "run").run()
    folder = checkpoint.find(tmp_path / "run")
    model = load_model(settings, PROMPTS)
    found, of_peft, expected = (
        LoraWeights.of_file(load_model(settings, PROMPTS).transformer, path, model.lora_loader).state()
        for path in (folder, folder / "peft", folder / "diffusers")
    )
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert all(torch.equal(value, expected[name]) for name, value in of_peft.items())


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 5}, {"use_rslora": True, "alpha_pattern": {QUERY: 6}, "rank_pattern": {QUERY: 3}}],
    ids=["alpha", "patterns"],
)
def test_what_peft_writes(tiny, recipe, tmp_path, settings):
    """Other trainers leave a `PeftModel`: at the strength that peft gives it."""
    model = load_model(recipe(tiny("sd3"), "model.lora_rank=4"), PROMPTS)
    config = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False, **settings)
    other = get_peft_model(load_pipeline(tiny("sd3")).transformer, config)
    other.save_pretrained(str(tmp_path / "peft"))
    other.merge_and_unload()
    weights = LoraWeights.of_file(model.transformer, tmp_path / "peft", model.lora_loader)
    layers = dict(model.transformer.named_modules())
    for name in (QUERY, QUERY.replace("to_q", "to_out.0")):
        merged = other.base_model.model.get_submodule(name).weight
        layer = layers[name]
        change = layer.get_delta_weight("policy")
        torch.testing.assert_close(layer.base_layer.weight + change, merged, rtol=1e-5, atol=1e-6)
        assert change.abs().max() > 1e-4
    assert weights.is_policy("old")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"expected peft's adapter_config\.json beside it"):
        LoraWeights.of_file(load_model(recipe(tiny("sd3")), PROMPTS).transformer, tmp_path / "peft")


def test_an_adapter_of_a_convolution_is_named(tiny, recipe, tmp_path):
    file = tmp_path / "convolution.safetensors"
    projection = load_model(recipe(tiny("sd3")), PROMPTS).transformer.pos_embed.proj
    width, channels, *size = projection.weight.shape
    state = {"lora_A.weight": torch.ones(2, channels, *size), "lora_B.weight": torch.ones(width, 2, 1, 1)}
    save_file({f"transformer.pos_embed.proj.{name}": value for name, value in state.items()}, file)
    with pytest.raises(UserError, match=r"expected adapters of linear layers, got one of pos_embed\.proj"):
        Trainer(recipe(tiny("sd3"), f"model.init_lora={file}"), tmp_path / "run")


def test_what_is_left_out_is_said(tiny, recipe, tmp_path, caplog):
    """Adapters of text encoders, which are not trained, and of blocks that the transformer has not."""
    file = written(tiny("sd3"), recipe, tmp_path)
    state = load_file(file)
    save_file(state, file)
    drawn_from(file, tiny("sd3"), recipe)
    assert "left out" not in caplog.text
    others = ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj", QUERY.replace("0", "77")]
    others[1] = f"transformer.{others[1]}"
    for other in others:
        for part in "AB":
            key = f"lora_{part}.weight"
            state[f"{other}.{key}"] = state[f"transformer.{QUERY}.{key}"].clone()
    (tmp_path / "more").mkdir()
    save_file(state, tmp_path / "more" / "file.safetensors")
    drawn_from(tmp_path / "more" / "file.safetensors", tiny("sd3"), recipe)
    (warned,) = (text for text in caplog.messages if "left out" in text)
    assert warned.endswith(f"{others[0]} and 1 more") or warned.endswith(f"{others[1]} and 1 more")


def test_what_a_layer_has_beside_its_adapter_is_said(tiny, recipe, tmp_path, caplog):
    """As files that LoRAs were taken out of models into have it: the whole difference of a bias."""
    file = written(tiny("sd3"), recipe, tmp_path)
    save_file(load_file(file) | {f"transformer.{QUERY}.diff_b": torch.ones(32)}, tmp_path / "d.safetensors")
    drawn_from(tmp_path / "d.safetensors", tiny("sd3"), recipe)
    (warned,) = (text for text in caplog.messages if "left out" in text)
    assert warned.endswith(f"left out: transformer.{QUERY}.diff_b")


def test_a_resumed_run_does_not_start_over(tiny, recipe, tmp_path):
    file = written(tiny("sd3"), recipe, tmp_path)
    settings = recipe(tiny("sd3"), f"model.init_lora={file}", "checkpoint.every=1", "train.iterations=1")
    assert Trainer(settings, tmp_path / "run").run()
    trained = load_file(checkpoint.find(tmp_path / "run", "newest") / "training.safetensors")
    file.unlink()
    resumed = Trainer(settings, tmp_path / "run", resume=True)
    assert all(
        torch.equal(value, trained[f"weights/{name}"]) for name, value in resumed.weights.state().items()
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("model.lora_rank=1",), "model.lora_rank: expected at least 2, as .* has, got 1"),
        (
            ("model.lora_targets=[attn.to_q]",),
            "more layers that are not trained; name them in model.lora_targets",
        ),
        (("model.init_lora=nowhere.safetensors",), "LoRA nowhere.safetensors: no such file"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, recipe, tmp_path, overrides, message):
    file = written(tiny("sd3"), recipe, tmp_path)
    with pytest.raises(UserError, match=message):
        Trainer(recipe(tiny("sd3"), f"model.init_lora={file}", *overrides), tmp_path / "run")


@pytest.mark.parametrize("content", ["other", "none"])
def test_files_that_are_none(tiny, recipe, tmp_path, content):
    """In our words: what diffusers says of them is several lines."""
    file, said = tmp_path / "file.safetensors", []
    if content == "other":
        save_file({"text_encoder.layer.lora_A.weight": torch.ones(2, 3)}, file)
    else:
        file.write_bytes(b"nothing")
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("diffusers").addHandler(handler)
    with pytest.raises(UserError, match=r"LoRA .*file.safetensors"):
        Trainer(recipe(tiny("sd3"), f"model.init_lora={file}"), tmp_path / "run")
    logging.getLogger("diffusers").removeHandler(handler)
    assert not said


def test_a_lora_that_is_none_is_refused_before_the_model_is_looked_for(recipe, tmp_path):
    file = tmp_path / "nowhere.safetensors"
    with pytest.raises(UserError, match=r"LoRA .*nowhere.safetensors: no such file"):
        Trainer(recipe(tmp_path / "no-model", f"model.init_lora={file}"), tmp_path / "run")
    with pytest.raises(UserError, match=r"expected a file, or a folder with one .safetensors file, got 0"):
        Trainer(recipe(tmp_path / "no-model", f"model.init_lora={tmp_path}"), tmp_path / "run")
