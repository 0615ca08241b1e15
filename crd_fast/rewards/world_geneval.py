"""GenEval's rules as a reward on the built-in world, whose detector is exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from crd_fast.errors import UserError
from crd_fast.prompts import world
from crd_fast.prompts.geneval_metadata import check_metadata
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
                check_metadata(entry)
            except ValueError as error:
                raise UserError(f"reward geneval: prompt {entry['prompt']!r}: {error}") from None

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        return [judgement.score for judgement in self.judge(images, metadata)]

    def report(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> dict[str, Any]:
        """Share of correct images by category; `overall` is the mean of the categories, as GenEval has it.

        `clean` is the same mean for images that are correct and show nothing that was not asked for.
        `per_image`: 0 or 1 for each image, of both.
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
            "per_image": {
                "overall": [float(judgement.correct) for judgement in judgements],
                "clean": [float(judgement.clean) for judgement in judgements],
            },
        }


class WorldGenEvalCorrect(WorldGenEval):
    """1 for an image that is correct as GenEval counts it, else 0.

    Outside counting that asks for at least so many objects: more of them, and others, cost nothing and may
    help by chance, where the partial credit asks for exactly so many of each class that the prompt names.
    """

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        return [float(judgement.correct) for judgement in self.judge(images, metadata)]


class WorldGenEvalStrict(WorldGenEval):
    """1 for an image that is correct with exactly the asked-for counts, else 0."""

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        return [
            float(judgement.correct and judgement.strict_correct)
            for judgement in self.judge(images, metadata)
        ]


def _tag_order(tag: str) -> tuple[int, str]:
    return (world.TAGS.index(tag) if tag in world.TAGS else len(world.TAGS), tag)
