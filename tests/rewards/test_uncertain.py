"""Anchoring the samples alone whose reward other rewards do not confirm."""

import math

import numpy as np
import pytest

from crd_fast.config import load_recipe
from crd_fast.errors import UserError
from crd_fast.rewards.advantage import ranks, uncertain
from crd_fast.train import trainer as module
from crd_fast.train.trainer import Trainer

NAN = math.nan
WEIGHTS = {"trained": 2.0, "beside": 0.0, "other": 0.0}


def test_ranks_are_places_among_what_is_known():
    np.testing.assert_allclose(ranks(np.array([5.0, 1.0, NAN, 5.0, 9.0])), [0.5, 0.125, NAN, 0.5, 0.875])
    assert np.isnan(ranks(np.array([NAN, NAN]))).all()


def test_what_the_reward_ranks_above_the_others_is_uncertain():
    trained = np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])
    beside = np.array([[7.0, 6.0, 5.0, 4.0], [3.0, 2.0, 1.0, 0.0]])  # ranks the other way round
    found = {"trained": trained, "beside": beside}
    for share, expected in ((0.25, [6, 7]), (0.5, [4, 5, 6, 7]), (1.0, [4, 5, 6, 7]), (0.1, [7])):
        assert np.flatnonzero(uncertain(found, WEIGHTS, share)).tolist() == expected
    assert not uncertain({"trained": trained, "beside": 10 * trained}, WEIGHTS, 1.0).any()  # confirmed
    # the mean of two: one that agrees halves the gaps of the other
    both = found | {"other": trained}
    assert np.flatnonzero(uncertain(both, WEIGHTS, 0.25)).tolist() == [6, 7]
    # the one that counts is the sum by weight
    assert not uncertain(found, {"trained": -1.0, "beside": 0.0}, 1.0).any()


def test_what_was_not_scored_is_not_uncertain():
    trained = np.array([[3.0, 2.0, NAN, 1.0]])
    beside = np.array([[NAN, 0.0, 0.0, 5.0]])
    assert uncertain({"trained": trained, "beside": beside}, WEIGHTS, 1.0).tolist() == [
        [False, True, False, False]
    ]


SETTINGS = [
    "rollout.prompts_per_iteration=2",
    "rollout.samples_per_prompt=4",
    "rollout.steps=2",
    "train.timesteps=2",
    "train.iterations=1",
    "evaluate.every=0",
    "loss.anchor_fraction=1",
]


def test_only_uncertain_samples_are_anchored(tmp_path, monkeypatch):
    """The reward counts up and the other down: the last samples of the iteration are the uncertain ones."""
    seen, draw_pairs = [], module.draw_pairs
    monkeypatch.setattr(module, "draw_pairs", lambda *a, **k: seen.append(draw_pairs(*a, **k)) or seen[-1])
    count = iter(range(100))

    def rising(images, prompts, metadata):
        return [float(next(count)) for _ in images]

    falling_count = iter(range(100, 0, -1))

    def falling(images, prompts, metadata):
        return [float(next(falling_count)) for _ in images]

    for share, anchored in ((1.0, list(range(8))), (0.25, [6, 7])):
        recipe = load_recipe("builtin", [*SETTINGS, f"loss.anchor_uncertain={share}"])
        trainer = Trainer(recipe, tmp_path / str(share), rewards={rising: 1.0, falling: 0.0})
        seen.clear()
        assert trainer.run()
        (pairs,) = seen
        assert sorted(set(pairs.sample[pairs.anchor > 0].tolist())) == anchored
        assert set(pairs.anchor[pairs.anchor > 0].tolist()) == {1.0}  # no weight but the strength's own


def test_it_needs_another_reward_and_an_anchor(tmp_path):
    with pytest.raises(
        UserError, match=r"anchor_uncertain: expected 1\.0 without a reward of weight 0, got 0.5"
    ):
        Trainer(load_recipe("builtin", [*SETTINGS, "loss.anchor_uncertain=0.5"]), tmp_path / "run")
    with pytest.raises(UserError, match=r"anchor_uncertain: expected 1\.0 without an anchor"):
        load_recipe("builtin", ["loss.anchor_uncertain=0.5", "loss.kl_beta=0", "loss.kl_min=0"])
