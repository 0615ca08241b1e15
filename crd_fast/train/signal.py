"""At which of the rollout's steps the policy's gradients are large, as far as training has seen."""

from __future__ import annotations

import numpy as np
import torch

from crd_fast.ranks import Ranks

MEMORY = 0.9  # of what was found before, in each iteration
FLOOR = 0.25  # of the largest: no step is drawn less than that, or a weight would be large and nothing learnt


class Signal:
    """The running root mean square, over pairs, of the size of the policy's gradient at each step.

    The size of a pair is |c1| sqrt(mean((policy - target)^2)), before any weight. A step that was not seen
    yet counts as the largest. state: a number for each step, None before it was seen.
    """

    def __init__(self, steps: int, state: list[float | None] | None = None):
        square = [None] * steps if state is None else state
        self._square = np.array([np.nan if value is None else value for value in square])
        self._sum, self._count = np.zeros(steps), np.zeros(steps)

    @property
    def state(self) -> list[float | None]:
        return [None if np.isnan(value) else float(value) for value in self._square]

    def see(self, step: torch.Tensor, size: torch.Tensor) -> None:
        """Pairs of an iteration: their steps and sizes, (B,)."""
        of_pairs = step.cpu().numpy()
        np.add.at(self._sum, of_pairs, size.double().square().cpu().numpy())
        np.add.at(self._count, of_pairs, 1)

    def end_iteration(self, ranks: Ranks) -> None:
        """Takes in what all processes saw."""
        keys = [(name, i) for name in ("sum", "count") for i in range(len(self._sum))]
        values = np.concatenate([self._sum, self._count]).tolist()
        mean = ranks.mean({f"{name} {i}": value for (name, i), value in zip(keys, values)})
        total, count = np.split(np.array(list(mean.values())), 2)
        with np.errstate(invalid="ignore"):
            new = total / count
        new[np.isinf(new)] = np.nan  # of a step that was left out
        known = MEMORY * self._square + (1 - MEMORY) * new
        self._square = np.where(np.isnan(new), self._square, np.where(np.isnan(known), new, known))
        self._sum[:], self._count[:] = 0, 0

    def sizes(self) -> np.ndarray:
        """By which steps are drawn, (steps,), the largest 1."""
        size = np.sqrt(self._square)
        largest = np.nanmax(size) if not np.isnan(size).all() else 0.0
        if largest == 0:
            return np.ones(len(size))
        return np.maximum(np.nan_to_num(size / largest, nan=1.0), FLOOR)
