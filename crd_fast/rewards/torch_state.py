"""What torch keeps for the whole process, which a reward may change for all that comes after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _matmul_precision() -> str | None:
    """The precision of float32 matmuls. None if set in both of torch's ways: it then tells neither."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def _cudnn_benchmark() -> bool:
    return torch.backends.cudnn.benchmark


def _set_cudnn_benchmark(on: bool) -> None:
    torch.backends.cudnn.benchmark = on


KEPT: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (_matmul_precision, _set_matmul_precision),
    (_cudnn_benchmark, _set_cudnn_benchmark),
)


class TorchState:
    """Whether there are gradients, the default dtype and device, how many threads, whether algorithms are
    deterministic or the fastest of cuDNN's, the precision of float32 products: as they are now."""

    def __init__(self) -> None:
        self._values = [get() for get, _ in KEPT]

    def put_back(self) -> None:
        for (get, put), value in zip(KEPT, self._values):
            if get() != value:
                put(value)


@contextmanager
def torch_state_kept() -> Iterator[None]:
    """At the end of this context all of it is as it was at the beginning."""
    state = TorchState()
    try:
        yield
    finally:
        state.put_back()
