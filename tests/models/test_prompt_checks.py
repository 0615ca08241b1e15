"""Prompts of which the text encoders read nothing, or not everything."""

import logging
import shutil

import pytest
import torch

from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.models.prompt_checks import PromptChecks
from tests.models.conftest import ALL

LENGTH = 96  # more than CLIP reads, which would else read on


@pytest.mark.parametrize(
    "family, tokenizer", [("sd3", "tokenizer"), ("sd3", "tokenizer_3"), ("z-image", "tokenizer")]
)
def test_a_pipeline_without_a_vocabulary_is_refused(tiny, recipe, tmp_path, family, tokenizer):
    copy = shutil.copytree(tiny(family), tmp_path / "copy")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copy / tokenizer / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"copy/{tokenizer}: expected a vocabulary") as error:
        load_model(recipe(copy))
    assert "\n" not in str(error.value)
    # a file is there, and yet no word is known
    (copy / tokenizer / "vocab.json").write_text("{}")
    (copy / tokenizer / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=f"copy/{tokenizer}: different prompts are encoded alike") as error:
        load_model(recipe(copy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ALL)
def test_a_prompt_is_truncated_where_its_last_letter_makes_no_difference(tiny, recipe, family, tmp_path):
    model = load_model(recipe(tiny(family), f"model.text_length={LENGTH}"))
    lengths = {name: tokens for name, (_, tokens) in model.text_encoders().items()}
    with model._text_encoders() as pipe, torch.no_grad():

        def counted(letters):
            checks = PromptChecks(pipe, lengths, model.folder)
            checks.see("a" * letters)
            return checks.truncated

        first = next(n for n in range(LENGTH // 2, 2 * LENGTH) if counted(n))
        for letters, same in ((first - 1, False), (first, True)):
            one, other = (model._encode(pipe, "a" * (letters - 1) + last) for last in "bc")
            assert all(torch.equal(one[key], other[key]) for key in one) == same, letters


def test_truncation_is_said_once(tiny, recipe, tmp_path, caplog):
    model = load_model(
        recipe(tiny("sd3"), "model.text_length=80", f"model.prompt_cache={tmp_path / 'cache'}")
    )
    with caplog.at_level(logging.WARNING, logger="crd_fast"):
        model.encode(["short", "a" * 78])
        assert not caplog.records
        model.encode(["b" * 90, "c" * 100, "also short"])
    (record,) = caplog.records
    assert record.getMessage() == (
        "warning: 2 prompts were truncated: the longest has 102 tokens, the text encoder reads 80"
    )
