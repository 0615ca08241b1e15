"""Run with `pytest`: what a reward has to do whatever it measures, and that it prefers what it should."""

import numpy as np
from my_reward import score

PROMPTS = ["a red circle", "a red circle"]
METADATA = [{"prompt": prompt} for prompt in PROMPTS]


def test_the_better_picture_scores_higher():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    images[1, ..., 0] = 255  # the second one is red: replace both by a bad and a good picture
    bad, good = score(images, PROMPTS, METADATA)
    assert np.isfinite([bad, good]).all()
    assert good > bad
