"""Prompts are encoded once, by encoders that are gone before the transformer comes."""

import itertools
import os
import shutil
import weakref
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from crd_fast.errors import UserError
from crd_fast.models import load_model, prompt_cache
from crd_fast.models.prompt_cache import GIB, PromptCache, fingerprint
from crd_fast.models.sd3 import SD3Model
from crd_fast.run.observer import Observer
from crd_fast.train import iteration_prompts
from crd_fast.train.trainer import Trainer
from tests.cli.conftest import metrics
from tests.models.conftest import ALL, PROMPTS
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


def test_a_full_disk_is_said_and_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    cache = PromptCache(tmp_path, GIB)
    cache.put("a", {"states": torch.ones(2, 2)})

    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(prompt_cache, "save_file", full)
    with pytest.raises(
        UserError, match=r"model\.prompt_cache: .* cannot be written: .*No space left"
    ) as error:
        cache.put("b", {"states": torch.ones(2, 2)})
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert len(list(tmp_path.iterdir())) == 1 and cache.get("b") is None


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


def some(*values, rows=4):
    """Embeddings of a prompt: with `rows` rows that are not zero of 8."""
    states = torch.zeros(8, 3)
    states[:rows] = torch.tensor(values).repeat(rows, 3)[:, :3]
    return {"states": states, "pooled": torch.zeros(5), "length": torch.tensor(rows)}


def bits(tensor):
    return tensor.shape, tensor.dtype, tensor.reshape(-1).contiguous().view(torch.uint8).tolist()


def same(found, expected):
    return {key: bits(v) for key, v in found.items()} == {key: bits(v) for key, v in expected.items()}


def age(cache, *prompts):
    """As if they had been asked for in this order, long ago."""
    for i, prompt in enumerate(prompts):
        os.utime(cache._path(prompt), (i, i))


def held(cache, prompts):
    """Which of them it has, without asking it."""
    return [prompt for prompt in prompts if cache._path(prompt).exists()]


def test_zeros_at_the_end_are_not_written_and_come_back_to_the_bit(tmp_path):
    cache = PromptCache(tmp_path, GIB)
    minus = some(1.0, rows=2)
    minus["states"][5, 1] = -0.0  # is no zero to the bit
    for prompt, embeddings, rows in [
        ("own", some(1.0, 2.0, 3.0), 4),
        ("all", some(1.0, rows=8), 8),
        ("none", some(0.0), 0),
        ("minus", minus, 6),
        ("half", {key: v.bfloat16() for key, v in some(1.5, rows=3).items()}, 3),
    ]:
        cache.put(prompt, embeddings)
        assert len(load_file(cache._path(prompt))["states"]) == rows
        found = cache.get(prompt)
        assert same(found, embeddings)
    assert cache.get("missing") is None


def test_what_was_not_asked_for_the_longest_goes_first(tmp_path):
    prompts = ["a", "b", "c", "d", "e"]
    PromptCache(tmp_path, GIB).put("a", some(1.0))
    size = PromptCache(tmp_path, GIB).size("a")
    cache = PromptCache(tmp_path, 3 * size)  # knows nothing of what is there
    for prompt in "bc":
        cache.put(prompt, some(1.0))
    age(cache, "a", "b", "c")
    assert "b" in cache and cache.get("a") is not None  # asked for
    cache.put("d", some(1.0))
    assert held(cache, prompts) == ["a", "b", "d"]
    age(cache, "a", "b", "d")
    cache.put("e", some(1.0), needed=["a", "d"])
    assert held(cache, prompts) == ["a", "d", "e"]
    cache.put("b", some(1.0), needed=prompts)  # more than it may hold: what is needed stays
    assert held(cache, prompts) == ["a", "b", "d", "e"]
    assert "missing" not in cache


def test_parts_of_files_by_processes_that_were_killed_go(tmp_path):
    old, new = tmp_path / "old.1.partial", tmp_path / "new.2.partial"
    for path in (old, new):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    PromptCache(tmp_path, 1).put("a", some(1.0))
    assert not old.exists() and new.exists()


def test_processes_of_one_number_write_the_same_prompt(tmp_path, monkeypatch):
    """As those of two containers are that share the folder: each is number 1."""
    save = prompt_cache.save_file

    def meanwhile(tensors, path, rows):
        save(tensors, path, rows)
        monkeypatch.setattr(prompt_cache, "save_file", save)
        PromptCache(tmp_path, 1).put("a", some(2.0))

    monkeypatch.setattr(prompt_cache, "save_file", meanwhile)
    cache = PromptCache(tmp_path, 1)
    cache.put("a", some(1.0))
    assert all(torch.equal(value, some(1.0)[key]) for key, value in cache.get("a").items())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def many(tmp_path):
    """A file of many prompts."""
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"{i} red circles" for i in range(40)), encoding="utf-8")
    return path


class Counts(Observer):
    def __init__(self):
        self.begun, self.seen = [], 0

    @contextmanager
    def phase(self, name, total=None):
        if name == "encoding":
            self.begun.append(total)
        self.within = name
        yield

    def advance(self, count):
        self.seen += count if self.within == "encoding" else 0


def test_only_what_the_next_iterations_need_is_encoded(tiny, recipe, tmp_path, many, encoded, monkeypatch):
    """Two iterations at a time, before the first of them; what is drawn does not change."""
    monkeypatch.setattr(iteration_prompts, "ENCODED_AHEAD", 4)
    settings = recipe(
        tiny("sd3"),
        f"rollout.prompts={many}",
        f"model.prompt_cache={tmp_path / 'cache'}",
        "train.iterations=5",
    )
    counts = Counts()
    run = Trainer(settings, tmp_path / "run", observer=counts)
    seed = settings.train.seed
    drawn = [[entry["prompt"] for entry in run.prompts.source.draw(2, seed, i)] for i in range(5)]
    assert set(encoded) == {"", *drawn[0], *drawn[1]} and counts.begun == [5]
    for iteration, so_far in enumerate([2, 2, 4, 4, 5]):
        run.iterate()
        assert set(encoded) == {"", *itertools.chain(*drawn[:so_far])}, iteration
    assert len(encoded) == len(set(encoded)) == counts.seen == 11 and counts.begun == [5, 4, 2]
    resumed = Trainer(settings, tmp_path / "other")
    assert len(encoded) == 11 and resumed.iteration == 0


def test_a_run_in_a_small_cache_is_the_same_run(tiny, recipe, tmp_path, many, encoded):
    """Each iteration's prompts push out those of the one before; nothing that is needed is missing."""

    def train(name, gb):
        settings = recipe(
            tiny("sd3"),
            f"rollout.prompts={many}",
            f"model.prompt_cache={tmp_path / name}",
            f"model.prompt_cache_gb={gb}",
            "train.iterations=3",
            "evaluate.every=3",
        )
        assert Trainer(settings, tmp_path / f"run-{name}").run()
        return metrics(tmp_path / f"run-{name}")

    expected = train("large", 1)
    files = list((tmp_path / "large").glob("*.safetensors"))
    largest = max(file.stat().st_size for file in files)
    encoded.clear()
    assert train("small", 3 * largest / GIB) == expected
    assert len(list((tmp_path / "small").glob("*.safetensors"))) <= 3 < len(files)
    assert len(encoded) == len(files)  # nothing ahead that there was no room for


def test_prompts_that_another_run_removes_are_encoded_again(tiny, recipe, tmp_path, encoded, monkeypatch):
    model = load_model(recipe(tiny("sd3"), f"model.prompt_cache={tmp_path / 'cache'}"), PROMPTS)
    expected = model.encode_prompts(PROMPTS)
    for file in (tmp_path / "cache").glob("*.safetensors"):
        file.unlink()
    found = model.encode_prompts(PROMPTS)
    assert encoded == [*PROMPTS, "", *PROMPTS] and same(found, expected)

    get = PromptCache.get

    def removed(cache, prompt):
        cache._path(prompt).unlink()
        return get(cache, prompt)

    monkeypatch.setattr(PromptCache, "get", removed)
    with pytest.raises(UserError, match=r"other runs remove prompts as soon as .* model.prompt_cache_gb"):
        model.encode_prompts(PROMPTS)


@pytest.mark.parametrize("family", ALL)
def test_cached_embeddings_are_the_encoders_to_the_bit(tiny, recipe, family, tmp_path):
    """And in less room where the family masks what a text is filled up with."""
    model = load_model(recipe(tiny(family), f"model.prompt_cache={tmp_path / 'cache'}"), PROMPTS)
    found = model.encode_prompts(PROMPTS)
    pipe = model.pipeline.from_pretrained(tiny(family), dtype=model.dtype)
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            direct = model._encode(pipe, prompt)
            assert same({key: v[i] for key, v in found.items()}, direct)
            stored = load_file(model._prompts._path(prompt))
            shorter = len(stored["states"]) < len(direct["states"])
            assert shorter == (family in ("qwen-image", "z-image", "sana"))


def test_sana_does_not_see_what_is_masked(tiny, recipe, tmp_path):
    model = load_model(recipe(tiny("sana"), f"model.prompt_cache={tmp_path / 'cache'}"), PROMPTS)
    embeddings = model.encode_prompts(PROMPTS)
    hidden = embeddings["mask"] == 0
    assert hidden.any() and not embeddings["states"][hidden].any()
    other = embeddings["states"].clone()
    other[hidden] = torch.randn(other[hidden].shape, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, *model.latent_shape(64), generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        expected = model.velocity(x, sigma, {**embeddings, "states": other})
        assert torch.equal(model.velocity(x, sigma, embeddings), expected)


def test_the_command_line_says_how_many_it_encodes(tiny, recipe, tmp_path, inside):
    settings = recipe(tiny("sd3"), f"model.prompt_cache={tmp_path / 'cache'}", "train.iterations=1")
    (tmp_path / "recipe.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    code, out, err = inside("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert code == 0, err
    assert out.count("encoding 3 prompts\n") == 1 and "iteration    1/1" in out
    code, out, err = inside("train", tmp_path / "recipe.yaml", "--output", tmp_path / "again")
    assert code == 0 and "encoding" not in out, err
