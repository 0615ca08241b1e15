"""What the forwards of a plan take: each kind is run once, and its bytes and operations are remembered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from crd_fast.plan.live_bytes import GEMM_4BIT, Peak

if TYPE_CHECKING:
    from crd_fast.plan.planner import Planner


class ForwardAccount:
    """Enters every forward of the model: in which phase it is, to which part its tensors belong.

    A forward without gradient that was run before, with as many samples and the same layers, is not run
    again: its peak and its FLOPs are remembered. Nor is a second one with gradient.
    """

    def __init__(self, planner: Planner):
        self.planner, self.live = planner, planner.live
        self.velocity, self.use = planner.model.velocity, planner.weights.use
        self.fetch = planner.model.streaming.fetch if planner.model.streaming else None
        self.active: str | tuple[str, ...] = "policy"  # or the name of each row
        self.samples: Counter[str] = Counter()  # by set of weights
        self.held: dict[str, int] = {}  # bytes of latents at the policy's first forward, by phase
        self._before_gradient: int | None = None  # FLOPs

    @contextmanager
    def use_of(self, name: str) -> Iterator[None]:
        self.active = name
        with self.use(name):
            yield
        self.active = "policy"

    @contextmanager
    def use_rows_of(self, names: list[str]) -> Iterator[None]:
        self.active = tuple(names)
        with type(self.planner.weights).use_rows(self.planner.weights, names):
            yield
        self.active = "policy"

    def fetch_of(self, index: int):
        with self.live.in_part("base weights"):
            return self.fetch(index)

    def velocity_of(self, x, sigma, embeddings):
        gradient = torch.is_grad_enabled()
        self.samples.update(self.active if isinstance(self.active, tuple) else {self.active: len(x)})
        if self.live.phase in ("measure", "update"):
            self.live.phase = "update" if gradient else "measure"
        of_prompts = sum(value.nbytes for value in embeddings.values())  # of one micro-batch at a time
        if self.active == "policy" and self.live.phase not in self.held:
            self.held[self.live.phase] = self.live.live["latents"] - of_prompts
        if isinstance(self.active, tuple) and "policy" in self.active:
            # of two micro-batches: what both hold before, and what the first holds when it is measured
            held = self.live.live["latents"] - of_prompts
            first = self.held.setdefault(self.live.phase, held)
            self.held[self.live.phase] = first + 2 * (held - first)
        run = self._with_gradient if gradient else self._without_gradient
        return run(x, sigma, embeddings)

    def _with_gradient(self, x, sigma, embeddings):
        flops = self.planner.flops
        if self._before_gradient is not None:
            flops.total += flops.total - self._before_gradient
            with self.planner.mode:
                return torch.empty(x.shape).requires_grad_()
        self._before_gradient = flops.total
        with self.live.in_part("activations"):
            result = self.velocity(x, sigma, embeddings)
        self.live.part = "workspace"  # of the backward pass, which comes next
        return result

    def _layers(self):
        """Adapted or not, or both in rows."""
        return self.active if isinstance(self.active, tuple) else self.active == "reference"

    def _without_gradient(self, x, sigma, embeddings):
        planner, live, key = self.planner, self.live, (self._layers(), len(x))
        if key in planner.forwards:
            peak, flops, shape, dtype = planner.forwards[key]
            live.note(peak)
            planner.flops.total += flops
            with planner.mode:
                return torch.empty(shape, dtype=dtype)
        before, flops, kept = live.total, planner.flops.total, live.peaks.get(live.phase, Peak())
        live.peaks[live.phase] = Peak()
        with live.in_part("workspace"):
            result = self.velocity(x, sigma, embeddings)
        live.move(result, "latents")
        peak = live.peaks[live.phase]
        live.peaks[live.phase] = max(kept, peak, key=lambda p: p.bytes)
        # tables that the model made at its first forward stay, and are no part of the next one
        stays = live.total - before - result.untyped_storage().nbytes()
        of_it = peak.bytes - before - stays
        planner.forwards[key] = of_it, planner.flops.total - flops, result.shape, result.dtype
        return result


@contextmanager
def accounted(planner: Planner) -> Iterator[ForwardAccount]:
    """Within this context forwards go through a `ForwardAccount`."""
    account = ForwardAccount(planner)
    planner.model.velocity, planner.weights.use = account.velocity_of, account.use_of
    streaming = planner.model.streaming
    if streaming:
        planner.weights.use_rows, streaming.fetch = account.use_rows_of, account.fetch_of
    try:
        yield account
    finally:
        del planner.model.velocity, planner.weights.use
        if streaming:
            del planner.weights.use_rows, streaming.fetch


class Flops(TorchDispatchMode):
    """Counts floating point operations of matrix products, convolutions and attention."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
