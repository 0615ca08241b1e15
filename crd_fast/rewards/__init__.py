"""Rewards: `score(images, prompts, metadata) -> list[float]`, one value an image.

images: uint8, (N, height, width, 3); prompts: N strings; metadata: N dicts, a line of the prompts file each.
A reward is named in the recipe: one of `REWARDS`, or `package.module:name` of a function with that
signature, or of a class with a method `score` and optionally `setup(device)`, `check(metadata)`, which may
refuse prompts before any work, and `report(images, prompts, metadata) -> dict[str, float]`, what an
evaluation adds to its metrics.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from collections.abc import Callable

import numpy as np
from rapidfuzz import process

from crd_fast import world
from crd_fast.errors import UserError
from crd_fast.rewards import geneval
from crd_fast.rewards.world_detector import detect


class WorldGenEval:
    """GenEval's rules on the built-in world, seen by its exact detector. The score is the partial credit."""

    def judge(self, images: np.ndarray, metadata: list[dict]) -> list[geneval.Judgement]:
        return [
            geneval.judge(detect(image / np.float32(255)), entry) for image, entry in zip(images, metadata)
        ]

    def check(self, metadata: list[dict]) -> None:
        """Raises UserError for the first prompt that the rules cannot be applied to."""
        for entry in metadata:
            try:
                geneval.check_metadata(entry)
            except ValueError as error:
                raise UserError(f"reward geneval: prompt {entry['prompt']!r}: {error}") from None

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        return [judgement.score for judgement in self.judge(images, metadata)]

    def report(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> dict[str, float]:
        """Share of correct images by category; `overall` is the mean of the categories, as GenEval has it.

        `clean` is the same mean for images that are correct and show nothing that was not asked for.
        """
        judgements = self.judge(images, metadata)
        tags = [entry.get("tag", "untagged") for entry in metadata]
        shares, clean = {}, {}
        for tag in sorted(set(tags), key=_tag_order):
            chosen = [judgement for judgement, other in zip(judgements, tags) if other == tag]
            shares[tag] = float(np.mean([judgement.correct for judgement in chosen]))
            clean[tag] = float(np.mean([judgement.clean for judgement in chosen]))
        return {
            "overall": float(np.mean(list(shares.values()))),
            "clean": float(np.mean(list(clean.values()))),
            **shares,
        }


class WorldGenEvalStrict(WorldGenEval):
    """1 for an image that is correct with exactly the asked-for counts, else 0."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        return [
            float(judgement.correct and judgement.strict_correct)
            for judgement in self.judge(images, metadata)
        ]


REWARDS: dict[str, Callable] = {"geneval": WorldGenEval, "geneval_strict": WorldGenEvalStrict}


class Rewards:
    """The recipe's rewards by name. Raises UserError for a name that cannot be found."""

    def __init__(self, weights: dict[str, float], device: str = "cpu"):
        self.weights = weights
        self._rewards = {name: _load(name) for name in weights}
        for reward in self._rewards.values():
            if hasattr(reward, "setup"):
                reward.setup(device)

    def check(self, metadata: list[dict]) -> None:
        """Raises UserError, before any work, if a reward cannot score one of these prompts."""
        for reward in self._rewards.values():
            if hasattr(reward, "check"):
                reward.check(metadata)

    def score(self, images: np.ndarray, metadata: list[dict]) -> dict[str, np.ndarray]:
        """Each reward's values, float64 (N,). Raises UserError for a wrong count, a NaN or no number."""
        prompts = [entry["prompt"] for entry in metadata]
        values = {}
        for name, reward in self._rewards.items():
            scored = (
                reward.score(images, prompts, metadata)
                if hasattr(reward, "score")
                else reward(images, prompts, metadata)
            )
            values[name] = _checked(name, scored, len(images))
        return values

    def report(self, images: np.ndarray, metadata: list[dict]) -> dict[str, float]:
        """Metrics of an evaluation: the weighted reward, each reward's mean, and what rewards report."""
        values = self.score(images, metadata)
        metrics = {
            "images": len(images),
            "reward_mean": float(sum(self.weights[n] * v for n, v in values.items()).mean()),
        }
        for name, reward in self._rewards.items():
            metrics[f"reward/{name}"] = float(values[name].mean())
            if hasattr(reward, "report"):
                metrics |= reward.report(images, [entry["prompt"] for entry in metadata], metadata)
        return metrics


def _tag_order(tag: str) -> tuple[int, str]:
    return (world.TAGS.index(tag) if tag in world.TAGS else len(world.TAGS), tag)


def _load(name: str):
    if name in REWARDS:
        return REWARDS[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        near = process.extractOne(name, list(REWARDS), score_cutoff=40)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"rewards: unknown reward {name!r}{hint} (known: {', '.join(REWARDS)}, or package.module:name)"
        )
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"rewards: {name!r} cannot be imported: {error}") from None
    return reward() if inspect.isclass(reward) else reward


def _checked(name: str, values, count: int) -> np.ndarray:
    try:
        values = list(values)
    except TypeError:
        raise UserError(f"reward {name}: expected {count} values, got {type(values).__name__}") from None
    if len(values) != count:
        raise UserError(f"reward {name}: expected {count} values, got {len(values)}")
    for i, value in enumerate(values):
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"reward {name}: expected finite numbers, got {value!r} for image {i}")
    return np.array([float(value) for value in values])
