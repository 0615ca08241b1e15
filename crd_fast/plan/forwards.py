"""What the forwards of a plan take: each kind is run once, and its bytes and operations are remembered."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from crd_fast.plan.live_bytes import GEMM_4BIT, Peak
from crd_fast.run.row_counts import BACKWARD, RowCounts, kind_of
from crd_fast.train.velocities import ROWS_IN_ONE

if TYPE_CHECKING:
    from crd_fast.plan.planner import Planner

Embeddings = dict[str, torch.Tensor]


class ForwardAccount(RowCounts):
    """Stands in the place of the model, and is told which weights each forward is by.

    A forward without gradient that was run before, with as many samples and the same layers, is not run
    again: its peak and its FLOPs are remembered. Nor is a second one with gradient.

    row_flops: of one row, by `kind_of` the forward, and `BACKWARD`; passes: how often all blocks are needed,
    for whatever number of rows.
    """

    def __init__(self, planner: Planner):
        super().__init__()
        self.planner, self.live, self.model = planner, planner.live, planner.model
        self.active: list[tuple[str, int]] = []  # sets of weights of the present forward, rows by each
        self.held: dict[str, int] = {}  # bytes of latents at the policy's first forward, by phase
        self.in_rows = False  # the rows of one forward differ in their weights
        self.row_flops: dict[str, float] = {}
        self.passes = 0
        self.graph, self.graphs = 0, 0  # bytes of the first forward with gradient's, how many live at once
        self._going_backward: tuple[int, int] | None = None  # FLOPs before, rows
        self._predicted: Callable[[], torch.Tensor | None] = lambda: None  # by it, while anyone holds that

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)  # what is not a forward is the model's own

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        self.in_rows = name == ROWS_IN_ONE
        yield
        self.in_rows = False

    @contextmanager
    def branch(self, name: str, rows: int) -> Iterator[None]:
        self.active.append((name, rows))
        with super().branch(name, rows):
            yield
        self.active.pop()

    def finish_backward(self) -> None:
        """What was computed since the last forward with gradient was its backward pass."""
        self.planner.blocks.finish()
        if self._going_backward is not None:
            before, rows = self._going_backward
            self.row_flops[BACKWARD] = (self.planner.flops.total - before) / rows
            self._going_backward = None

    def _graph_is_kept(self) -> bool:
        """Whether the first forward with gradient has not gone backward yet."""
        return self._going_backward is not None and self._predicted() is not None

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        if not self._graph_is_kept():
            self.finish_backward()
        gradient = torch.is_grad_enabled()
        self.passes += 2 if gradient else 1  # the backward pass runs a block again, and then uses what it has
        names = [name for name, _ in self.active]
        if self.live.phase in ("measure", "update"):
            self.live.phase = "update" if gradient else "measure"
        of_prompts = sum(value.nbytes for value in embeddings.values())  # of one micro-batch at a time
        if not self.in_rows and names == ["policy"] and self.live.phase not in self.held:
            self.held[self.live.phase] = self.live.live["latents"] - of_prompts
        if self.in_rows and "policy" in names:
            # of two micro-batches: what both hold before, and what the first holds when it is measured
            held = self.live.live["latents"] - of_prompts
            first = self.held.setdefault(self.live.phase, held)
            self.held[self.live.phase] = first + 2 * (held - first)
        run = self._with_gradient if gradient else self._without_gradient
        return run(x, sigma, embeddings)

    def _with_gradient(self, x: torch.Tensor, sigma: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        kind, before = kind_of(self.active[0][0], True), self.planner.flops.total
        if kind in self.row_flops:
            self.graphs += self._graph_is_kept()
            with self.planner.mode:
                return torch.empty(x.shape).requires_grad_()
        with self.live.in_part("activations"):
            result = self.model.velocity(x, sigma, embeddings)
        self.live.part = "workspace"  # of the backward pass, which comes next
        self.graph, self.graphs, self._predicted = self.live.live["activations"], 1, weakref.ref(result)
        self.row_flops[kind] = (self.planner.flops.total - before) / len(x)
        self._going_backward = self.planner.flops.total, len(x)
        return result

    def layers(self) -> object:
        """Adapted or not, or both in rows."""
        return tuple(self.active) if self.in_rows else self.active[0][0] == "reference"

    def _without_gradient(self, x: torch.Tensor, sigma: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        planner, live, key = self.planner, self.live, (self.layers(), len(x))
        if key in planner.forwards:
            inside, flops, shape, dtype = planner.forwards[key]
            live.note({"workspace": inside})
            self._without(flops / len(x))
            with planner.mode:
                return torch.empty(shape, dtype=dtype)
        before, flops, kept = live.total, planner.flops.total, live.peaks.get(live.phase, Peak())
        live.peaks[live.phase] = Peak()
        with live.in_part("workspace"):
            result = self.model.velocity(x, sigma, embeddings)
        live.move(result, "latents")
        peak = live.peaks[live.phase]
        live.peaks[live.phase] = max(kept, peak, key=lambda p: p.bytes)
        # tables that the model made at its first forward stay, and are no part of the next one
        stays = live.total - before - result.untyped_storage().nbytes()
        of_it = peak.bytes - before - stays
        flops = planner.flops.total - flops
        planner.forwards[key] = of_it, flops, result.shape, result.dtype
        self._without(flops / len(x))
        return result

    def _without(self, row_flops: float) -> None:
        """The rows of one forward that differ in their weights share what it computed."""
        for name, _ in self.active:
            self.row_flops[kind_of(name, False)] = row_flops


@contextmanager
def accounted(planner: Planner) -> Iterator[ForwardAccount]:
    """A `ForwardAccount`; within this context blocks that are fetched count as weights."""
    account, streaming = ForwardAccount(planner), planner.model.streaming
    planner.blocks.layers = account.layers
    if not streaming:
        yield account
        return
    fetch = streaming.fetch

    def counted(index: int) -> Any:
        with planner.live.in_part("base weights"):
            return fetch(index)

    vars(streaming)["fetch"] = counted
    try:
        yield account
    finally:
        del vars(streaming)["fetch"]


class Flops(TorchDispatchMode):
    """Counts floating point operations of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif func.name() == GEMM_4BIT:
            self.total += 2 * args[0].numel() * args[2][0]
        return result
