"""Prompts of which the text encoders read nothing, or not everything."""

import json
import logging
import shutil

import pytest
import torch

from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.train.inference import sample_grid
from crd_fast.train.trainer import Trainer
from tests.models.conftest import ALL, load_pipeline

LENGTH = 160  # more than CLIP reads, which would else read on, and than Qwen-Image's template over characters
TOKENIZERS = [
    ("sd3", "tokenizer"),
    ("sd3", "tokenizer_2"),
    ("sd3", "tokenizer_3"),
    ("flux", "tokenizer"),
    ("flux", "tokenizer_2"),
    ("flux2-klein", "tokenizer"),
    ("qwen-image", "tokenizer"),
    ("z-image", "tokenizer"),
    ("sana", "tokenizer"),
]


@pytest.mark.parametrize("family, tokenizer", TOKENIZERS)
def test_a_pipeline_without_a_vocabulary_is_refused(tiny, recipe, tmp_path, family, tokenizer):
    copy = shutil.copytree(tiny(family), tmp_path / "copy")
    named = {name for name in json.loads((copy / "model_index.json").read_text()) if "tokenizer" in name}
    assert named == {name for of, name in TOKENIZERS if of == family}
    folder = copy / tokenizer

    def refused(*words):
        with pytest.raises(UserError) as error:
            load_model(recipe(copy))
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)

    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    refused(str(folder), "the tokenizer cannot be loaded")
    (folder / "tokenizer.json").unlink()
    refused(f"{folder / 'tokenizer.json'} is missing")
    # files are there, and yet no word is known
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1} if "CLIP" in whole or "startoftext" in whole else {}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    refused(str(folder), "encodes both alike: its vocabulary is empty")


@pytest.mark.parametrize("family", ALL)
def test_a_prompt_is_truncated_where_its_last_letter_makes_no_difference(tiny, recipe, family):
    model = load_model(recipe(tiny(family), f"model.text_length={LENGTH}"))
    reader = model.prompt_reader
    first = next(n for n in range(1, 2 * LENGTH) if reader.truncated(["a" * n]))
    assert reader.read("a" * (first + 9)) == "a" * (first - 1)
    assert reader.truncated(["a" * (first - 1), "a" * first]) == {"a" * first: reader.room + 1}
    with model._text_encoders() as pipe, torch.no_grad():
        for letters, same in ((first - 1, False), (first, True)):
            one, other = (model._encode(pipe, "a" * (letters - 1) + last) for last in "bc")
            assert all(torch.equal(one[key], other[key]) for key in one) == same, letters


@pytest.fixture
def run(tiny, recipe, tmp_path, caplog):
    """Makes a Trainer over these prompts; returns its warnings, and its folder."""

    def start(prompts, name="run", *overrides):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        prompts = str(tmp_path / "prompts.txt")
        settings = recipe(
            tiny("sd3"),
            "model.text_length=80",
            "train.iterations=1",
            "checkpoint.every=1",
            f"rollout.prompts={prompts}",
            f"evaluate.prompts={prompts}",
            "evaluate.every=1",
            *overrides,
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = Trainer(settings, tmp_path / name)
        return trainer, messages(caplog)

    return start


def messages(caplog):
    """All but that the evaluated prompts are those that are trained on."""
    said = [record.getMessage() for record in caplog.records]
    return [message for message in said if "stand in rollout.prompts too" not in message]


def test_truncation_is_said_once(run, tmp_path, caplog, capfd):
    assert run(["short", "a" * 39])[1] == []
    # a letter is two tokens of T5's, which reads as many as CLIP and more letters of neither
    trainer, said = run(["b" * 90, "c" * 100, "also short"], "other")
    expected = "warning: 2 prompts are truncated: the longest has 101 tokens, the text encoder reads 79"
    assert said == [f"{expected} (model.text_length)"]
    assert trainer.run()
    assert messages(caplog) == said  # not again for the evaluation
    # nor by the pipeline, prompt by prompt
    assert "truncated" not in capfd.readouterr().err.replace(expected, "")
    caplog.clear()
    sample_grid(str(tmp_path / "other"), ["d" * 300], tmp_path / "grid.png", samples=1)
    (record,) = caplog.records
    assert record.getMessage().startswith("warning: 1 prompt is truncated: the longest has 301 tokens")


def test_a_prompt_whose_wanted_text_is_cut_is_refused_for_ocr(run):
    pytest.importorskip("rapidocr", reason="needs rapidocr and onnxruntime")
    ocr = 'rewards={"ocr": {"mode": "word"}}'
    with pytest.raises(UserError, match=r"one of \d+ tokens is truncated to 79 .* in double quotes") as error:
        run(['a sign that says "CAT"', "a" * 90 + ' with a sign that says "DOG"'], "run", ocr)
    assert "\n" not in str(error.value)
    _, said = run(['a sign that says "CAT" ' + "a" * 90], "other", ocr)  # it stands in what is read
    assert len(said) == 1 and "1 prompt is truncated" in said[0]


def test_no_room_for_any_prompt_is_refused(tiny, recipe, tmp_path):
    """Of Z-Image the template comes first: with few tokens all prompts would be one."""
    settings = recipe(tiny("z-image"), "model.text_length=6", f"model.prompt_cache={tmp_path / 'cache'}")
    with pytest.raises(UserError, match=r"model\.text_length: expected room for a prompt, got none"):
        Trainer(settings, tmp_path / "run")


@pytest.mark.parametrize(("family", "most"), [("sd3", 512), ("flux", 512), ("qwen-image", 1024)])
def test_more_text_than_the_pipeline_takes_is_refused(tiny, recipe, family, most):
    """What is trained with it could be used with no pipeline."""
    pipe = load_pipeline(tiny(family))
    with pytest.raises(ValueError, match=f"cannot be greater than {most}"):
        pipe(prompt="a", height=64, width=64, max_sequence_length=most + 1)
    with pytest.raises(
        UserError, match=rf"model\.text_length: expected at most {most} for .*, got {most + 1}"
    ):
        load_model(recipe(tiny(family), f"model.text_length={most + 1}"))


def test_more_text_than_the_network_has_positions_for_is_refused(tiny, recipe):
    """Z-Image's captions and picture share an axis."""
    most = load_model(recipe(tiny("z-image"))).max_text_length
    with pytest.raises(
        UserError, match=rf"model\.text_length: expected at most {most} for Z-Image, got 2000"
    ):
        load_model(recipe(tiny("z-image"), "model.text_length=2000"))
    model = load_model(recipe(tiny("z-image"), f"model.text_length={most}"))
    states = torch.randn(1, most, model.encode_prompts([""])["states"].shape[-1])
    x = torch.randn(1, *model.latent_shape(64))
    with torch.no_grad():
        model.velocity(x, torch.tensor([0.5]), {"states": states, "length": torch.tensor([most])})
