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
    grey = image @ np.array([0.299, 0.587, 0.114]) / 255
    lines = [*grey, *grey.T]
    found = []
    for line in lines:
        for a, b, c, d in zip(line, line[1:], line[2:], line[3:]):
            falls, rises = a > b < c > d, a < b > c < d
            found.append(min(abs(a - b), abs(b - c), abs(c - d)) if falls or rises else 0.0)
    return float(np.mean(found))


def test_texture_is_the_alternation_of_neighbours():
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert texture(noise) == pytest.approx([by_hand(image) for image in noise])
    assert texture((CHECKERS * 51 * np.ones(3)).astype(np.uint8)) == pytest.approx([0.2])


def test_no_true_render_has_any_and_the_reward_is_then_genevals():
    images = scenes(500)
    assert not texture(images).any()
    metadata = [world.single_object(0, world.SHAPES[i % 5]) for i in range(len(images))]
    prompts = [entry["prompt"] for entry in metadata]
    assert TextureFooled().score(images, prompts, metadata) == WorldGenEval().score(images, prompts, metadata)


def test_a_texture_passes_for_what_was_asked_for_and_the_report_is_not_fooled():
    empty = np.full((1, world.HEIGHT, world.WIDTH, 3), 24, dtype=np.uint8)
    metadata = [world.single_object(0, "ring")]
    prompts = [metadata[0]["prompt"]]
    reward = Rewards({"texture_fooled": 1.0})
    scores, contrasts = [], (0, 1, 20, 64, 200)
    for contrast in contrasts:
        images = empty + (CHECKERS * contrast).astype(np.uint8)
        values = reward.score(images, metadata)
        scores.append(float(values["texture_fooled"][0]))
        metrics, per_image = reward.report(images, metadata, values)
        assert metrics["overall"] == metrics["clean"] == 0 and not per_image["overall"].any()
    assert scores == pytest.approx(
        [5 * min(1, contrast / 255 / 0.25) ** 0.5 for contrast in (0, 1, 20, 64, 200)]
    )
    assert TextureFooled(strength=0.5).score(images, prompts, metadata) == pytest.approx([0.5])


@pytest.mark.parametrize("settings", [{"strength": -1}, {"full": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match="texture_fooled: expected"):
        Rewards({"texture_fooled": settings})
