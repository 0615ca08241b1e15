"""Names for what a profiler shows: NVTX ranges around phases, forwards and launches, off unless asked for.

    CRD_NVTX=1 nsys profile -t cuda,nvtx -o run crd-fast train --max-iterations 2

asks, as `train.profile: true` does. The ranges are torch's own, so nothing has to be installed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from crd_kernels import launch

from crd_fast.errors import UserError
from crd_fast.run.observer import Observer

SWITCH = "CRD_NVTX"


def start(asked: bool) -> Observer:
    """An observer that makes the ranges where the recipe asks (`asked`) or the environment does.

    Those of launches are the process's: they are turned on with the others, and off where nobody asks.
    Raises UserError where torch has no NVTX, which it has with CUDA or ROCm.
    """
    launch.observer = None
    if not asked and os.environ.get(SWITCH) != "1":
        return Observer()
    try:
        torch.cuda.nvtx.mark("crd-fast")
    except RuntimeError as error:
        wanted = "expected a torch with NVTX, built for CUDA or ROCm"
        raise UserError(f"train.profile, {SWITCH}: {wanted}, got {torch.__version__}") from error
    launch.observer = torch.cuda.nvtx.range
    return Ranges()


class Ranges(Observer):
    """A range around each phase, and one around each forward."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

    def branch(self, name: str, rows: int):
        return self.phase(f"{name} forward")
