"""What a plan of one size of pictures says of a recipe with several, or whose evaluations have another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crd_fast.config import Recipe, build_recipe
from crd_fast.sizes import Resolution

if TYPE_CHECKING:
    from crd_fast.plan.planner import Plan, Planner


class OtherSizes:
    """Planners of a recipe's other sizes, kept, as they take long to make."""

    def __init__(self) -> None:
        self._planners: dict[Resolution, Planner] = {}

    def add_to(self, plan: Plan, planner: Planner) -> None:
        """Adds them to the plan of the largest size: the time of an iteration is the sizes' mean, and an
        evaluation's pictures may be the largest of all."""
        recipe = planner.recipe
        if others := [size for size in recipe.rollout.sizes if size != planner.size]:
            found = [self._planned(planner, size, 1).row_flops for size in others]
            plan.row_flops = {
                kind: (flops + sum(of.get(kind, flops) for of in found)) / (1 + len(found))
                for kind, flops in plan.row_flops.items()
            }
        size = recipe.evaluation_size
        if not recipe.evaluate.every or recipe.rollout.sizes == [size]:
            return
        evaluation = self._planned(planner, size, plan.rollout_micro_batch)
        plan.evaluation_row_flops = evaluation.row_flops
        for name in ("rollout", "decode"):
            if name in evaluation.phases and evaluation.phases[name].bytes > plan.phases[name].bytes:
                plan.phases[name] = evaluation.phases[name]

    def _planned(self, planner: Planner, size: Resolution, rollout_micro_batch: int) -> Plan:
        recipe = of_one_size(planner.recipe, size)
        if size not in self._planners:
            self._planners[size] = type(planner)(recipe)
        self._planners[size].recipe = recipe
        return self._planners[size].plan(1, rollout_micro_batch)


def of_one_size(recipe: Recipe, size: Resolution) -> Recipe:
    values = recipe.model_dump()
    values["rollout"]["resolution"], values["evaluate"]["resolution"] = size, None
    return build_recipe(values)
