"""What an evaluation measures in a run: held-out pictures, drift, the guided base, distance of features."""

from __future__ import annotations

import time

import numpy as np

from crd_fast.run.observer import Observer
from crd_fast.train.drift import with_drift
from crd_fast.train.evaluate import Evaluated, Evaluation
from crd_fast.train.features import FeatureDistance
from crd_fast.weights.base import Weights


def measured(
    evaluation: Evaluation,
    weights: Weights,
    features: FeatureDistance | None,
    observer: Observer,
    with_guided_base: bool,
) -> tuple[Evaluated, Evaluated | None, dict[str, float]]:
    """Of the weights that the recipe evaluates. Beside it what the pretrained model does with guidance, with
    `with_guided_base` and where the recipe asks for it; and the seconds, as metrics."""
    clock, drawn = [time.perf_counter()], False
    used = weights.use(evaluation.recipe.evaluate.weights)
    with observer.phase("evaluation", len(evaluation)), used:
        found = evaluation.run(observer)
    found = with_drift(found, evaluation, weights, observer)
    clock.append(time.perf_counter())
    guided, scale = None, evaluation.recipe.guided_base
    if with_guided_base and scale is not None:
        with observer.phase("guided base", len(evaluation)), weights.use("reference"):
            guided = evaluation.run_with(evaluation.guided(scale), observer)
    if features is not None:
        drawn = features.prepare(evaluation, weights, guided)
    clock.append(time.perf_counter())
    if features is not None:
        found = features.measured(found)
    clock.append(time.perf_counter())
    before, of_base, after = np.diff(clock).tolist()
    seconds = {"seconds_eval": before + after}
    if guided is not None or drawn:
        seconds["seconds_guided_base"] = of_base
    return found, guided, seconds
