"""Negative prompts: as the pipelines have them, in the anchor, cached, refused where nothing is guided."""

import json

import pytest
import torch

from crd_fast.errors import UserError
from crd_fast.models import load_model
from crd_fast.models.negative import encode_negatives, marked
from crd_fast.prompts.lists import notes
from crd_fast.run.scores import read_scores, scores_path
from crd_fast.train.inference import sample_grid
from crd_fast.train.micro_batch import MicroBatch
from crd_fast.train.rollout import Sampling, generate
from crd_fast.train.trainer import Trainer
from tests.models.conftest import (
    GUIDANCE,
    PROMPTS,
    RESOLUTION,
    SAMPLE_PROMPTS,
    SEEDS,
    STEPS,
    by_pipeline,
    by_rollout,
    load_pipeline,
    packed,
)
from tests.training.conftest import gradients, setting  # noqa: F401  a fixture

NEGATIVE = ["ugly, a dog", ""]
ENTRIES = [{"prompt": PROMPTS[0], "negative_prompt": NEGATIVE[0]}, {"prompt": PROMPTS[1]}]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "negative.jsonl"
    path.write_text("\n".join(map(json.dumps, ENTRIES)))
    return path


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd3", "sana", "qwen-image", "z-image"])
def test_guided_pictures_are_the_pipelines(tiny, recipe, family):
    """Each sample away from its own prompt's negative one."""
    model, pipe = load_model(recipe(tiny(family))), load_pipeline(tiny(family))
    given = [NEGATIVE[i] for i in SAMPLE_PROMPTS]
    _, expected = by_pipeline(pipe, family, GUIDANCE, negative_prompt=given)
    sampling = Sampling(RESOLUTION, STEPS, GUIDANCE, "fp32", encode_negatives(model, ENTRIES), MicroBatch(2))
    found = generate(
        model, model.encode_prompts(PROMPTS), torch.tensor(SAMPLE_PROMPTS), torch.tensor(SEEDS), sampling
    )
    torch.testing.assert_close(packed(pipe, found), expected, rtol=1e-4, atol=1e-4)
    _, plain = by_rollout(model, GUIDANCE)
    assert (found[:2] - plain[:2]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(found[2:], plain[2:], rtol=1e-4, atol=1e-4)


def test_the_anchor_is_guided_away_from_each_prompts_own(setting):  # noqa: F811
    model, weights, pairs, latents, embeddings, _ = setting
    several = {"states": torch.tensor([[0.5] * 5, [-2.0] * 5])}
    loss = {"kl_beta": 3.0, "kl_min": 1.0}
    of_each = []
    for prompt in range(2):
        one = (model, weights, pairs, latents, embeddings, {"states": several["states"][[prompt]]})
        chosen = pairs[pairs.prompt == prompt]
        of_each.append(gradients(one, 3, pairs=chosen, **loss))
    both = (model, weights, pairs, latents, embeddings, several)
    for micro_batch in (1, 5, 24):
        metrics, gradient = gradients(both, micro_batch, **loss)
        torch.testing.assert_close(gradient, (of_each[0][1] + of_each[1][1]) / 2)
        assert metrics["kl"] == pytest.approx((of_each[0][0]["kl"] + of_each[1][0]["kl"]) / 2)
    _, plain = gradients(setting, 5, **loss)
    assert (plain - gradient).abs().max() > 1e-3


def test_a_run_uses_and_caches_them(tiny, recipe, file, tmp_path, monkeypatch):
    """With streaming, too, where all branches go through the network at once."""
    encoded, original = [], type(load_model(recipe(tiny("sd3"))))._encode
    monkeypatch.setattr(
        "crd_fast.models.sd3.SD3Model._encode",
        lambda self, pipe, prompt: encoded.append(prompt) or original(self, pipe, prompt),
    )
    settings = [f"model.prompt_cache={tmp_path / 'cache'}", "train.iterations=1", "evaluate.every=1"]
    settings += ["evaluate.steps=1", "loss.kl_beta=5.0", "loss.kl_min=5.0"]
    runs = {}
    for name, more in {
        "with": [f"rollout.prompts={file}"],
        "streamed": [f"rollout.prompts={file}", "model.streaming=true"],
        "without": [],
    }.items():
        run = Trainer(recipe(tiny("sd3"), *settings, *more, f"evaluate.prompts={file}"), tmp_path / name)
        assert run.run()
        runs[name] = torch.cat([p.detach().flatten() for p in run.weights.trained()])
    assert sorted(encoded) == sorted([*PROMPTS, NEGATIVE[0], ""])  # each once, for all runs
    torch.testing.assert_close(runs["with"], runs["streamed"], rtol=1e-3, atol=1e-5)
    assert (runs["with"] - runs["without"]).abs().max() > 1e-4
    assert len(read_scores(scores_path(tmp_path / "with", 1))) == 2


def test_sana_caches_both_kinds_of_one_text(tiny, recipe, tmp_path):
    """A prompt is encoded behind an instruction, a negative one without."""
    model = load_model(recipe(tiny("sana"), f"model.prompt_cache={tmp_path / 'cache'}"))
    for _ in range(2):
        found = model.encode_prompts(["a dog", marked("a dog")])
        assert (found["states"][0] - found["states"][1]).abs().max() > 1e-3
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3


def test_distilled_guidance_takes_none(tiny, recipe, file, tmp_path):
    with pytest.raises(UserError, match="negative_prompt: guidance is distilled into this FLUX"):
        Trainer(recipe(tiny("flux"), f"rollout.prompts={file}"), tmp_path / "run")
    with pytest.raises(UserError, match="negative_prompt: guidance is distilled into this FLUX"):
        sample_grid(str(tiny("flux")), ENTRIES, tmp_path / "grid.png", samples=1, size=RESOLUTION)


@pytest.mark.parametrize("name", ["Negative Prompt", "negative-prompt", "negative", "NEGATIVE_PROMPT"])
def test_a_column_that_is_called_otherwise_is_named(recipe, tmp_path, name):
    """It would be metadata, and every prompt would be guided away from the empty one."""
    file = tmp_path / "table.csv"
    found = []
    for column in (name, "negative_prompt", "rating of negative prompts"):
        file.write_text(f"prompt,{column}\na,b\n")
        found += notes(recipe(tmp_path, f"rollout.prompts={file}"))
    assert found == [
        f"warning: {file}: {name!r} is metadata like any other; expected negative_prompt for guidance"
    ]


def test_without_guidance_they_do_nothing_and_that_is_said(tiny, recipe, file):
    unguided = recipe(tiny("sd3"), f"rollout.prompts={file}", "loss.guidance_scale=1")
    assert [note for note in notes(unguided) if "negative prompts do nothing without guidance" in note]
    guided = recipe(tiny("sd3"), f"rollout.prompts={file}")
    assert not [note for note in notes(guided) if "negative" in note]
    for wrong in (3, ["a"]):
        file.write_text(json.dumps({"prompt": "a", "negative_prompt": wrong}))
        with pytest.raises(UserError, match="line 1: negative_prompt: expected text"):
            list(notes(guided))
