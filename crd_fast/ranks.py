"""Several processes that train one model: whole prompts on each, gradients averaged, one writes files."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from crd_fast.config import Recipe
from crd_fast.errors import UserError


class Ranks:
    """This process among those that torchrun or `accelerate launch` started; alone where none of them did.

    Every method but `main` is called by all of them alike.
    """

    def __init__(self):
        self._state = PartialState(cpu=not torch.cuda.is_available())  # also picks backend and device
        self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def main_first(self) -> AbstractContextManager:
        """Within this context the others begin when the main process is through."""
        return self._state.main_process_first()

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.gather(np.array([flag])).any())

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all ranks, in rank order."""
        if self.count == 1:
            return rows
        parts = [None] * self.count
        dist.all_gather_object(parts, rows)
        return np.concatenate(parts)

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Each metric's mean over the ranks."""
        table = self.gather(np.array([list(metrics.values())]))
        return dict(zip(metrics, table.mean(axis=0).tolist())) if self.count > 1 else metrics

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def own_prompts(shares: list[np.ndarray], rank: int, ranks: int) -> np.ndarray:
    """A rank's prompts: every optimizer step's share is dealt out in turn."""
    return np.concatenate([share[rank::ranks] for share in shares])


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raises UserError where the prompts cannot be dealt out evenly."""
    count, steps = recipe.rollout.prompts_per_iteration, recipe.train.steps_per_iteration
    if ranks > 1 and count % (ranks * steps):
        raise UserError(
            f"rollout.prompts_per_iteration: expected a multiple of {ranks * steps} for {ranks} processes "
            f"and {steps} optimizer steps, got {count}"
        )
    if ranks > 1 and recipe.loss.centering == "batch":
        raise UserError("loss.centering: expected prompt for several processes, got batch")
