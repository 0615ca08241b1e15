"""Advantages: rewards of P prompts by K samples, combined, centered by prompt and scaled.

NaN stands where a reward did not score a sample. It then neither moves the sample nor counts in any mean or
deviation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_STD = 1e-6


def combine(rewards: dict[str, np.ndarray], weights: dict[str, float], aggregate: str) -> np.ndarray:
    """The weighted sum of rewards, each (P, K); NaN where no reward scored.

    aggregate "sum" adds them as they are; "gdpo" first normalises each within its prompt's group, so that no
    reward outweighs another by its spread alone (GDPO, arXiv 2601.05242). Where one reward did not score a
    sample that others scored, the mean of its prompt stands in, or 0 where it scored none of them.
    """
    total: np.ndarray | float = 0.0
    scored = np.array(False)
    for name, reward_PK in weighted(rewards, weights).items():
        known_PK = ~np.isnan(reward_PK)
        mean_P1 = masked_mean(reward_PK, known_PK)
        if aggregate == "gdpo":
            std_P1 = masked_std(reward_PK, known_PK)
            reward_PK, mean_P1 = (reward_PK - mean_P1) / np.maximum(std_P1, MIN_STD), np.zeros_like(mean_P1)
        total = total + weights[name] * np.where(known_PK, reward_PK, mean_P1)
        scored = scored | known_PK
    return np.where(scored, total, np.nan)


def combine_pictures(
    rewards: dict[str, np.ndarray], weights: dict[str, float], prompts: Sequence[str]
) -> np.ndarray:
    """The same sum, (N,), of N pictures in any order, whose group is who has the same text in `prompts`."""
    _, prompt_N = np.unique(prompts, return_inverse=True)
    total_N = np.empty(len(prompts))
    for prompt in range(prompt_N.max(initial=-1) + 1):
        rows = prompt_N == prompt
        of_prompt = {name: value[rows][None] for name, value in rewards.items()}
        total_N[rows] = combine(of_prompt, weights, "sum")[0]
    return total_N


def weighted(rewards: dict[str, np.ndarray], weights: dict[str, float]) -> dict[str, np.ndarray]:
    """The rewards whose weight is not 0; all rewards if there is none."""
    return {name: of for name, of in rewards.items() if weights[name]} or rewards


def advantages(reward_PK: np.ndarray, std: str, kind_P: np.ndarray | None = None) -> np.ndarray:
    """A = (R - mean of the prompt) / max(std, 1e-6), (P, K), population std; 0 where R is NaN.

    std "global": of all samples of the iteration, with kind_P of those whose prompts are of one kind;
    "group": of the prompt's own.
    """
    known_PK = ~np.isnan(reward_PK)
    centered = np.where(known_PK, reward_PK - masked_mean(reward_PK, known_PK), 0.0)
    if std == "group":
        return centered / np.maximum(masked_std(reward_PK, known_PK), MIN_STD)
    kind_P = np.zeros(len(reward_PK)) if kind_P is None else kind_P
    scale_P1 = np.empty((len(reward_PK), 1))
    for kind in np.unique(kind_P):
        chosen = reward_PK[kind_P == kind]
        found = chosen[~np.isnan(chosen)]
        scale_P1[kind_P == kind] = found.std() if len(found) else 0.0
    return centered / np.maximum(scale_P1, MIN_STD)


def uncertain(rewards: dict[str, np.ndarray], weights: dict[str, float], share: float) -> np.ndarray:
    """The samples that the trained reward ranks furthest above what rewards of weight 0 say, bool (P, K).

    u = rank of the sum by weight - mean of the ranks by each reward of weight 0, ranks ascending among all
    samples of the iteration; at most `share` of all samples, those with the largest u, and none with u <= 0.
    What a reward did not score has no rank by it; what none of weight 0 scored is not among them.
    After GARDO, arXiv 2512.24138, whose auxiliary rewards are those of weight 0 here.
    """
    trained_N = ranks(combine(rewards, weights, "sum").flatten())
    beside = [ranks(reward_PK.flatten()) for name, reward_PK in rewards.items() if not weights[name]]
    known_N = ~np.isnan(trained_N) & ~np.isnan(beside).all(axis=0)
    ahead_N = np.zeros(len(trained_N))
    ahead_N[known_N] = trained_N[known_N] - np.nanmean(np.stack(beside)[:, known_N], axis=0)
    first = np.argsort(-ahead_N, kind="stable")[: round(share * len(ahead_N))]
    chosen_N = np.zeros(len(ahead_N), dtype=bool)
    chosen_N[first] = ahead_N[first] > 0
    return chosen_N.reshape(next(iter(rewards.values())).shape)


def ranks(values: np.ndarray) -> np.ndarray:
    """Each value's place among the N that are not NaN, from 0 to 1, equal ones in the middle of theirs."""
    known = ~np.isnan(values)
    found = np.sort(values[known])
    places = np.searchsorted(found, values, "left") + np.searchsorted(found, values, "right")
    return np.where(known, places / max(1, 2 * len(found)), np.nan)


def kinds(rewards: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """A number for the set of rewards that train a prompt, (P,): what others score is no measure for it."""
    trained = weighted(rewards, weights).values()
    scored_PR = np.stack([~np.isnan(reward_PK).all(axis=1) for reward_PK in trained], axis=1)
    return np.unique(scored_PR, axis=0, return_inverse=True)[1].reshape(-1)


def masked_mean(values_PK: np.ndarray, known_PK: np.ndarray) -> np.ndarray:
    """The mean of each row's known values, (P, 1); 0 if none is known. Exact where all values are equal."""
    if known_PK.all():
        return values_PK.mean(axis=1, keepdims=True)
    mean_P1 = np.zeros((len(values_PK), 1))
    for row, values, known in zip(mean_P1, values_PK, known_PK):
        if known.any():
            found = values[known]
            row[:] = np.clip(found.mean(), found.min(), found.max())
    return mean_P1


def masked_std(values_PK: np.ndarray, known_PK: np.ndarray) -> np.ndarray:
    """The standard deviation of each row's known values, (P, 1); 0 if none is known."""
    if known_PK.all():
        return values_PK.std(axis=1, keepdims=True)
    return np.array(
        [[values[known].std() if known.any() else 0.0] for values, known in zip(values_PK, known_PK)]
    )
