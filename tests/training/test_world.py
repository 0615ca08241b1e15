"""The synthetic world, its prompts, and the detector that must see them as they are."""

import numpy as np
import pytest

from crd_fast.prompts import world
from crd_fast.prompts.geneval_metadata import draw_prompts
from crd_fast.rewards.geneval import judge
from crd_fast.rewards.registry import Rewards
from crd_fast.rewards.world_detector import detect
from tools import pretrain_builtin


def all_prompts(held_out):
    return [entry for entries in world.prompts(held_out).values() for entry in entries]


def render(entries, rng):
    return world.render_scenes([world.scene(entry, rng) for entry in entries])


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("tag", world.TAGS)
def test_detector_agrees_with_the_truth(tag, noise):
    rng = np.random.default_rng(1)
    pool = world.prompts(False)[tag] + world.prompts(True)[tag]
    entries = [pool[rng.integers(len(pool))] for _ in range(200)]
    images = render(entries, rng)
    images = np.clip(images + noise * rng.standard_normal(images.shape).astype(np.float32), 0, 1)
    judged = [judge(detect(image), entry) for image, entry in zip(images, entries)]
    assert np.mean([j.correct and j.strict_correct and j.clean and j.score == 1 for j in judged]) >= 0.99


def test_detector_sees_what_was_drawn_and_not_only_what_was_asked_for():
    rng = np.random.default_rng(2)
    for _ in range(100):
        shapes = rng.integers(-1, len(world.SHAPES), (1, world.NUM_SLOTS))
        colors = rng.integers(0, len(world.COLORS), (1, world.NUM_SLOTS))
        found = detect(world.render(shapes, colors)[0])
        seen = {(d["label"], d["color"], d["box"][1] // 16 * 2 + d["box"][0] // 16) for d in found}
        drawn = {
            (world.SHAPES[s], world.COLOR_NAMES[c], slot)
            for slot, (s, c) in enumerate(zip(shapes[0], colors[0]))
            if s >= 0
        }
        assert seen == drawn


def test_wrong_pictures_are_not_correct():
    rng = np.random.default_rng(3)
    entries = draw_prompts(world.prompts(False), rng, 300)
    images = render(entries, rng)
    shuffled = entries[1:] + entries[:1]  # neighbours have different categories
    correct = [judge(detect(image), entry).clean for image, entry in zip(images, shuffled)]
    assert np.mean(correct) < 0.15  # "a red ring" may well show what "a ring" asks for


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_nothing_on_blank_images(value):
    assert detect(np.full((32, 32, 3), value, dtype=np.float32)) == []


@pytest.mark.parametrize("mean, spread", [(0.5, 0.5), (0.5, 0.2), (0.3, 0.1), (0.09, 0.1)])
def test_nothing_is_correct_on_noise(mean, spread):
    rng = np.random.default_rng(4)
    entries = draw_prompts(world.prompts(True), rng, 100)
    images = np.clip(mean + spread * rng.standard_normal((100, 32, 32, 3)), 0, 1).astype(np.float32)
    assert not any(judge(detect(image), entry).correct for image, entry in zip(images, entries))


def test_training_and_held_out_prompts_are_disjoint():
    train = {entry["prompt"] for entry in all_prompts(False)}
    held_out = {entry["prompt"] for entry in all_prompts(True)}
    assert len(train) == len(all_prompts(False))  # no prompt is written in two ways
    assert train.isdisjoint(held_out)
    assert all(len(world.prompts(True)[tag]) >= 5 for tag in world.TAGS)


def test_held_out_combinations_are_never_trained():
    def pairs(entries):
        return {(c["color"], c["class"]) for e in entries for c in e["include"] if "color" in c}

    def triples(entries):
        return {
            (e["include"][1]["class"], e["include"][1]["position"][0], e["include"][0]["class"])
            for e in entries
            if e["tag"] == "position"
        }

    novel, trained = pairs(world.prompts(True)["colors"]), pairs(all_prompts(False))
    assert len(novel) == 5 and novel.isdisjoint(trained)
    assert triples(all_prompts(True)).isdisjoint(triples(all_prompts(False)))

    attributes = {held_out: world.prompts(held_out)["color_attr"] for held_out in (False, True)}
    assert pairs(attributes[True]) <= trained
    assert combinations(attributes[True]).isdisjoint(combinations(attributes[False]))


def combinations(entries):
    """The two coloured shapes that an entry names, in either order."""
    named = [[(c["color"], c["class"]) for c in e["include"] if "color" in c] for e in entries]
    return {frozenset(pairs) for pairs in named if len(pairs) == 2}


def test_pretraining_names_no_held_out_combination():
    rng = np.random.default_rng(0)
    entries = [pretrain_builtin.draw_entry(rng, pretrain_builtin.STAGES["arrange"]) for _ in range(2000)]
    named = combinations(entries)
    assert len(named) > 100
    assert named.isdisjoint(combinations(world.prompts(True)["color_attr"]))
    assert not any(world.is_novel_pair(*pair) for pairs in named for pair in pairs)


def test_draws_are_balanced_and_repeatable():
    first = draw_prompts(world.prompts(True), np.random.default_rng(0), 384)
    assert first == draw_prompts(world.prompts(True), np.random.default_rng(0), 384)
    assert {tag: sum(e["tag"] == tag for e in first) for tag in world.TAGS} == dict.fromkeys(world.TAGS, 64)


def test_metadata_is_in_genevals_format():
    entry = world.counting(0, "cross", 3)
    assert entry == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "a photo of three crosses",
    }
    assert world.position(0, "ring", "left of", "circle")["include"][1]["position"] == ["left of", 0]


def test_genevals_own_rule_rewards_a_full_picture_that_is_not_clean():
    rng = np.random.default_rng(5)
    entries = list(world.prompts(False)["two_object"])
    colors = rng.integers(0, len(world.COLORS), (len(entries), world.NUM_SLOTS))
    full = rng.integers(0, len(world.SHAPES), colors.shape)  # whatever was asked for
    half = np.where(np.arange(world.NUM_SLOTS) < 2, full, -1)
    by_rule = {}
    for name in ("geneval_correct", "geneval"):
        reward = Rewards({name: 1.0})
        for shapes in (half, full):
            images = (world.render(shapes, colors) * 255).round().astype(np.uint8)
            values = reward.score(images, entries)
            by_rule.setdefault(name, []).append(values[name].mean())
            metrics, per_image = reward.report(images, entries, values)
        assert metrics["clean"] == 0 < metrics["overall"]
        if name == "geneval_correct":
            assert (values[name] == per_image["overall"]).all()
    gained = {name: (after - before) / before for name, (before, after) in by_rule.items()}
    assert gained["geneval_correct"] > 1 > 0.5 > gained["geneval"]
