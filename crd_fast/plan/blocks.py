"""Blocks that repeat are run once: what a block takes, one with the same weights and inputs takes too.

A network has tens of equal blocks, and a plan runs each with several sets of weights, forward, again and
backward. By `Blocks` the first of equal ones runs as it is written, and of the others only what can be
seen from outside happens: outputs appear, what autograd would keep is held until the block's backward pass,
hooks run, and the first one's peak and FLOPs are noted above what lives at the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from crd_fast.plan.live_bytes import LiveBytes, Peak

LEAST = 4  # equal blocks: with gradient the first, the second and the last are run


@dataclass
class Span:
    """What a stretch of computing takes above what lives when it begins, and its FLOPs."""

    inside: Mapping[str, int]
    flops: int


@dataclass
class Forward:
    """A block's forward. outputs: of what `tree_flatten` gives, the index of the input that it is, or shape
    and dtype, or something else; kept: bytes that stay, for autograd or in a cache that it was given."""

    span: Span
    outputs: list[Any]
    structure: Any
    kept: int


class Blocks:
    """The repeated blocks of a network, whose `forward` is replaced while a plan is made.

    recomputed: those that are checkpointed. layers: tells sets of weights apart whose layers differ, adapted
    or not. flops: where they are counted.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        mode: FakeTensorMode,
        live: LiveBytes,
        flops: Any,
        recomputed: Collection[nn.Module] = (),
        streamed: bool = False,
    ):
        self.mode, self.live, self.flops = mode, live, flops
        self.layers: Callable[[], object] = lambda: None
        self.forwards: dict[tuple, Forward] = {}
        self.backwards: dict[tuple, Span] = {}
        self._open: tuple[str, Peak] | None = None  # the phase's peak before a span of the backward pass
        self.left: list[torch.Tensor] = []  # by blocks that are not run: keys and values of a text encoder
        self._last: dict[int, tuple[tuple, bool]] = {}  # by block: its recomputation is as its forward was
        signatures = [(block in recomputed, *_signature(block)) for block in blocks]
        counts = Counter(signatures)
        # the backward pass begins at the last, whose weights, where they are streamed, are not there yet; the
        # one before it is what the others are like
        ends = 2 if streamed else 1
        left = Counter(counts)
        for index, (block, signature) in enumerate(zip(blocks, signatures)):
            left[signature] -= 1
            if counts[signature] >= LEAST + ends - 1:
                self._replace(block, index, signature, left[signature] < ends)

    def _replace(self, block: nn.Module, index: int, signature: tuple, last: bool) -> None:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            if torch._C._current_graph_task_id() != -1:  # a checkpointed block's recomputation
                key, replayed = self._last[index]
                if replayed:
                    return self._replayed(block, leaves, key)
                return self._marked(forward, leaves, structure, key)
            gradient = torch.is_grad_enabled()
            key = (signature, self.layers(), gradient, structure, tuple(_described(leaf) for leaf in leaves))
            # a replay of the first block, none of whose inputs needs a gradient, would have none itself
            first = not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
            replayed = key in self.forwards and not (gradient and (first or last))
            self._last[index] = key, replayed
            if replayed:
                return self._replayed(block, leaves, key)
            return self._recorded(forward, leaves, structure, key)

        block.forward = run

    # -- a block that is run ------------------------------------------------------------------------------

    def _recorded(self, forward: Callable, leaves: list, structure: Any, key: tuple) -> Any:
        live, before, flops = self.live, Counter(self.live.live), self.flops.total
        total, kept = live.total, live.peaks.get(live.phase)
        live.peaks[live.phase] = Peak()
        live.note()
        result = self._marked(forward, leaves, structure, key)
        span = Span(_difference(live.peaks[live.phase].parts, before), self.flops.total - flops)
        self._merge(live.phase, kept)
        outputs, of_outputs = tree_flatten(result)
        described = [_output(output, leaves) for output in outputs]
        new = {
            output.untyped_storage()._cdata: output.untyped_storage().nbytes()
            for output, how in zip(outputs, described)
            if isinstance(how, tuple)
        }
        stays = live.total - total - sum(new.values())
        self.forwards[key] = Forward(span, described, of_outputs, max(stays, 0))
        return result

    def _marked(self, forward: Callable, leaves: list, structure: Any, key: tuple) -> Any:
        """The forward, with a mark on either side where its backward pass begins and ends."""
        if not key[2]:
            args, kwargs = tree_unflatten(leaves, structure)
            return forward(*args, **kwargs)
        leaves = _mark(leaves, lambda: self._end(key))
        args, kwargs = tree_unflatten(leaves, structure)
        outputs, of_outputs = tree_flatten(forward(*args, **kwargs))
        return tree_unflatten(_mark(outputs, lambda: self._begin()), of_outputs)

    def _begin(self) -> None:
        self.finish()
        live = self.live
        self._open = live.phase, live.peaks.get(live.phase, Peak())
        self._before = Counter(live.live), self.flops.total
        live.peaks[live.phase] = Peak()
        live.note()

    def _end(self, key: tuple) -> None:
        if self._open is None:
            return
        before, flops = self._before
        inside = _difference(self.live.peaks[self._open[0]].parts, before)
        self.backwards[key] = Span(inside, self.flops.total - flops)
        self.finish()

    def finish(self) -> None:
        """Ends the span of a block whose inputs need no gradient, so that nothing tells its end."""
        if self._open is not None:
            self._merge(*self._open)
            self._open = None

    def _merge(self, phase: str, kept: Peak | None) -> None:
        peaks = self.live.peaks
        if kept is not None:
            peaks[phase] = max(kept, peaks[phase], key=lambda peak: peak.bytes)

    # -- a block that is not ------------------------------------------------------------------------------

    def _replayed(self, block: nn.Module, leaves: list, key: tuple) -> Any:
        done, tensors = self.forwards[key], [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        recomputed = torch._C._current_graph_task_id() != -1
        if not recomputed:  # what is computed again is part of the backward pass
            self.add(done.span)
        if key[2]:
            weights = [weight for weight in block.parameters() if not weight.requires_grad]
            new = list(_Replay.apply(self, key, done, len(tensors), *tensors, *weights))
        else:
            new = self.new_outputs(done)
            if done.kept:
                with self.mode:
                    self.left.append(torch.empty(done.kept, dtype=torch.uint8))
        outputs = [
            new.pop(0) if isinstance(how, tuple) else leaves[how] if isinstance(how, int) else None
            for how in done.outputs
        ]
        return tree_unflatten(outputs, done.structure)

    def new_outputs(self, done: Forward) -> list[torch.Tensor]:
        with self.mode:
            return [torch.empty(how[0], dtype=how[1]) for how in done.outputs if isinstance(how, tuple)]

    def add(self, span: Span) -> None:
        self.live.note(span.inside)
        self.flops.total += span.flops


class _Replay(torch.autograd.Function):
    """The outputs of a block that is not run. Its weights are kept as a block that is run keeps them."""

    @staticmethod
    def forward(ctx, blocks: Blocks, key: tuple, done: Forward, count: int, *tensors: torch.Tensor):
        ctx.blocks, ctx.key, ctx.count = blocks, key, count
        ctx.inputs = [(t.shape, t.dtype, t.requires_grad) for t in tensors[:count]]
        with blocks.mode:
            held = [torch.empty(done.kept, dtype=torch.uint8)] if done.kept else []
        ctx.save_for_backward(*tensors, *held)
        return tuple(blocks.new_outputs(done))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        blocks: Blocks = ctx.blocks
        blocks.finish()
        blocks.add(blocks.backwards[ctx.key])
        held = ctx.saved_tensors  # where blocks are checkpointed this is what runs them again
        with blocks.mode:
            found = [torch.empty(s, dtype=d) if needed else None for s, d, needed in ctx.inputs]
        del held
        return None, None, None, None, *found, *[None] * (len(ctx.needs_input_grad) - 4 - ctx.count)


class _Mark(torch.autograd.Function):
    """Nothing but a call when the gradients of all its outputs are there."""

    @staticmethod
    def forward(ctx, called: Callable[[], None], *tensors: torch.Tensor):
        ctx.called = called
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        ctx.called()
        return None, *gradients


def _mark(leaves: list, called: Callable[[], None]) -> list:
    """The leaves, those with gradient behind a mark."""
    marked = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not marked:
        return leaves
    new = iter(_Mark.apply(called, *marked))
    return [next(new) if any(leaf is other for other in marked) else leaf for leaf in leaves]


def _signature(block: nn.Module) -> tuple:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return type(block), tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)


def _described(leaf: Any) -> object:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.requires_grad
    return leaf if isinstance(leaf, int | float | str | None) else type(leaf)


def _output(output: Any, leaves: list) -> Any:
    if not isinstance(output, torch.Tensor):
        return None
    same = [index for index, leaf in enumerate(leaves) if leaf is output]
    return same[0] if same else (output.shape, output.dtype)


def _difference(parts: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: parts.get(name, 0) - before.get(name, 0) for name in {*parts, *before}}
