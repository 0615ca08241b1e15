"""The built-in model that draws signs: spelling, pictures, weights, and training through the command line."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from crd_fast.cli import app
from crd_fast.errors import UserError
from crd_fast.models.builtin import SIGNS, BuiltinModel
from crd_fast.prompts import signs
from crd_fast.prompts.source import PromptSource
from tools import pretrain_builtin_ocr
from tools.pretraining import sample


@pytest.fixture(scope="module")
def model():
    return BuiltinModel.new(SIGNS, seed=0)


def test_spelling():
    assert signs.spell('a sign that says "CAT"') == "a sign that says c-2 a+0 t+2"
    assert signs.spell('a red sign that says "bold" in serif').endswith("b-3 o-1 l+1 d+3 in serif")
    assert signs.spell("") == ""


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a sign", "expected one word in double quotes"),
        ('a sign that says "CAT" "DOG"', "expected one word in double quotes"),
        ('a sign that says "BAKERY"', "3 to 5 letters"),
        ('a sign that says "A1B"', "3 to 5 letters"),
        ('a purple sign that says "CAT"', "does not know the word 'purple'"),
        ('a sign that says "TABLE" in bold in bold in bold', "at most 12 words"),
    ],
)
def test_prompts_it_cannot_draw(model, prompt, message):
    with pytest.raises(UserError, match=message) as raised:
        model.encode_prompts([prompt])
    assert "\n" not in str(raised.value)
    known = 'a sign that says "CAT"'
    refused, reason = model.unreadable([known, "", prompt, 'a violet sign that says "CAT"'])
    assert refused == prompt and f"prompt: {reason}" == str(raised.value)
    assert model.unreadable([known, ""]) is None


def test_every_prompt_is_known(model):
    for source in ("builtin-ocr", "builtin-ocr-heldout"):
        entries = PromptSource(source).entries()
        model.encode_prompts([entry["prompt"] for entry in entries[:2000]])


def test_held_out_words_are_never_trained():
    train, held_out = (
        {entry["text"] for entry in PromptSource(source).entries()}
        for source in ("builtin-ocr", "builtin-ocr-heldout")
    )
    assert len(held_out) > 60 and train.isdisjoint(held_out)
    rng = np.random.default_rng(0)
    drawn = [pretrain_builtin_ocr.draw_word(rng) for _ in range(5000)]
    assert held_out.isdisjoint(drawn)
    assert held_out.isdisjoint(pretrain_builtin_ocr.misspelled(word, rng) for word in drawn)


def test_the_reader_knows_where_letters_are(tmp_path):
    """Most of the ink that goes when a letter is left out is in the patches that are said to be its own."""
    reader = pretrain_builtin_ocr.SignPretraining(tmp_path, seed=0).reader
    own = reader.labels("IIXII").view(5, 16).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    for seed, style in enumerate([*signs.STYLES] * 8):
        full, without = (
            signs.render(word, "black", style, np.random.default_rng(seed)).sum(-1)
            for word in ("IIIII", "II II")
        )
        ink = np.abs(full - without.astype(float))
        share = ink[own == pretrain_builtin_ocr.ALPHABET.index("X")].sum() / ink.sum()
        assert share > 0.7, (style, share)


def test_ground_truth_is_read():
    pytest.importorskip("rapidocr")
    from crd_fast.rewards.ocr import OCR

    rng = np.random.default_rng(0)
    entries = [e for held_out in (False, True) for e in signs.entries(held_out)[:60]]
    images = np.stack([signs.render(entry["text"], None, None, rng) for entry in entries])
    prompts = [entry["prompt"] for entry in entries]
    scores = np.array(OCR(mode="word").score(images, prompts, entries))
    assert (scores == 1).mean() >= 0.97
    wrong = OCR(mode="word").score(images, prompts[1:] + prompts[:1], entries)
    assert np.mean(wrong) < 0.3


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save(tmp_path, dtype=torch.float32)
    again = BuiltinModel.load(SIGNS, tmp_path)
    for part in ("transformer", "text_encoder"):
        found, expected = (getattr(m, part).state_dict() for m in (again, model))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    prompts = ['a sign that says "CAT"']
    # one has gradients and one has not, and torch chooses its algorithms by that: to rounding
    torch.testing.assert_close(
        again.encode_prompts(prompts)["states"], model.encode_prompts(prompts)["states"].detach()
    )
    pictures = [sample(m, prompts, 1.0, 1).astype(int) for m in (again, model)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert sample(again, prompts, 1.0, 1).shape == (1, signs.HEIGHT, signs.WIDTH, 3)


def test_weights_are_small_and_draw_words():
    pytest.importorskip("rapidocr")
    assert sum(path.stat().st_size for path in SIGNS.folder.glob("*.safetensors")) <= 12e6
    shipped = BuiltinModel.load(SIGNS)
    assert pretrain_builtin_ocr.ocr_score(shipped, 4.5, 24) > 0.4


@pytest.mark.slow
def test_training_through_the_command_line(tmp_path):
    pytest.importorskip("rapidocr")
    run = tmp_path / "run"
    small = ("rollout.prompts_per_iteration=2", "rollout.samples_per_prompt=4", "evaluate.max_prompts=4")
    overrides = [word for setting in small for word in ("--set", setting)]
    result = CliRunner().invoke(
        app, ["train", "builtin-ocr", "--output", str(run), "--max-iterations", "2", *overrides]
    )
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert 0 <= records[-1]["eval/reward/ocr"] <= 1
    assert records[-1]["grad_norm"] > 0
