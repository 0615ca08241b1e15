"""How far an evaluation's pictures are, all together, from those of the pretrained model with guidance."""

from __future__ import annotations

import io
import itertools
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.models.negative import KEY
from crd_fast.ranks import Ranks
from crd_fast.rewards.clip import Clip, preprocess
from crd_fast.rewards.registry import default_device
from crd_fast.run.new_files import write_atomically
from crd_fast.run.observer import Observer
from crd_fast.run.scores import guided_base_path
from crd_fast.train.evaluate import EVALUATION_SEED, Evaluated, Evaluation
from crd_fast.train.places import RANDOM
from crd_fast.weights.base import Weights

METRIC = "eval/drift/features"
SIDE, LAYERS, CHANNELS, CELLS = 64, 3, 16, 2  # of the network with random weights
AT_ONCE = 64  # pictures


class FeatureDistance:
    """Fréchet distance of picture features to those of the guided base, over the latter's total variance.

    The guided base's pictures have the same prompts and seeds and are made once; of them the features are
    kept in the run's folder, and made anew where they are not there or of another evaluation.
    pictures: how many an evaluation has. Raises UserError, before anything is loaded, where the recipe names
    no network, and for a single picture, which has no variance.
    """

    def __init__(self, recipe: Recipe, output: Path, pictures: int, ranks: Ranks, observer: Observer):
        if pictures < 2:
            raise UserError(
                f"evaluate.features: expected an evaluation of at least 2 pictures, got {pictures}; see "
                "evaluate.max_prompts and evaluate.samples_per_prompt"
            )
        self.config, self.ranks, self.observer = recipe.evaluate, ranks, observer
        self.path = guided_base_path(output).with_suffix(".npz")
        self._base: np.ndarray | None = None
        self._features = picture_features(self.config.features or RANDOM) if ranks.main else None

    def prepare(self, evaluation: Evaluation, weights: Weights, guided: Evaluated | None) -> bool:
        """Makes sure of the guided base's features. All ranks call it, before `with_distance`.

        guided: the guided base's evaluation where this run has just made it, whose pictures are these where
        its guidance is. Returns whether others were drawn.
        """
        what = self._what(evaluation)
        if self._base is None and self._features is not None:
            self._base = read_features(self.path, what)
        if self.ranks.any(self._base is not None):
            return False
        drawn = guided is None or evaluation.recipe.guided_base != self.config.drift
        if guided is not None and not drawn:
            images = guided.images
        else:
            sampling = evaluation.guided(self.config.drift or 1.0)
            with self.observer.phase("guided base", len(evaluation)), weights.use("reference"):
                images, _ = evaluation.pictures(sampling, self.observer)
        if self._features is not None:
            self._base = self._features(images)
            write_features(self.path, what, self._base)
        return drawn

    def with_distance(self, result: Evaluated) -> Evaluated:
        """The same with `eval/drift/features`, on the main process."""
        if self._features is None or self._base is None:
            return result
        value = relative_distance(self._features(result.images), self._base)
        return replace(result, metrics=result.metrics | ({METRIC: value} if math.isfinite(value) else {}))

    def _what(self, evaluation: Evaluation) -> str:
        """What the features of the guided base depend on."""
        config = self.config
        drawn = (config.drift, config.steps, evaluation.recipe.evaluation_size, evaluation.seeds.tolist())
        prompts = [(entry["prompt"], entry.get(KEY) or "") for entry in evaluation.metadata]
        return json.dumps([config.features, *drawn, prompts])


def picture_features(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """`random`, or the folder or hub id of a CLIP model: a function of uint8 (N, height, width, 3)."""
    return random_features if name == RANDOM else ClipFeatures(name)


class ClipFeatures:
    """CLIP's normalised picture embeddings, float64 (N, dimension). On the host but for a call."""

    def __init__(self, path: str):
        self.clip = Clip("of evaluate.features", path, None, "cpu")

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.clip.to(default_device())
        try:
            parts = [
                self.clip.images(preprocess(images[i : i + AT_ONCE], self.clip.size)).cpu()
                for i in range(0, len(images), AT_ONCE)
            ]
        finally:
            self.clip.to("cpu")
        return torch.cat(parts).double().numpy()


@torch.no_grad()
def random_features(images: np.ndarray) -> np.ndarray:
    """Features of a small convolutional network with fixed random weights: float64 (N, 64).

    Such features tell distributions of pictures apart where a network trained on photographs knows nothing
    of them (arXiv 2002.09797). They are means over quarters of the picture: they see where things are.
    """
    rng = torch.Generator().manual_seed(EVALUATION_SEED)
    sizes = [3] + [CHANNELS] * LAYERS
    weights = [
        torch.randn(after, before, 3, 3, generator=rng) * (2 / (9 * before)) ** 0.5
        for before, after in itertools.pairwise(sizes)
    ]
    found = []
    for start in range(0, len(images), AT_ONCE):
        x = torch.from_numpy(images[start : start + AT_ONCE]).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = F.adaptive_avg_pool2d(x, (min(x.shape[2], SIDE), min(x.shape[3], SIDE)))
        for place, weight in enumerate(weights):
            x = F.relu(F.conv2d(F.avg_pool2d(x, 2, ceil_mode=True) if place else x, weight, padding=1))
        found.append(F.adaptive_avg_pool2d(x, CELLS).flatten(1))
    return torch.cat(found).double().numpy()


def relative_distance(features: np.ndarray, base: np.ndarray) -> float:
    """The Fréchet distance of two Gaussians with the features' moments, over the base's total variance.

    |m - m_b|^2 + tr(C + C_b - 2 (C C_b)^(1/2)), over tr C_b. features, base: float64 (N, dimension). NaN
    where the base has no variance. Fewer pictures are further apart by chance: compare equally many.
    """
    if len(base) < 2:
        return math.nan
    mean, mean_base = features.mean(axis=0), base.mean(axis=0)
    spread, spread_base = (np.cov(values, rowvar=False) for values in (features, base))
    sizes, axes = np.linalg.eigh(spread_base)
    root = (axes * np.sqrt(np.maximum(sizes, 0))) @ axes.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ spread @ root), 0)).sum()
    whole = np.trace(spread_base)
    distance = ((mean - mean_base) ** 2).sum() + np.trace(spread) + whole - 2 * cross
    return float(max(distance, 0.0) / whole) if whole > 0 else math.nan


def write_features(path: Path, what: str, features: np.ndarray) -> None:
    """With what they depend on, for `read_features`."""
    buffer = io.BytesIO()
    np.savez(buffer, what=np.array(what), features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read_features(path: Path, what: str) -> np.ndarray | None:
    """None where there are none of that, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["features"] if str(file["what"]) == what else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
