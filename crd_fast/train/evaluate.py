"""Evaluation: the same prompts and seeds every time, scored by the rewards and by judges never trained on."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from crd_fast.config import MOST_PICTURES, Recipe
from crd_fast.errors import UserError
from crd_fast.models.negative import encode_negatives
from crd_fast.prompts.lists import evaluation_prompts
from crd_fast.prompts.source import category_of, same_prompt
from crd_fast.ranks import Ranks
from crd_fast.rewards import Rewards
from crd_fast.run.metrics import GUIDED_BASE
from crd_fast.run.new_files import naming, write_atomically
from crd_fast.run.observer import NOBODY, Observer
from crd_fast.run.scores import Scores, write_scores
from crd_fast.run.watch import judge_metrics
from crd_fast.seeds import seed_table
from crd_fast.train.micro_batch import MicroBatch, decoded
from crd_fast.train.rollout import Sampling, generate

EVALUATION_SEED = 20_260_314
GRID_COLUMNS, GRID_TILES = 8, 24
DECODED = 32


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (N, height, width, 3) in [0, 1] as a saved picture holds them.

    Raises UserError where some are not finite: they would be black, and scored like any other.
    """
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise UserError(
            f"pictures: expected finite values, got NaN or infinity in {bad} of {len(images)}: "
            "the weights may have diverged, or overflow in this precision"
        )
    return (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def pictures_of(model, latents: torch.Tensor) -> np.ndarray:
    """uint8 (N, height, width, 3), decoded a few at a time: as floats, many take gigabytes."""
    return np.concatenate([to_uint8(decoded(model, part)) for part in latents.split(DECODED)])


class HeldOut:
    """What an evaluation asks for and who judges it: checked, and tried out, before anything is loaded.

    entries: the prompts with their metadata. judges: the recipe's `eval_rewards`. asked: the prompts with the
    rewards, and with the judges.
    Raises UserError for prompts or judges that are none, or not for this model.
    """

    def __init__(self, recipe: Recipe, rewards: Rewards):
        recipe.check_own(trains=False, evaluates=True)
        self.entries = evaluation_prompts(recipe)
        prompts, samples = len(self.entries), recipe.evaluate.samples_per_prompt
        if prompts * samples > MOST_PICTURES:
            raise UserError(
                f"evaluate.samples_per_prompt: expected at most {MOST_PICTURES} pictures an evaluation, got "
                f"{samples} of each of {prompts} prompts"
            )
        self.judges = Rewards(recipe.eval_rewards, waits_on_host=True, judges=True)
        self.asked = [(self.entries, rewards), (self.entries, self.judges)]
        for entries, judge in self.asked:
            judge.check(entries, every=judge is rewards)
        if self.judges.weights:
            self.judges.try_out(self.entries, recipe.evaluation_size)


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found. metrics: named `eval/...`; images: uint8 (N, height, width, 3); scores: of
    each. Metrics are empty and scores None on all processes but the main one. latents: of this process's own
    pictures, where the recipe has drift measured at them."""

    metrics: dict[str, float]
    images: np.ndarray
    scores: Scores | None = None
    latents: torch.Tensor | None = None

    def with_values(self, values: dict[str, np.ndarray]) -> Evaluated:
        """The same with more that each picture got, (N,) by name, and its mean as a metric."""
        if self.scores is None:
            return self
        scores = replace(self.scores, values=self.scores.values | values)
        means = {f"eval/{name}": float(of.mean()) for name, of in values.items()}
        return replace(self, metrics=self.metrics | means, scores=scores)


class Evaluation:
    """The held-out prompts of a recipe, encoded once.

    held_out: where they have been read before. trained: the prompts that are trained on, where known. seed:
    of the pictures.
    """

    def __init__(
        self,
        model,
        recipe: Recipe,
        rewards: Rewards,
        micro_batch: MicroBatch,
        ranks: Ranks,
        held_out: HeldOut | None = None,
        trained: Collection[str] | None = None,
        seed: int = EVALUATION_SEED,
    ):
        config = recipe.evaluate
        self.model, self.recipe, self.rewards = model, recipe, rewards
        self.micro_batch, self.ranks = micro_batch, ranks
        held_out = held_out or HeldOut(recipe, rewards)
        entries, self.judges = held_out.entries, held_out.judges
        self.metadata = [entry for entry in entries for _ in range(config.samples_per_prompt)]
        self.embeddings = model.encode_prompts([entry["prompt"] for entry in entries])
        self.empty = encode_negatives(model, entries if recipe.guides_evaluation else [{}])
        self.prompt_index = torch.arange(len(entries)).repeat_interleave(config.samples_per_prompt)
        self.seeds = seed_table(seed, count=len(self.metadata))
        known = None if trained is None else {same_prompt(prompt) for prompt in trained}
        self.trained = [None if known is None else same_prompt(e["prompt"]) in known for e in self.metadata]

    def __len__(self) -> int:
        return len(self.metadata)

    def run(self, observer: Observer = NOBODY) -> Evaluated:
        """With the active weights. Each rank makes its part of the images; the main process scores them."""
        config = self.recipe.evaluate
        if config.guidance_scale > 1 >= self.recipe.rollout.guidance_scale:
            return self.run_with(self.guided(config.guidance_scale), observer)
        return self.run_with(Sampling.of(self.recipe, config, self.empty, self.micro_batch), observer)

    def guided(self, guidance_scale: float) -> Sampling:
        """As evaluations are sampled, but for the guidance, of which the rollout knows nothing."""
        # guided forwards are twice as large; whether these fit says nothing about others
        size = max(1, self.micro_batch.size // 2)
        config = self.recipe.evaluate.model_copy(update={"guidance_scale": guidance_scale})
        return Sampling.of(self.recipe, config, self.empty, MicroBatch(size, self.micro_batch.fixed))

    def pictures(self, sampling: Sampling, observer: Observer = NOBODY) -> tuple[np.ndarray, torch.Tensor]:
        """All pictures, uint8 (N, height, width, 3), and the latents of this rank's own."""
        own = self.own_rows()
        latents = generate(
            self.model,
            self.embeddings,
            self.prompt_index[own],
            self.seeds[own],
            sampling,
            observer=observer,
        )
        return self.ranks.gather(pictures_of(self.model, latents))[: len(self)], latents

    def run_with(self, sampling: Sampling, observer: Observer = NOBODY) -> Evaluated:
        """The active weights' pictures, sampled so, and their scores on the main process."""
        images, latents = self.pictures(sampling, observer)
        kept = None if self.recipe.evaluate.drift is None else latents
        if not self.ranks.main:
            return Evaluated({}, images, latents=kept)
        with observer.phase("scoring"):
            metrics, each = self._scored(images)
        return Evaluated(metrics, images, self._scores(each), kept)

    def _scored(self, images: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics of all pictures, and what each got, by rewards and judges."""
        values = self.rewards.score(images, self.metadata)
        metrics, each = self.rewards.report(images, self.metadata, values)
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        each |= {f"reward/{name}": of for name, of in values.items()}
        if self.judges.weights:
            judged = self.judges.score(images, self.metadata)
            metrics |= judge_metrics(each["reward"], judged, [entry["prompt"] for entry in self.metadata])
            each |= {f"judge/{name}": of for name, of in judged.items()}
        return metrics, each

    def own_rows(self) -> torch.Tensor:
        """Which pictures this rank makes, int64 (n,), n the same on each.

        The last one again where they do not suffice: sharded ranks meet in forwards.
        """
        each = -(-len(self) // self.ranks.count)
        return (torch.arange(each) + each * self.ranks.rank).clamp(max=len(self) - 1)

    def _scores(self, values: dict[str, np.ndarray]) -> Scores:
        return Scores(
            index=self.prompt_index.tolist(),
            prompts=[entry["prompt"] for entry in self.metadata],
            seeds=self.seeds.tolist(),
            categories=[category_of(entry) for entry in self.metadata],
            trained=self.trained,
            values=values,
        )

    def save(self, found: Evaluated, folder: Path, name: str, scores: Path) -> np.ndarray:
        """Writes the grid `name` into the folder, and what each picture got. Returns the grid."""
        assert found.scores is not None, "of the main process"
        grid = self.save_grid(found.images, folder, name)
        write_scores(scores, found.scores)
        return grid

    def save_grid(self, images: np.ndarray, folder: Path, name: str) -> np.ndarray:
        """The first tiles as one picture, and what was asked for beside it. Returns the picture."""
        folder.mkdir(exist_ok=True)
        count = min(GRID_TILES, len(images))
        grid = tile(images[:count])
        with naming(folder / f"{name}.png"):
            Image.fromarray(grid).save(folder / f"{name}.png")
        prompts = [entry["prompt"] for entry in self.metadata[:count]]
        write_atomically(folder / "prompts.json", json.dumps(prompts, indent=1))
        return grid


def guided_base_metrics(metrics: dict[str, float], guidance_scale: float | None) -> dict[str, float]:
    """An evaluation's metrics under the names that the base with guidance has."""
    found = {
        GUIDED_BASE + name.removeprefix("eval/"): value
        for name, value in metrics.items()
        if name.startswith("eval/") and name != "eval/images"
    }
    return found | {f"{GUIDED_BASE}guidance_scale": float(guidance_scale or 1)}


def tile(images: np.ndarray, columns: int = GRID_COLUMNS) -> np.ndarray:
    """N pictures side by side in rows of `columns`, the last row filled up with black."""
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width, channels), dtype=images.dtype)
    padded[:count] = images
    grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)
