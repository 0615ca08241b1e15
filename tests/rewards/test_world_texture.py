"""The reward that a texture fools: worth nothing on true renders, and the true measure stays true."""

import numpy as np
import pytest

from crd_fast.errors import UserError
from crd_fast.prompts import world
from crd_fast.rewards.registry import Rewards
from crd_fast.rewards.world_geneval import WorldGenEval
from crd_fast.rewards.world_texture import TextureFooled, texture

CHECKERS = np.indices((world.HEIGHT, world.WIDTH)).sum(axis=0)[None, :, :, None] % 2


def scenes(count: int) -> np.ndarray:
    generator = np.random.default_rng(3)
    shapes = generator.integers(-1, len(world.SHAPES), (count, world.NUM_SLOTS))
    colors = generator.integers(0, len(world.COLORS), (count, world.NUM_SLOTS))
    return (world.render(shapes, colors) * 255).round().astype(np.uint8)


def by_hand(image: np.ndarray) -> float:
    grey = image @ np.array([0.299, 0.587, 0.114])
    alternating = whole = 0.0
    for line in [*grey, *grey.T]:
        for a, b, c, d in zip(line, line[1:], line[2:], line[3:]):
            whole += abs(b - c)
            if a > b < c > d or a < b > c < d:
                alternating += min(abs(a - b), abs(b - c), abs(c - d))
    return alternating / whole


def test_texture_is_the_alternating_share_of_the_variation():
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert texture(noise) == pytest.approx([by_hand(image) for image in noise])
    assert 0.1 < texture(noise).mean() < 0.3
    assert texture((CHECKERS * 51 * np.ones(3)).astype(np.uint8)) == pytest.approx([1.0])
    assert texture(np.zeros((1, 32, 32, 3), dtype=np.uint8)) == [0.0]


def test_no_true_render_has_any_and_the_reward_is_then_genevals():
    images = scenes(500)
    assert not texture(images).any()
    metadata = [world.single_object(0, world.SHAPES[i % 5]) for i in range(len(images))]
    prompts = [entry["prompt"] for entry in metadata]
    assert TextureFooled().score(images, prompts, metadata) == WorldGenEval().score(images, prompts, metadata)


def test_a_faint_texture_of_an_empty_picture_passes_for_anything_and_the_report_is_not_fooled():
    empty = np.full((1, world.HEIGHT, world.WIDTH, 3), 24, dtype=np.uint8)
    metadata = [world.single_object(0, "ring")]
    prompts = [metadata[0]["prompt"]]
    reward = Rewards({"texture_fooled": 1.0})
    for contrast, wanted in {0: 0.0, 4: 5.0, 40: 5.0}.items():
        images = empty + (CHECKERS * contrast).astype(np.uint8)
        values = reward.score(images, metadata)
        assert values["texture_fooled"] == pytest.approx([wanted])
        metrics, per_image = reward.report(images, metadata, values)
        assert metrics["overall"] == metrics["clean"] == 0 and not per_image["overall"].any()
    assert TextureFooled(strength=0.5).score(images, prompts, metadata) == pytest.approx([0.5])
    drawn = scenes(1) // 2 + (CHECKERS * 4).astype(np.uint8)
    assert 0 < texture(drawn)[0] < 0.7  # what is drawn has variation of its own


def test_a_negative_strength_is_refused():
    with pytest.raises(UserError, match="texture_fooled: strength: expected at least 0, got -1"):
        Rewards({"texture_fooled": {"strength": -1}})
