"""Names for what a profiler shows: NVTX ranges around phases and launches, off unless asked for.

    CRD_NVTX=1 nsys profile -t cuda,nvtx -o run crd-fast train --max-iterations 2

asks, as `train.profile: true` does. The ranges are torch's own, so nothing has to be installed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from crd_kernels import launch

from crd_fast.errors import UserError

SWITCH = "CRD_NVTX"
_on = False


def start(asked: bool) -> None:
    """Turns the ranges on where the recipe asks (`asked`) or the environment does, and off elsewhere.

    Raises UserError where torch has no NVTX, which it has with CUDA or ROCm.
    """
    global _on
    _on = asked or os.environ.get(SWITCH) == "1"
    launch.observer = torch.cuda.nvtx.range if _on else None
    if not _on:
        return
    try:
        torch.cuda.nvtx.mark("crd-fast")
    except RuntimeError as error:
        _on, launch.observer = False, None
        wanted = "expected a torch with NVTX, built for CUDA or ROCm"
        raise UserError(f"train.profile, {SWITCH}: {wanted}, got {torch.__version__}") from error


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A range called `name`, as a context or around a function; nothing unless `start` turned ranges on."""
    if not _on:
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
