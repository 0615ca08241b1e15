"""What cannot work is refused in one line before anything is encoded or loaded."""

import json
import shutil

import diffusers
import pytest
import torch

from crd_fast.config import build_recipe
from crd_fast.errors import UserError
from crd_fast.models import checks, load_model, sizes_at_most
from crd_fast.models.pipeline import PipelineModel
from tests.pretend_gpu import pretend_gpu

FULL = ("model.method=full", "model.dtype=bf16", "model.snapshots=host", "train.precision=fp32")


@pytest.fixture(autouse=True)
def no_long_work(monkeypatch):
    def refuse(*_):
        raise AssertionError("long work was started")

    monkeypatch.setattr(PipelineModel, "encode", refuse)
    monkeypatch.setattr(PipelineModel, "load", refuse)


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of a tiny pipeline that a test may damage."""
    return shutil.copytree(tiny("sd3"), tmp_path / "copy")


def refused(recipe, words):
    with pytest.raises(UserError) as error:
        load_model(recipe)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_no_pipeline(recipe, tmp_path):
    refused(recipe(tmp_path), "expected a diffusers pipeline, found no model_index.json")
    (tmp_path / "model_index.json").write_text("{")
    refused(recipe(tmp_path), "model_index.json cannot be read")


def test_a_family_that_is_not_supported(recipe, tmp_path):
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(recipe(tmp_path), "StableDiffusionXLPipeline is not supported; supported: Stable Diffusion 3")


def test_a_path_that_is_nothing(recipe, monkeypatch):
    refused(recipe("some/where/else"), "the folder of a diffusers pipeline or a hub id")

    def offline(*_, **__):
        raise OSError("cannot reach the hub\nand more lines")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    refused(
        recipe("org/name"), "'org/name' is no folder here, and cannot be downloaded: cannot reach the hub"
    )


@pytest.mark.parametrize(
    "family, change, words",
    [
        ("flux", {"text_encoder_2": [None, None]}, "expected a text_encoder_2 for FLUX.1, got [null, null]"),
        ("sd3", {"text_encoder": None}, "expected a text_encoder for Stable Diffusion 3, got null"),
        ("sd3", {"vae": None}, "expected a vae for Stable Diffusion 3, got null"),
        ("sd3", {"scheduler": "euler"}, 'expected a scheduler for Stable Diffusion 3, got "euler"'),
        ("sd3", {"text_encoder_3": None}, "expected a text_encoder_3 for Stable Diffusion 3, got null"),
        ("sd3", {"vae": ["diffusers", "AutoencoderXX"]}, "vae: expected a class of diffusers "),
        ("sd3", {"text_encoder": ["transformers", "CLIPXX"]}, "text_encoder: expected a class of transf"),
        ("sd3", {"transformer": ["own", "SD3Own"]}, 'of diffusers or transformers, got ["own", "SD3Own"]'),
        ("sd3", {"_class_name": "FluxPipeline"}, "_3 for FLUX.1, got ["),
    ],
)
def test_components_that_the_pipeline_wants(tiny, recipe, tmp_path, family, change, words):
    copy = shutil.copytree(tiny(family), tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text()) | change
    index = {name: value for name, value in index.items() if value is not None}
    (copy / "model_index.json").write_text(json.dumps(index))
    refused(recipe(copy), words)
    with pytest.raises(UserError, match=r"model_index\.json"):
        sizes_at_most(copy, recipe(copy))


def test_a_class_that_is_not_listed(tiny, recipe, monkeypatch):
    """transformers makes the names of old tokenizers only when they are asked for."""
    monkeypatch.setattr(checks, "_names", lambda library: frozenset())
    sizes_at_most(tiny("sd3"), recipe(tiny("sd3")))


@pytest.mark.parametrize("component", ["transformer", "text_encoder_3", "vae"])
def test_missing_weights(recipe, copy, component):
    for file in (copy / component).glob("*.safetensors"):
        file.unlink()
    refused(recipe(copy), f"{component}: expected weights in .safetensors files, found none")
    shutil.rmtree(copy / component)
    refused(recipe(copy), f"{component} (")


def test_a_missing_shard(recipe, copy):
    weights = {
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    }
    folder = copy / "text_encoder_3"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    refused(recipe(copy), "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("keep, words", [(-100, "is cut short"), (4, "is damaged"), (0, "is damaged")])
def test_weights_cut_short(recipe, copy, keep, words):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(recipe(copy), words)


@pytest.mark.parametrize(
    "family, resolution, words",
    [
        ("sd3", 72, "expected a multiple of 16 for Stable Diffusion 3, got 72 (next to it: 64, 80)"),
        ("sd3", 512, "expected at most 256 for Stable Diffusion 3, got 512"),
        ("flux", 40, "expected a multiple of 16 for FLUX.1"),
        ("flux2-klein", 40, "expected a multiple of 16"),
        ("qwen-image", 40, "expected a multiple of 16"),
        ("z-image", 40, "expected a multiple of 16"),
        ("sana", 48, "expected a multiple of 32 for Sana, got 48 (next to it: 32, 64)"),
    ],
)
def test_resolutions(tiny, recipe, family, resolution, words):
    refused(recipe(tiny(family), f"rollout.resolution={resolution}"), words)


def test_lora_targets_that_match_nothing(tiny, recipe):
    refused(
        recipe(tiny("sd3"), "model.lora_targets=[attn.to_q, to_nothing]"),
        "'to_nothing' matches no linear layer of SD3Transformer2DModel",
    )


def test_another_solver(recipe, copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"][1] = "DDIMScheduler"
    (copy / "model_index.json").write_text(json.dumps(index))
    refused(recipe(copy), "expected FlowMatchEulerDiscreteScheduler, got DDIMScheduler")


@pytest.mark.parametrize(
    ("key", "value"), [("num_train_timesteps", 500), ("invert_sigmas", True), ("stochastic_sampling", True)]
)
def test_a_schedule_that_is_walked_otherwise(recipe, copy, key, value):
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    refused(recipe(copy), f"scheduler: {key}: expected ")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "train.precision: bf16 needs a GPU of compute capability 8.0 (Ampere) or later"),
        (FULL, "model.dtype: bf16 needs a GPU"),
    ],
)
def test_bfloat16_on_a_gpu_without(tiny, recipe, monkeypatch, overrides, words):
    settings = recipe(tiny("sd3"), *(overrides or ("train.precision=bf16",)))
    with pretend_gpu():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        refused(settings, words)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
        with pytest.raises(AssertionError, match="long work was started"):
            load_model(settings)


def test_quantized_weights_cannot_be_trained():
    with pytest.raises(UserError, match="quantization: expected none with method full"):
        build_recipe({"model": {"method": "full", "quantization": "nf4"}})


@pytest.mark.parametrize("component", ["transformer", "text_encoder_3"])
def test_a_pipeline_that_is_quantised_already(recipe, copy, component):
    config = copy / component / "config.json"
    settings = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
    refused(recipe(copy), f"{component} is quantised already (bitsandbytes); expected the original weights")
    config.write_text("[]")
    refused(recipe(copy), f"{component}/config.json: expected an object, got list")
