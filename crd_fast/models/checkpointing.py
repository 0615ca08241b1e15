"""Activation checkpointing, of all of a network's blocks or of some: less memory for more computing."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from crd_fast.models.streaming import repeated_blocks


def recomputed_blocks(network: nn.Module, share: float) -> list[nn.Module]:
    """The blocks that compute their activations again: the first ones, the number nearest to `share` of all.

    The backward pass begins at the last ones: what those keep is gone before the first are computed again.
    """
    blocks = repeated_blocks(network)
    return blocks[: round(share * len(blocks))]


def enable_checkpointing(network: Any, share: float) -> None:
    """Checkpoints the blocks that `recomputed_blocks` names; at `share` 1 all that diffusers checkpoints.

    Gradients are the same to the bit at any share.
    """
    blocks = repeated_blocks(network)
    kept = set(blocks[len(recomputed_blocks(network, share)) :])

    def run(block: nn.Module, *args: Any) -> Any:
        return block(*args) if block in kept else checkpoint(block.__call__, *args, use_reentrant=False)

    network.enable_gradient_checkpointing(run)
