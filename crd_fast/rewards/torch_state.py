"""What torch keeps for the whole process, which a reward may change for all that comes after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

KEPT: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
)


class TorchState:
    """Whether there are gradients, the default dtype and device, how many threads, whether algorithms are
    deterministic: as they are now."""

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
