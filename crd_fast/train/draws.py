"""Drawing a part of many without bias: what is drawn counts 1 / its probability."""

from __future__ import annotations

import numpy as np


def inclusion(size: np.ndarray, count: float) -> np.ndarray:
    """Probabilities, of the shape of `size`, proportional to size >= 0, at most 1, that sum to `count`.

    What would be drawn more than surely is drawn surely, and the others share what remains. The sum is
    smaller where fewer than `count` have a size.
    """
    size = np.asarray(size, dtype=np.float64)
    probability = np.minimum(size > 0, 1.0)
    if count >= probability.sum():
        return probability
    sure = np.zeros(size.shape, dtype=bool)
    while True:
        scale = (count - sure.sum()) / size[~sure].sum()
        probability = np.where(sure, 1.0, size * scale)
        above = probability > 1
        if not above.any():
            return probability
        sure |= above


def systematic(probability_GN: np.ndarray, offset_G: np.ndarray) -> np.ndarray:
    """Whether each is drawn, bool (G, N): in each row so many as its probabilities add up to, rounded.

    Systematic sampling: with `offset` uniform in [0, 1) each is drawn with its own probability. Equal ones
    give one of each of `count` equal strata.
    """
    above_GN = np.cumsum(probability_GN, axis=1).round(12)
    below_GN = np.concatenate([np.zeros((len(above_GN), 1)), above_GN[:, :-1]], axis=1)
    offset_G1 = offset_G[:, None]
    return np.ceil(above_GN - offset_G1) > np.ceil(below_GN - offset_G1)


def drawn_weights(size_GN: np.ndarray, count_of_all: float, offset_G: np.ndarray) -> np.ndarray:
    """1 / probability where drawn, 0 elsewhere, float64 (G, N): `count_of_all` by their size, within rows.

    Sums with these weights have the expectation of sums of all.
    """
    probability = inclusion(size_GN, count_of_all)
    drawn = systematic(probability, offset_G)
    return np.divide(1.0, probability, where=drawn, out=np.zeros(size_GN.shape))


def drawn_in_groups(size: np.ndarray, group: np.ndarray, offset: np.ndarray, fraction: float) -> np.ndarray:
    """As `drawn_weights`, `fraction` of each run of equal `group` ids. All of shape (B,)."""
    weight = np.zeros(len(size))
    starts = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
    for run in np.split(np.arange(len(group)), starts[1:]):
        weight[run] = drawn_weights(size[run][None], fraction * len(run), offset[run[:1]])[0]
    return weight
