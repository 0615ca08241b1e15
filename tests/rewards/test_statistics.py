"""Rewards of the pixels alone, against direct computations and distributions that scipy samples."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from crd_fast.errors import UserError
from crd_fast.rewards.image_statistics import (
    Colorfulness,
    Diversity,
    JpegCompressibility,
    JpegIncompressibility,
    Naturalness,
    contrast_normalized,
    fit_generalized_gaussian,
)


def score(reward, images, prompts=None):
    images = np.stack(images)
    prompts = prompts or ["a"] * len(images)
    return reward.score(images, prompts, [{"prompt": prompt} for prompt in prompts])


def plain(*color, side=64):
    return np.full((side, side, 3), color, dtype=np.uint8)


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_jpeg_size_in_kilobytes_with_the_sign_of_ddpo(noise):
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=95)
    size = len(buffer.getvalue()) / 1000
    small, large = score(JpegCompressibility(), [plain(90, 20, 20), noise])
    assert large == pytest.approx(-size) and large < small < 0
    assert score(JpegIncompressibility(), [noise]) == pytest.approx([size])


def test_colorfulness_by_hand():
    grey, red, half = plain(128, 128, 128), plain(255, 0, 0), plain(0, 0, 0)
    half[:, :32] = (255, 0, 0)
    found = score(Colorfulness(), [grey, red, half])
    assert found[0] == 0
    # one colour has no spread: 0.3 sqrt(255^2 + 127.5^2)
    assert found[1] == pytest.approx(0.3 * np.hypot(255, 127.5))
    # half red, half black: mean and standard deviation are both half of the range
    assert found[2] == pytest.approx(1.3 * np.hypot(127.5, 63.75))


def test_diversity_is_the_mean_distance_to_the_others_of_the_prompt():
    black, grey, white = plain(0, 0, 0), plain(51, 51, 51), plain(255, 255, 255)
    found = score(Diversity(), [black, grey, white, white, white], ["a", "a", "a", "b", "c"])
    assert found == pytest.approx([(0.2 + 1) / 2, (0.2 + 0.8) / 2, (1 + 0.8) / 2, None, None])
    assert score(Diversity(), [white, white, white]) == [0, 0, 0]


@pytest.mark.parametrize("shape", [0.6, 1.0, 2.0, 4.0])
def test_generalised_gaussian_fit_finds_the_shape_that_scipy_samples(shape):
    values = stats.gennorm.rvs(shape, scale=3.0, size=200_000, random_state=0)
    found, deviation = fit_generalized_gaussian(values)
    assert found == pytest.approx(shape, rel=0.03)
    assert deviation == pytest.approx(stats.gennorm.std(shape, scale=3.0), rel=0.02)


def test_contrast_normalisation_is_the_windowed_mean_and_deviation():
    luminance = np.random.default_rng(1).uniform(0, 255, (20, 20))
    offsets = np.arange(-3, 4)
    line = np.exp(-(offsets**2) / (2 * (7 / 6) ** 2))
    window = np.outer(line, line) / line.sum() ** 2
    patch = luminance[7:14, 7:14]
    mean = (window * patch).sum()
    deviation = np.sqrt((window * (patch - mean) ** 2).sum())
    assert contrast_normalized(luminance)[10, 10] == pytest.approx(
        (luminance[10, 10] - mean) / (deviation + 1)
    )


def test_naturalness_of_a_photograph_falls_with_every_distortion():
    """The photograph is one of matplotlib's samples."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.exists():
        pytest.skip("needs the sample data that comes with matplotlib")
    photo = np.asarray(Image.open(path).convert("RGB"))
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=5)
    distorted = {
        "blur": ndimage.gaussian_filter(photo.astype(float), (3, 3, 0)),
        "noise": photo + rng.normal(0, 30, photo.shape),
        "saturation": (photo.astype(float) - 128) * 4 + 128,
        "blocks": np.asarray(Image.open(buffer)),
        "flatness": np.full(photo.shape, 9),
    }
    images = [photo, *(image.clip(0, 255).astype(np.uint8) for image in distorted.values())]
    best, *others = score(Naturalness(), images)
    assert best > 0.9
    for name, value in zip(distorted, others):
        assert 0 <= value < best - 0.05, name
    assert others[-1] == 0
    with pytest.raises(UserError, match="at least 16 x 16"):
        score(Naturalness(), [plain(1, 2, 3, side=8)])
