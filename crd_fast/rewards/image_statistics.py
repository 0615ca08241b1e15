"""Rewards that need no model: numbers of the pixels, useful as drift alarms and for trying things out."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image
from scipy import ndimage, special

from crd_fast.errors import UserError

JPEG_QUALITY = 95
DIVERSITY_SIDE = 16  # pixels a side that pictures are compared at
NATURAL_SHAPE = 2.5


class JpegCompressibility:
    """-1 x the size of the picture as a JPEG of quality 95, in kilobytes (1000 bytes), as in DDPO
    (arXiv 2305.13301): nearer to 0 is more compressible."""

    sign = -1.0

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        return [self.sign * jpeg_bytes(image) / 1000 for image in images]


class JpegIncompressibility(JpegCompressibility):
    """The size of the picture as a JPEG of quality 95, in kilobytes (1000 bytes)."""

    sign = 1.0


def jpeg_bytes(image: np.ndarray) -> int:
    """image: uint8 (height, width, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.tell()


class Colorfulness:
    """Hasler and Süsstrunk's colourfulness (2003): sqrt(s_rg^2 + s_yb^2) + 0.3 sqrt(m_rg^2 + m_yb^2).

    m and s are mean and standard deviation of rg = R - G and yb = (R + G) / 2 - B, in 0 to 255. Grey is 0,
    their observers called 33 moderately and 82 highly colourful.
    """

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        red, green, blue = np.moveaxis(images.astype(np.float64).reshape(len(images), -1, 3), -1, 0)
        opponents = red - green, (red + green) / 2 - blue
        spread = np.hypot(*(opponent.std(axis=1) for opponent in opponents))
        offset = np.hypot(*(opponent.mean(axis=1) for opponent in opponents))
        return (spread + 0.3 * offset).tolist()


class Diversity:
    """How far a picture is from the others of its prompt: mean root-mean-square distance, 0 to 1.

    Pictures are compared as 16 x 16 RGB thumbnails in [0, 1], box-filtered. A picture that is alone with its
    prompt is not scored. Falls when the samples of a prompt become the same picture.
    """

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float | None]:
        side = (DIVERSITY_SIDE, DIVERSITY_SIDE)
        thumbnails = np.stack(
            [np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BOX)) for image in images]
        )
        pixels = thumbnails.reshape(len(images), -1) / 255
        scores: list[float | None] = [None] * len(images)
        for prompt in set(prompts):
            members = [i for i, other in enumerate(prompts) if other == prompt]
            if len(members) > 1:
                gaps = pixels[members][:, None] - pixels[members][None]
                distance = np.sqrt((gaps**2).mean(axis=-1))  # (members, members), 0 on the diagonal
                for i, total in zip(members, distance.sum(axis=1)):
                    scores[i] = float(total / (len(members) - 1))
        return scores


class Naturalness:
    """A quality of natural scene statistics in BRISQUE's manner (Mittal et al. 2012), between 0 and 1.

    It is not BRISQUE: that maps 36 such statistics to people's opinions by a support vector machine, which is
    not here. This takes the first of them, the shape of the generalised Gaussian that fits the
    mean-subtracted contrast-normalised luminance, at two scales. Undistorted photographs have 2 to 3; strong
    blur, blocks of JPEG, saturation and flat areas less, noise more. score = mean over the scales of
    exp(-|ln(shape / 2.5)|), 0 for a picture without any contrast. It says nothing of what is shown and little
    of a drawing: watch its change over a run, not its value.
    """

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        if min(images.shape[1:3]) < 16:
            raise UserError(
                f"reward naturalness: expected pictures of at least 16 x 16, got {images.shape[1:3]}"
            )
        return [float(np.mean([naturalness(plane) for plane in two_scales(image)])) for image in images]


def two_scales(image: np.ndarray) -> list[np.ndarray]:
    """Luminance (ITU-R 601) in 0 to 255, and the same at half the size. image: uint8 (height, width, 3)."""
    luminance = image.astype(np.float64) @ (0.299, 0.587, 0.114)
    height, width = (side // 2 * 2 for side in luminance.shape)
    halves = luminance[:height, :width].reshape(height // 2, 2, width // 2, 2)
    return [luminance, halves.mean(axis=(1, 3))]


def naturalness(luminance: np.ndarray) -> float:
    coefficients = contrast_normalized(luminance)
    if not coefficients.any():
        return 0.0
    shape, _ = fit_generalized_gaussian(coefficients)
    return float(np.exp(-abs(np.log(shape / NATURAL_SHAPE))))


def contrast_normalized(luminance: np.ndarray) -> np.ndarray:
    """(L - mean) / (deviation + 1), both in a Gaussian window of 7 x 7 pixels, sigma 7/6 (BRISQUE, eq. 1)."""
    window = functools.partial(ndimage.gaussian_filter, sigma=7 / 6, radius=3, mode="nearest")
    mean = window(luminance)
    variance = window(luminance**2) - mean**2
    return (luminance - mean) / (np.sqrt(np.maximum(variance, 0)) + 1)


def fit_generalized_gaussian(values: np.ndarray) -> tuple[float, float]:
    """Shape and standard deviation of the zero-mean generalised Gaussian with the values' moments.

    The shape (0.2 to 10) solves gamma(1/a) gamma(3/a) / gamma(2/a)^2 = E[x^2] / E[|x|]^2 (Sharifi and
    Leon-Garcia 1995); 1 is Laplace's distribution, 2 Gauss's, the uniform one is approached from below.
    """
    shapes = np.arange(0.2, 10.0, 0.001)
    log_ratio = special.gammaln(1 / shapes) + special.gammaln(3 / shapes) - 2 * special.gammaln(2 / shapes)
    wanted = np.log((values**2).mean() / np.abs(values).mean() ** 2)
    return float(shapes[np.abs(log_ratio - wanted).argmin()]), float(np.sqrt((values**2).mean()))
