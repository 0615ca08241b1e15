"""Bytes of live tensors by phase and part: predicted on fake tensors, measured on real ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GEMM_4BIT = "bitsandbytes::gemm_4bit"


@dataclass
class Peak:
    """The most bytes that lived at once, and of what."""

    bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class LiveBytes(TorchDispatchMode):
    """Within this context every tensor that an operator returns is counted until its storage is freed.

    Fake and real tensors alike, views once. A storage belongs to the part that is current when it is first
    seen (`in_part`), until it is moved to another (`move`). `peaks[phase]` is the peak while `phase` was
    current. What is allocated inside an operator's kernel is not seen, but for 4-bit products, whose wide
    copy of the weight is added where they run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.part = "", "workspace"
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, Peak] = {}
        self._storages: dict[int, tuple[str, int]] = {}  # part and size by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three calls: here, a fifth of a plan's time less
        result = func(*args, **(kwargs or {}))
        self.add(result)
        if func.namespace == "bitsandbytes" and func.name() == GEMM_4BIT:
            self.note({"workspace": prod(args[2]) * args[0].element_size()})
        return result

    @contextmanager
    def in_part(self, name: str) -> Iterator[None]:
        """Within this context new tensors belong to the part `name`."""
        before, self.part = self.part, name
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """Within this context peaks are those of the phase `name`."""
        before, self.phase = self.phase, name
        self.note()
        try:
            yield
        finally:
            self.phase = before

    def add(self, tensors: Any) -> None:
        """Counts the tensors in a nest of lists and dicts, those seen before not again."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        self.note()

    def move(self, tensors: Any, part: str) -> None:
        """From now on the tensors belong to the part `part`. Counts those that were not yet."""
        self.add(tensors)
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                before, size = self._storages[key]
                self._storages[key] = part, size
                self.live[before] -= size
                self.live[part] += size

    def release(self, tensors: Any) -> None:
        """Counts these tensors no more: they have left the device."""
        for tensor in tree_leaves(tensors):
            self._forget(tensor.untyped_storage()._cdata)

    def ignore(self, tensors: Any) -> None:
        """Never counts these tensors, nor what operators return of them: they are on the host."""
        self.add(tensors)
        for tensor in tree_leaves(tensors):
            key = tensor.untyped_storage()._cdata
            part, size = self._storages[key]
            self._storages[key] = part, 0
            self.live[part] -= size
            self.total -= size

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = self.part, size
        self.live[self.part] += size
        self.total += size
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key, ("", 0))
        self.live[part] -= size
        self.total -= size

    def note(self, inside: Mapping[str, int] = MappingProxyType({})) -> None:
        """Remembers the present if it is the phase's peak. inside: bytes by part that were not counted."""
        peak = self.peaks.setdefault(self.phase, Peak())
        total = self.total + sum(inside.values())
        if total > peak.bytes:
            parts = {part: self.live[part] + inside.get(part, 0) for part in {**self.live, **inside}}
            self.peaks[self.phase] = Peak(total, {part: size for part, size in parts.items() if size})


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside 4-bit weights."""
    tensors = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
            state = state.state2
    return tensors
