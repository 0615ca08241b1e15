"""The most GPU memory that tensors had, in each phase of a run and at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crd_fast.run.metrics import GPU_PEAK
from crd_fast.run.observer import Observer

PHASES = ("rollout", "rewards", "update", "evaluation", "drift", "guided base")  # none is inside another


class GpuMemory(Observer):
    """Peaks by torch's allocator, which counts without waiting for the GPU. Nothing where there is none.

    What works on the GPU beside a phase counts in it, as rewards do that score while pictures are made.
    """

    def __init__(self) -> None:
        self._most = 0  # bytes
        self._phases: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        if name not in PHASES or not torch.cuda.is_available():
            yield
            return
        self._peak()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            self._phases[name] = max(self._phases.get(name, 0), self._peak())

    def metrics(self) -> dict[str, int]:
        """`gpu_peak_bytes` of the process so far, and `gpu_peak_bytes/PHASE` of phases since the last call.

        {} where there is no GPU.
        """
        if not torch.cuda.is_available():
            return {}
        self._peak()
        sizes = {f"{GPU_PEAK}/{name.replace(' ', '_')}": size for name, size in self._phases.items()}
        self._phases.clear()
        return {GPU_PEAK: self._most} | sizes

    def _peak(self) -> int:
        """Since the last reset."""
        peak = torch.cuda.max_memory_allocated()
        self._most = max(self._most, peak)
        return peak
