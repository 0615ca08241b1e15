"""evaluate.drift: distance of the evaluated weights to the pretrained model; nothing depends on it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from crd_fast.config import load_recipe
from crd_fast.models import load_model
from crd_fast.run.metrics import MEASURED
from crd_fast.run.scores import read_scores, scores_path
from crd_fast.seeds import seeded_noise
from crd_fast.train.drift import Drift, with_drift
from crd_fast.train.trainer import Trainer
from crd_fast.weights import checkpoint
from tests.training.short_runs import SETTINGS
from tests.training.test_ema import KINDS

SCALE = 4.5
NONE = ("loss.kl_beta=0", "loss.kl_min=0")


def recipe(*more):
    steps = ("train.iterations=2", "evaluate.every=1", "evaluate.steps=6", "evaluate.max_prompts=5")
    return load_recipe("builtin", [*SETTINGS, *steps, "evaluate.guided_base=false", *more])


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_mean_squared_distance_to_the_pretrained_velocities(kind, tmp_path):
    settings = recipe(*KINDS[kind], f"evaluate.drift={SCALE}", "rollout.micro_batch=2", *NONE)
    trainer = Trainer(settings, tmp_path / "run")
    evaluation = trainer.evaluation
    with torch.no_grad():
        for parameter in trainer.weights.trained():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.weights.stepped()
    found = with_drift(evaluation.run(), evaluation, trainer.weights, trainer.observer)

    pretrained = load_model(settings, [])
    drift = Drift(evaluation, found.latents, trainer.observer)
    assert len(set(drift.sigma.tolist())) == 4 and drift.sigma.min() > 0
    for i in range(len(evaluation)):
        sigma = drift.sigma[i : i + 1]
        noise = seeded_noise(drift.seeds[i : i + 1], found.latents.shape[1:])
        x = (1 - sigma) * found.latents[i : i + 1] + sigma * noise
        embeddings = {key: value[i : i + 1] for key, value in evaluation.embeddings.items()}
        with torch.no_grad():
            policy = trainer.model.velocity(x, sigma, embeddings)
            conditional = pretrained.velocity(x, sigma, embeddings)
            away = {k: v.expand_as(embeddings[k]) for k, v in evaluation.empty.items()}
            other = pretrained.velocity(x, sigma, away)
        guided = other + SCALE * (conditional - other)
        for name, reference in (("drift/unguided", conditional), ("drift/guided", guided)):
            wanted = (policy - reference).square().mean().item()
            assert wanted > 1e-4 and found.scores.values[name][i] == pytest.approx(wanted, rel=1e-4)
    for name in ("drift/guided", "drift/unguided"):
        assert found.metrics[f"eval/{name}"] == pytest.approx(found.scores.values[name].mean())


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("kind", ["lora", "host"])
def test_nothing_else_depends_on_it(kind, tmp_path):
    """Of a run without an anchor, which has no reference of its own."""
    assert Trainer(recipe(*KINDS[kind], *NONE), tmp_path / "without").run()
    assert Trainer(recipe(*KINDS[kind], *NONE, f"evaluate.drift={SCALE}"), tmp_path / "with").run()
    without, with_it = records(tmp_path / "without"), records(tmp_path / "with")
    assert all(record["eval/drift/guided"] > 0 for record in with_it)
    assert [{k: v for k, v in r.items() if "drift" not in k} for r in with_it] == without
    weights = [
        load_file(checkpoint.find(tmp_path / name, "newest") / checkpoint.TENSORS)
        for name in ("without", "with")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    scores = read_scores(scores_path(tmp_path / "with", 2))
    assert scores.values["drift/guided"].mean() == pytest.approx(with_it[-1]["eval/drift/guided"])


def test_before_training_there_is_none(tmp_path):
    """Without guidance alone, so that the batches are the same and so is the rounding."""
    trainer = Trainer(recipe("evaluate.drift=1"), tmp_path / "run")
    assert trainer.run()
    first, *_, last = records(tmp_path / "run")
    assert first["eval/drift/unguided"] == 0 < last["eval/drift/unguided"]
    assert "eval/drift/guided" not in last


def test_what_is_measured_are_the_evaluated_weights(tmp_path):
    sampler = ("evaluate.weights=sampler", "snapshots.sampler=0/1/0/1")  # the pretrained ones
    assert Trainer(recipe("evaluate.drift=1", *sampler), tmp_path / "run").run()
    assert records(tmp_path / "run")[-1]["eval/drift/unguided"] == 0


def test_where_memory_runs_out_it_goes_on_with_less(tmp_path, monkeypatch):
    trainer = Trainer(recipe(f"evaluate.drift={SCALE}"), tmp_path / "run")
    with torch.no_grad():
        for parameter in trainer.weights.trained():
            parameter.add_(0.02 * torch.randn_like(parameter))
    evaluated, velocity = trainer.evaluation.run(), trainer.model.velocity
    expected = with_drift(evaluated, trainer.evaluation, trainer.weights, trainer.observer)

    def small(x, *rest):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return velocity(x, *rest)

    monkeypatch.setattr(trainer.model, "velocity", small)
    found = with_drift(evaluated, trainer.evaluation, trainer.weights, trainer.observer)
    for name in ("drift/guided", "drift/unguided"):
        assert found.scores.values[name] == pytest.approx(expected.scores.values[name], rel=1e-4)
