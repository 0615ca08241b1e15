"""Frozen weights of the blocks that repeat stay in host memory; a block's come to the device when it runs.

Before a block's forward, copies of its weights are put in the place of the host's tensors and the next
block's are sent for; after it the host's are put back. A copy is a tensor of its own: what autograd saved of
it while a checkpointed block is recomputed keeps it alive until the block's backward has used it, and nothing
else does. So at most two blocks are on the device, the present one and the next.

diffusers' group offloading does not serve here: it exchanges the `.data` of every parameter, adapters too,
leaves the scales of 4-bit weights where they are, and sends for blocks in the forward's order alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

SMALLEST = 1 << 16  # bytes; smaller tensors stay on the device, where sending them each time would cost more
SLAB = 1 << 28  # bytes of pinned memory at a time: torch rounds every request up to a power of two


class Streaming:
    """Streams a network's blocks to `device`, and moves everything else of the network there.

    The blocks must be frozen; adapters that are added to them afterwards are left alone. Blocks with gradient
    must be checkpointed, or all their weights stay on the device until the backward pass.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.device = device
        pinned = Pinned() if device.type == "cuda" else None
        self.blocks = [
            [Streamed(place, name, pinned) for place, name in _large_tensors(block)]
            for block in repeated_blocks(network)
        ]
        streamed = {(id(slot.place), slot.name) for block in self.blocks for slot in block}
        for place, name in _tensors(network):
            if (id(place), name) not in streamed:
                place[name] = _moved(place[name], device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, list[torch.Tensor], torch.cuda.Event | None] | None = None
        for index, block in enumerate(repeated_blocks(network)):
            block.register_forward_pre_hook(self._before(index))
            # also where the forward raises, which is how a recomputation ends
            block.register_forward_hook(self._after(index), always_call=True)

    def host_tensors(self) -> list[torch.Tensor]:
        return [slot.host for block in self.blocks for slot in block]

    def fetch(self, index: int) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """Copies of a block's tensors on the device, and on a GPU the event after which they are complete.

        Their memory is the compute stream's, as of any other tensor: what used it before is waited for by
        the copy, and the compute stream waits for the copy before it is used or freed.
        """
        slots = self.blocks[index]
        copies = [torch.empty_like(slot.host, device=self.device) for slot in slots]
        if self._copies is None:
            for copy, slot in zip(copies, slots):
                copy.copy_(slot.host)
            return copies, None
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for copy, slot in zip(copies, slots):
                copy.copy_(slot.host, non_blocking=True)
        return copies, self._copies.record_event()

    def _before(self, index: int):
        @torch.no_grad()
        def put_copies_in_place(block, inputs) -> None:
            copies = self._take(index)
            for slot, copy in zip(self.blocks[index], copies):
                slot.put(copy)
            del copies
            # a forward within a backward pass is the recomputation of a checkpointed block
            following = index - 1 if torch._C._current_graph_task_id() != -1 else index + 1
            if 0 <= following < len(self.blocks):
                self._ahead = following, *self.fetch(following)

        return put_copies_in_place

    def _after(self, index: int):
        def put_host_back(block, inputs, output) -> None:
            for slot in self.blocks[index]:
                slot.put_back()

        return put_host_back

    def _take(self, index: int) -> list[torch.Tensor]:
        """The block's copies: those that were sent for, or, where others were, new ones."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] != index:  # a forward ended before its last block
            self._wait(ahead[2])
            ahead = None
        copies, event = ahead[1:] if ahead is not None else self.fetch(index)
        self._wait(event)
        return copies

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class Streamed:
    """One tensor of a block: its host tensor, and where it is kept, which is the `_parameters` or `_buffers`
    of a module or the attributes of a 4-bit weight's state."""

    def __init__(self, place: dict, name: str, pinned: Pinned | None):
        self.place, self.name = place, name
        if pinned is not None:
            tensor = place[name]
            place[name] = _like(tensor, pinned.copy(_plain(tensor)))
        self.kept = place[name]
        self.host = _plain(self.kept)

    def put(self, copy: torch.Tensor) -> None:
        self.place[self.name] = _like(self.kept, copy)

    def put_back(self) -> None:
        self.place[self.name] = self.kept


class Slabs:
    """Where tensors lie in pieces of memory whose sizes are powers of two. sizes: of the pieces, in bytes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._taken: list[int] = []

    def place(self, size: int) -> tuple[int, int]:
        """Piece and first byte for so many bytes: in the first piece with room, or in a new one."""
        for index, taken in enumerate(self._taken):
            start = -(-taken // 256) * 256
            if start + size <= self.sizes[index]:
                self._taken[index] = start + size
                return index, start
        self.sizes.append(max(SLAB, 1 << max(size - 1, 0).bit_length()))
        self._taken.append(size)
        return len(self.sizes) - 1, 0


def pinned_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What `Pinned` allocates for copies of these tensors, in this order."""
    slabs = Slabs()
    for tensor in tensors:
        slabs.place(tensor.nbytes)
    return sum(slabs.sizes)


class Pinned:
    """Copies of tensors, cut out of large pieces of pinned memory. slabs: which."""

    def __init__(self) -> None:
        self.slabs = Slabs()
        self._pieces: list[torch.Tensor] = []

    def copy(
        self, tensor: torch.Tensor, non_blocking: bool = False, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """dtype: of the copy, by default that of the tensor."""
        dtype = dtype or tensor.dtype
        size = tensor.numel() * dtype.itemsize
        index, start = self.slabs.place(size)
        if index == len(self._pieces):
            self._pieces.append(torch.empty(self.slabs.sizes[index], dtype=torch.uint8, pin_memory=True))
        place = self._pieces[index][start : start + size].view(dtype).view(tensor.shape)
        return place.copy_(tensor, non_blocking=non_blocking)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that repeat, in the order in which they run."""
    return [block for blocks in network.children() if isinstance(blocks, nn.ModuleList) for block in blocks]


def _large_tensors(block: nn.Module) -> Iterator[tuple[dict, str]]:
    for place, name in list(_tensors(block)):
        if place[name].nbytes >= SMALLEST:
            yield place, name


def _tensors(network: nn.Module) -> Iterator[tuple[dict, str]]:
    """Where every tensor is kept: parameters, buffers, and what bitsandbytes has beside 4-bit weights."""
    for module in network.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is None:
                    continue
                state = getattr(tensor, "quant_state", None)
                yield place, name
                while state is not None:
                    attributes = vars(state)
                    yield from ((attributes, key) for key in attributes if _is_tensor(attributes[key]))
                    state = state.state2


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without what bitsandbytes' class of parameters does when it is copied."""
    return tensor.detach().as_subclass(torch.Tensor) if isinstance(tensor, nn.Parameter) else tensor


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` as what `tensor` is: a frozen parameter, with the state of a 4-bit weight, or a tensor."""
    if not isinstance(tensor, nn.Parameter):
        return value
    parameter = nn.Parameter(value, requires_grad=False)
    if hasattr(tensor, "quant_state"):
        parameter.quant_state = tensor.quant_state  # type: ignore[attr-defined]
    return parameter


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if tensor.device == device else _like(tensor, _plain(tensor).to(device))
