"""Advantages: rewards of P prompts by K samples, combined, centered by prompt and scaled."""

from __future__ import annotations

import numpy as np

MIN_STD = 1e-6


def combine(rewards: dict[str, np.ndarray], weights: dict[str, float], aggregate: str) -> np.ndarray:
    """The weighted sum of rewards, each (P, K).

    aggregate "sum" adds them as they are; "gdpo" first normalises each within its prompt's group, so that no
    reward outweighs another by its spread alone (GDPO, arXiv 2601.05242).
    """
    total: np.ndarray | float = 0.0
    for name, reward_PK in rewards.items():
        if aggregate == "gdpo":
            centered = reward_PK - reward_PK.mean(axis=1, keepdims=True)
            reward_PK = centered / np.maximum(reward_PK.std(axis=1, keepdims=True), MIN_STD)
        total = total + weights[name] * reward_PK
    return np.asarray(total)


def advantages(reward_PK: np.ndarray, std: str) -> np.ndarray:
    """A = (R - mean of the prompt) / max(std, 1e-6), (P, K), population std.

    std "global": of all samples of the iteration; "group": of the prompt's own.
    """
    centered = reward_PK - reward_PK.mean(axis=1, keepdims=True)
    scale = reward_PK.std() if std == "global" else reward_PK.std(axis=1, keepdims=True)
    return centered / np.maximum(scale, MIN_STD)
