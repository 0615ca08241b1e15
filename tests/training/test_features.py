"""evaluate.features: how far the pictures are, all together, from those of the guided base."""

import json

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from crd_fast.errors import UserError
from crd_fast.prompts import world
from crd_fast.prompts.geneval_metadata import draw_prompts
from crd_fast.run.metrics import read_metrics
from crd_fast.run.observer import Observer
from crd_fast.train.features import METRIC, random_features, relative_distance
from crd_fast.train.trainer import Trainer
from tests.training.test_drift import SCALE, recipe, records
from tests.training.test_ema import weights_in

ASKED = (f"evaluate.drift={SCALE}", "evaluate.features=random")


def rendered(seed, count=200):
    rng = np.random.default_rng(seed)
    entries = draw_prompts(world.prompts(False), rng, count)
    images = world.render_scenes([world.scene(entry, rng) for entry in entries])
    return (images * 255).round().astype(np.uint8)


def test_the_distance_is_frechets_over_the_variance():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 6)) @ rng.standard_normal((6, 6))
    other = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6)) + 0.3
    spread, spread_base = np.cov(other.T), np.cov(base.T)
    gap = ((other.mean(axis=0) - base.mean(axis=0)) ** 2).sum()
    frechet = gap + np.trace(spread + spread_base - 2 * sqrtm(spread @ spread_base).real)
    assert relative_distance(other, base) == pytest.approx(frechet / np.trace(spread_base))
    assert relative_distance(base, base) == pytest.approx(0, abs=1e-9)
    assert relative_distance(3 * (base - base.mean(axis=0)), base - base.mean(axis=0)) == pytest.approx(4)
    assert np.isnan(relative_distance(base, base[:1])) and np.isnan(relative_distance(base, base * 0))


def test_random_features_see_what_chance_does_not_do():
    base = random_features(rendered(0))
    assert base.shape == (200, 64) and (random_features(rendered(0)[:3]) == base[:3]).all()
    chance = relative_distance(random_features(rendered(1)), base)
    checkers = np.indices((32, 32)).sum(axis=0)[None, :, :, None] % 2
    others = {
        "a texture": rendered(1) // 2 + (checkers * 30).astype(np.uint8),
        "no colours": np.repeat(rendered(1).mean(axis=3, keepdims=True), 3, axis=3).astype(np.uint8),
        "few pictures again and again": np.tile(rendered(1, count=4), (50, 1, 1, 1)),
        "all on one side": np.where(np.arange(32)[:, None, None] < 16, rendered(1), 23).astype(np.uint8),
    }
    for name, images in others.items():
        assert relative_distance(random_features(images), base) > 3 * chance, name


def test_pictures_of_the_guided_base_have_none_and_what_is_kept_is_used_again(tmp_path):
    run = tmp_path / "run"
    settings = recipe(*ASKED, "evaluate.guidance_scale=4.5", "checkpoint.every=1", "train.iterations=1")
    assert Trainer(settings, run).run()
    first, last = records(run)
    assert first[METRIC] < 1e-9 and last[METRIC] > 1e-6
    kept = run / "evaluations" / "guided_base.npz"
    written = kept.read_bytes()
    longer = recipe(*ASKED, "evaluate.guidance_scale=4.5", "checkpoint.every=1")
    kept.write_bytes(written[:100])
    assert Trainer(longer, run, resume=True).run()
    assert kept.read_bytes() == written
    assert Trainer(longer, tmp_path / "whole").run()
    assert records(run) == records(tmp_path / "whole")


class Phases(Observer):
    """How often the guided base's pictures are drawn."""

    drawn = 0

    def phase(self, name, total=None):
        self.drawn += name == "guided base"
        return super().phase(name, total)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("scale, drawn", [(SCALE, 1), (3.0, 2)])
def test_pictures_that_the_guided_bases_evaluation_has_drawn_are_not_drawn_again(scale, drawn, tmp_path):
    settings = recipe(
        *ASKED, f"loss.guidance_scale={scale}", "train.iterations=1", "evaluate.guided_base=true"
    )
    phases = Phases()
    assert Trainer(settings, tmp_path / "both", observer=phases).run() and phases.drawn == drawn
    apart = recipe(*ASKED, f"loss.guidance_scale={scale}", "train.iterations=1")
    assert Trainer(apart, tmp_path / "apart").run()
    both, alone = records(tmp_path / "both"), records(tmp_path / "apart")
    assert [record[METRIC] for record in both] == [record[METRIC] for record in alone]
    for run in ("both", "apart"):
        first, last = read_metrics(tmp_path / run)
        assert first["seconds_guided_base"] > 0 and "seconds_guided_base" not in last


def test_a_negative_prompt_makes_other_pictures_of_the_guided_base(tmp_path):
    """What is kept of the guided base is not used for those of other negative prompts."""
    path = tmp_path / "asked.jsonl"
    entries = draw_prompts(world.prompts(True), np.random.default_rng(0), 4)

    def evaluated(**more):
        path.write_text("".join(json.dumps(entry | more) + "\n" for entry in entries))
        settings = recipe(*ASKED, f"evaluate.prompts={path}", "train.iterations=1")
        trainer = Trainer(settings, tmp_path / "run", resume=(tmp_path / "run").exists())
        return trainer.features._what(trainer.evaluation)

    assert evaluated() != evaluated(negative_prompt="a red circle")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("kind", ["model.method=lora", "model.method=full"])
def test_nothing_else_depends_on_it(kind, tmp_path):
    assert Trainer(recipe(kind), tmp_path / "without").run()
    assert Trainer(recipe(kind, *ASKED), tmp_path / "with").run()
    without, with_it = records(tmp_path / "without"), records(tmp_path / "with")
    assert all(record[METRIC] > 0 for record in with_it)
    assert [{k: v for k, v in r.items() if "drift" not in k} for r in with_it] == without
    before, after = weights_in(tmp_path / "without"), weights_in(tmp_path / "with")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_mistakes_are_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(
        UserError, match=r"evaluate\.features: expected null without a guidance scale above 1"
    ):
        recipe("evaluate.features=random")
    nowhere = recipe(f"evaluate.drift={SCALE}", "evaluate.features=/nowhere/clip")
    with pytest.raises(UserError, match=r"evaluate\.features: /nowhere/clip: no such folder"):
        Trainer(nowhere, tmp_path / "run")
    single = recipe(*ASKED, "evaluate.max_prompts=1", "evaluate.samples_per_prompt=1")
    with pytest.raises(UserError, match="features: expected an evaluation of at least 2 pictures, got 1"):
        Trainer(single, tmp_path / "run")
