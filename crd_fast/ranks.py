"""Several processes that train one model: whole prompts on each, gradients averaged, one writes files."""

from __future__ import annotations

import atexit
import gc
import importlib
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import DeviceMesh

from crd_fast.config import Recipe
from crd_fast.errors import UserError
from crd_fast.launched import launched_rank

# How long the others wait for one while it encodes prompts, loads a large base or has an evaluation scored. A
# process that ends takes the others with it, so that none waits this long for nothing.
PATIENCE = timedelta(hours=6)

# Defaults of their functions are the group of when they are imported, and keep it beyond its end.
HOLDERS = ("torch.distributed.nn.functional", "torch.distributed.fsdp", "torch.distributed.optim")


class Ranks:
    """This process among those that torchrun or `accelerate launch` started; alone where none of them did.

    Every method but `main` is called by all of them alike.
    """

    def __init__(self):
        if launched_rank() is not None:
            for name in HOLDERS:
                importlib.import_module(name)
        # also picks backend and device
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank, self.count = self._state.process_index, self._state.num_processes
        if self.count > 1:
            atexit.register(end_group)

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

    def all(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all ranks, in rank order."""
        return np.concatenate(self.all(rows)) if self.count > 1 else rows

    def collect(self, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The tensors of all ranks, in rank order, on the host of the main one; nothing elsewhere.

        One at a time: together they may be more than a device holds.
        """
        layouts = self.all({key: (value.shape, value.dtype) for key, value in tensors.items()})
        collected = [{key: value.cpu() for key, value in tensors.items()}] if self.main else []
        for rank in range(1, self.count):
            received = {}
            for key, (shape, dtype) in layouts[rank].items():
                if self.rank == rank:
                    dist.send(tensors[key].to(self._state.device).contiguous(), 0)
                elif self.main:
                    received[key] = torch.empty(shape, dtype=dtype, device=self._state.device)
                    dist.recv(received[key], rank)
                    received[key] = received[key].cpu()
            if self.main:
                collected.append(received)
        return collected

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Each metric's mean over the ranks."""
        table = self.gather(np.array([list(metrics.values())]))
        return dict(zip(metrics, table.mean(axis=0).tolist())) if self.count > 1 else metrics

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks."""
        if self.count == 1:
            return
        # some have none: a last block's text stream may lead nowhere
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def clip_gradients(self, parameters: list[torch.nn.Parameter], largest: float, parts: bool) -> float:
        """Shortens the gradient to the norm `largest` if it is longer. Returns its norm before.

        parts: the ranks have different parts of one gradient, and not each the same one.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if parts:
            squared = norm**2
            dist.all_reduce(squared)
            norm = squared.sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return float(norm)


def end_group() -> None:
    """Ends the group's threads: those that run when the interpreter goes abort the process.

    They end with the last reference to the group. DTensor's cache keeps a mesh, and that its groups.
    """
    if not dist.is_initialized():
        return
    gc.collect()  # a sharded model is a cycle
    for mesh in gc.get_objects():
        if type(mesh) is DeviceMesh:
            vars(mesh).get("_pg_registry", {}).clear()
    dist.destroy_process_group()
    gc.collect()


def own_prompts(shares: list[np.ndarray], rank: int, ranks: int) -> np.ndarray:
    """A rank's prompts: every optimizer step's share is dealt out in turn."""
    return np.concatenate([share[rank::ranks] for share in shares])


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raises UserError where the prompts cannot be dealt out evenly, or one process would be sharded."""
    if ranks == 1 and recipe.model.sharding != "none":
        raise UserError("model.sharding: fsdp needs several processes (torchrun), expected none for one")
    count, steps = recipe.rollout.prompts_per_iteration, recipe.train.steps_per_iteration
    if ranks > 1 and count % (ranks * steps):
        raise UserError(
            f"rollout.prompts_per_iteration: expected a multiple of {ranks * steps} for {ranks} processes "
            f"and {steps} optimizer steps, got {count}"
        )
    if ranks > 1 and recipe.loss.centering == "batch":
        raise UserError("loss.centering: expected prompt or none for several processes, got batch")
