"""Which settings bring a run under a number of hours on a card, those that cost the least reward first."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

from crd_fast.config import Recipe, build_recipe
from crd_fast.errors import UserError
from crd_fast.plan.cost import EFFICIENCY, cost
from crd_fast.plan.fit import SAVINGS, Fit, fit, overridden
from crd_fast.plan.gpus import Card
from crd_fast.plan.planner import Planner

# What computes less at equal reward by the studies (docs/cost.md), and is taken as one. The solver stays:
# five of ab2's steps stop making what the model can in long runs, five of Euler's do not (docs/evidence.md).
LESS = (
    "train.timesteps=2",
    "loss.anchor_fraction=0.25",
    "rollout.steps=5",
)
# Then the batch, down to a group of 8, iterations and pictures, each value where the recipe has more.
# Pictures come last: smaller ones are another task, where the rest makes the same one noisier or shorter.
FEWER = {
    "rollout.samples_per_prompt": (16, 12, 8),
    "rollout.prompts_per_iteration": (32, 24, 16, 12),
    "train.iterations": (300, 200, 150, 100),
    "rollout.resolution": (384, 256),
}
ROOM = ("train.micro_batch", "rollout.micro_batch", "train.kept_graphs", "train.checkpointing")
FEWEST = 75  # iterations, where that spares the pictures a step; where it does not, the run keeps its 100


def within(
    recipe: Recipe,
    memory: int,
    card: Card,
    hours: float,
    efficiency: float = EFFICIENCY,
    savings: tuple[str, ...] = SAVINGS,
) -> Fit:
    """The recipe with as few changes as bring its estimate under `hours`, or with all of them.

    Memory comes first: what does not fit has no hours. Micro-batches and what is checkpointed are found anew
    at the end. Raises UserError where the recipe has no estimate.
    """
    *_, found = fit(recipe, memory, savings)
    fitting = [o for o in found.overrides if o.partition("=")[0] not in ROOM]
    base = build_recipe(recipe.model_dump(), fitting)
    rungs = [[], *_rungs(base)]
    checkpointing = build_recipe(recipe.model_dump(), found.overrides).train.checkpointing
    recomputed = [f"train.checkpointing={checkpointing}"] if checkpointing > base.train.checkpointing else []
    planners: dict[str, Planner] = {}  # by size of picture: the rest of a rung is no part of the model

    def suffices(rung: list[str]) -> bool:
        less = build_recipe(base.model_dump(), [*rung, *recomputed])
        size = str(less.rollout.resolution)
        planner = planners[size] = planners.get(size) or Planner(less)
        planner.recipe = less
        group = less.rollout.samples_per_prompt
        plan = planner.plan(min(found.plan.micro_batch, group), found.plan.rollout_micro_batch)
        takes = cost(less, plan, card, efficiency)
        if takes.hours is None:
            raise UserError("--hours: expected train.precision bf16, got fp32, which has no estimate")
        return takes.hours <= hours

    def fitted(rung: list[str]) -> Fit:
        anew = [*rung, "train.micro_batch=auto", "rollout.micro_batch=auto"]
        *_, found = fit(build_recipe(base.model_dump(), anew), memory, savings)
        found.overrides = [*fitting, *rung, *found.overrides]
        return found

    # each rung computes less than those before it: the first that suffices is found by halves
    first = 0 if suffices(rungs[0]) else 1 + bisect_left(rungs[1:-1], True, key=suffices)
    first = min(first, len(rungs) - 1)
    chosen = fitted(rungs[first])
    for rung in reversed(rungs[:first]):  # enough where fewer blocks are checkpointed
        above = fitted(rung)
        if _takes(recipe, above, card, efficiency) > hours:
            break
        chosen = above
    return chosen


def _takes(recipe: Recipe, found: Fit, card: Card, efficiency: float) -> float:
    fitted = build_recipe(recipe.model_dump(), found.overrides)
    hours = cost(fitted, found.plan, card, efficiency).hours
    return math.inf if found.missing or hours is None else hours


def _rungs(recipe: Recipe) -> Iterator[list[str]]:
    """Overrides on top of the recipe, each with those before it, without what contradicts the rest of it."""
    taken: list[str] = []
    for override in LESS:
        if _is_less(recipe, override) and overridden(recipe, [*taken, override]) is not None:
            taken.append(override)
    if taken:
        yield list(taken)
    for key, values in FEWER.items():
        section, name = key.split(".")
        before, current = list(taken), getattr(getattr(recipe, section), name)
        for value in values if isinstance(current, int) else ():  # pictures that are not square stay
            if value < current and overridden(recipe, [*before, f"{key}={value}"]) is not None:
                if name == "resolution" and recipe.train.iterations > FEWEST:
                    others = [override for override in taken if not override.startswith("train.iterations=")]
                    yield [*others, f"train.iterations={FEWEST}"]
                taken = [*before, f"{key}={value}"]
                yield list(taken)


def _is_less(recipe: Recipe, override: str) -> bool:
    """Whether the recipe does not compute as little already."""
    key, _, value = override.partition("=")
    section, name = key.split(".")
    current = getattr(getattr(recipe, section), name)
    return current == "all" or current > float(value)
