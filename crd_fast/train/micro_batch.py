"""How many samples go through the network at once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from crd_fast.errors import UserError
from crd_fast.out_of_memory import ON_THE_HOST, as_out_of_memory

AUTO_MICRO_BATCH = 96

logger = logging.getLogger("crd_fast")


class MicroBatch:
    """How many samples go through the network at once, halved where they do not fit.

    No result depends on it but by rounding: noise comes from a sample's own seed, and groups are exact.
    fixed: it cannot be halved, because other processes wait for this one within the forward that failed.
    """

    def __init__(self, size: int, fixed: bool = False):
        self.size, self.fixed = size, fixed

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Raises UserError where nothing is left to halve.

        Afterwards, outside the `except`, `release_memory`: as long as the error is handled its traceback
        holds the tensors of the forward that failed.
        """
        if self.size == 1 or self.fixed:
            hint = ""
            if self.fixed:
                hint = ", model.sharding fsdp needs the same on all processes: set smaller micro-batches"
            raise UserError(
                f"out of memory at micro-batch {self.size}{hint}: {first_sentence(error)}"
            ) from error
        logger.warning(
            "warning: out of memory at micro-batch %d, going on with %d", self.size, self.size // 2
        )
        self.size //= 2


def in_micro_batches(
    run: Callable[[slice], None], count: int, micro_batch: MicroBatch, done: int = 0
) -> Iterator[slice]:
    """Calls `run` for the rows from `done` to `count`, and yields those of each call that has returned.

    Where memory runs out, the same rows are run again in smaller parts. Raises UserError as `halve` does.
    """
    while done < count:
        rows = slice(done, min(done + micro_batch.size, count))
        try:
            with as_out_of_memory():
                run(rows)
        except torch.OutOfMemoryError as error:
            micro_batch.halve(error)
        else:
            done = rows.stop
            yield rows
            continue
        release_memory()


def first_sentence(error: torch.OutOfMemoryError) -> str:
    """What torch could not have; the rest is advice about its settings."""
    _, host, rest = str(error).rpartition(ON_THE_HOST)  # before which is a line of torch's own code
    return host + rest.partition(".")[0]


def release_memory() -> None:
    """Gives back to the device what no tensor uses. Tensors of an error that is handled are still in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def decoded(model, latents: torch.Tensor) -> torch.Tensor:
    """The model's images of latents, tried twice where memory runs out. Then it raises UserError."""
    try:
        with as_out_of_memory():
            return model.decode(latents)
    except torch.OutOfMemoryError:
        pass
    release_memory()
    try:
        with as_out_of_memory():
            return model.decode(latents)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory while pictures are decoded: {first_sentence(error)}") from error


def resolve_micro_batch(micro_batch: int | Literal["auto"], fixed: bool = False) -> MicroBatch:
    return MicroBatch(AUTO_MICRO_BATCH if micro_batch == "auto" else micro_batch, fixed)
