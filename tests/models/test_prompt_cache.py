"""Prompts are encoded once, by encoders that are gone before the transformer comes."""

import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.models.prompt_cache import fingerprint
from crd_fast.models.sd3 import SD3Model
from tests.models.conftest import PROMPTS
from tools.make_tiny_pipeline import make_tiny_pipeline


@pytest.fixture
def encoded(monkeypatch):
    """Prompts in the order in which they were encoded."""
    prompts = []
    encode = SD3Model._encode

    def count(model, pipe, prompt):
        prompts.append(prompt)
        return encode(model, pipe, prompt)

    monkeypatch.setattr(SD3Model, "_encode", count)
    return prompts


def test_each_prompt_is_encoded_once(tiny, recipe, tmp_path, encoded):
    cached = recipe(tiny("sd3"), f"model.prompt_cache={tmp_path / 'cache'}")
    model = load_model(cached, [PROMPTS[0], PROMPTS[0]])
    assert encoded == [PROMPTS[0], ""]
    first = model.encode_prompts(PROMPTS)
    assert encoded == [PROMPTS[0], "", PROMPTS[1]]
    again = load_model(cached, PROMPTS).encode_prompts(PROMPTS)
    assert len(encoded) == 3
    assert all(torch.equal(again[key], value) for key, value in first.items())
    assert first["states"].shape == (2, 77 + 256, 48) and first["pooled"].shape == (2, 32)
    stored = [load_file(path) for path in (tmp_path / "cache").glob("*.safetensors")]
    assert len(stored) == 3


def test_embeddings_are_the_pipelines(tiny, recipe):
    """Also at another length of text."""
    model = load_model(recipe(tiny("sd3"), "model.text_length=40"))
    pipe = model.pipeline.from_pretrained(tiny("sd3"))
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=40)
    found = model.encode_prompts(PROMPTS)
    torch.testing.assert_close(found["states"], states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-5, atol=1e-5)


def test_encoders_and_transformer_are_never_in_memory_together(tiny, recipe, tmp_path, monkeypatch):
    seen = []
    encode = SD3Model._encode

    def look(model, pipe, prompt):
        seen.append(weakref.ref(pipe.text_encoder_3))
        assert pipe.vae is None and pipe.transformer.device.type == "meta"
        return encode(model, pipe, prompt)

    monkeypatch.setattr(SD3Model, "_encode", look)
    load = SD3Model.load

    def check(model, checkpointing):
        assert seen and all(encoder() is None for encoder in seen)
        load(model, checkpointing)

    monkeypatch.setattr(SD3Model, "load", check)
    load_model(recipe(tiny("sd3"), f"model.prompt_cache={tmp_path / 'cache'}"), PROMPTS)


def test_a_cache_of_another_encoder_is_refused(tiny, recipe, tmp_path):
    cache = f"model.prompt_cache={tmp_path / 'cache'}"
    load_model(recipe(tiny("sd3"), cache))
    with pytest.raises(UserError, match=r"another text encoder .text_length: expected 40, got 256"):
        load_model(recipe(tiny("sd3"), cache, "model.text_length=40"))
    make_tiny_pipeline("sd3", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"cache was made by another text encoder .encoders: expected"):
        load_model(recipe(tmp_path / "other", cache))
    same_elsewhere = shutil.copytree(tiny("sd3"), tmp_path / "copy")
    load_model(recipe(same_elsewhere, cache))

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="photos holds something else"):
        load_model(recipe(tiny("sd3"), f"model.prompt_cache={tmp_path / 'photos'}"))


def test_a_damaged_file_is_named(tiny, recipe, tmp_path):
    model = load_model(recipe(tiny("sd3"), f"model.prompt_cache={tmp_path / 'cache'}"))
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"{file.name} cannot be read, remove it"):
        model.encode_prompts([""])


def test_fingerprint_sees_content_names_and_large_files(tmp_path):
    (tmp_path / "encoder").mkdir()
    file = tmp_path / "encoder" / "weights"
    file.write_bytes(bytes(5_000_000))
    before = fingerprint([tmp_path / "encoder"])
    assert fingerprint([tmp_path / "encoder"]) == before
    file.write_bytes(bytes(4_999_999) + b"1")
    last_byte = fingerprint([tmp_path / "encoder"])
    file.rename(file.with_name("renamed"))
    assert len({before, last_byte, fingerprint([tmp_path / "encoder"])}) == 3
