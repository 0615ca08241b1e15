"""A run's evaluation: held-out pictures, drift, the base with guidance, distance of features."""

from __future__ import annotations

import time

from crd_fast.run.observer import Observer
from crd_fast.train.drift import with_drift
from crd_fast.train.evaluate import Evaluated, Evaluation
from crd_fast.train.features import FeatureDistance
from crd_fast.weights.base import Weights


def evaluate_run(
    evaluation: Evaluation,
    weights: Weights,
    features: FeatureDistance | None,
    observer: Observer,
    with_guided_base: bool,
) -> tuple[Evaluated, Evaluated | None, dict[str, float]]:
    """Evaluates the weights that the recipe names in `evaluate.weights`.

    Returns the result; the result of the pretrained model with guidance, with `with_guided_base` and where
    the recipe asks for it, else None; and the seconds that each took, as metrics.
    """
    guided_base, guidance_scale, features_drawn = None, evaluation.recipe.guided_base, False
    started = time.perf_counter()
    with observer.phase("evaluation", len(evaluation)), weights.use(evaluation.recipe.evaluate.weights):
        result = evaluation.run(observer)
    result = with_drift(result, evaluation, weights, observer)
    base_started = time.perf_counter()
    if with_guided_base and guidance_scale is not None:
        with observer.phase("guided base", len(evaluation)), weights.use("reference"):
            guided_base = evaluation.run_with(evaluation.guided(guidance_scale), observer)
    if features is not None:
        features_drawn = features.prepare(evaluation, weights, guided_base)
    base_ended = time.perf_counter()
    if features is not None:
        result = features.with_distance(result)
    ended = time.perf_counter()
    seconds = {"seconds_eval": base_started - started + ended - base_ended}
    if guided_base is not None or features_drawn:
        seconds["seconds_guided_base"] = base_ended - base_started
    return result, guided_base, seconds
