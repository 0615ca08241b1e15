"""Memory that runs out, whoever finds none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ON_THE_HOST = "DefaultCPUAllocator: "  # what torch itself could not have there
# Of what CUDA's libraries, and the driver, allocate beside torch, which may keep all that there is
SAID = (
    ON_THE_HOST,
    "_STATUS_ALLOC_FAILED",
    " error: out of memory",
    "calling `cublasCreate",
    "unable to find an engine to execute this computation",  # cuDNN, of which each wants more than there is
)


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """What is raised inside because memory ran out, as torch.OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(text in str(error) for text in SAID):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
