"""What a forward saves for its backward pass waits in host memory until then."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks

from crd_fast.models.streaming import SMALLEST, Pinned


class OnHost(saved_tensors_hooks):
    """Within this context what autograd saves goes to the host, and comes back when the backward pass asks.

    With checkpointed blocks that is their inputs: hooks outside a block see nothing of its inside. Weights,
    which are kept anyway, and small tensors stay. The copies are in the order of the stream that computes, so
    that nothing waits for them but what comes after. bytes: how much went to the host. pinned: where to, of
    all that is kept at a time, as its pieces are large.
    """

    def __init__(self, network: torch.nn.Module, pinned: Pinned):
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.bytes = 0

        def pack(tensor: torch.Tensor):
            if tensor.nbytes < SMALLEST or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            self.bytes += tensor.nbytes
            if tensor.is_cuda:
                return tensor.device, pinned.copy(tensor, non_blocking=True)
            return tensor.device, tensor.to("cpu", copy=True)

        def unpack(saved):
            if isinstance(saved, torch.Tensor):
                return saved
            device, copy = saved
            return copy.to(device, non_blocking=True)

        super().__init__(pack, unpack)
