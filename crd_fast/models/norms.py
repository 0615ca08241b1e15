"""Norms that return their input's dtype under autocast too, as diffusers' own pipelines have them.

CUDA's autocast runs every norm in float32 and leaves the result so: what follows by promotion, modulations,
queries and keys, would be float32 as well, and an attention that takes half precision only would refuse them.
A norm of half precision computes in float32 inside either way.
"""

from __future__ import annotations

import types

import torch
from torch import nn


def keep_dtypes(network: nn.Module) -> None:
    """From now on every norm of the network returns the dtype of its input."""
    from diffusers.models.normalization import RMSNorm

    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, RMSNorm)):
            # a method: to torch.compile the same code in every block, as a partial is not
            vars(module)["forward"] = types.MethodType(_forward, module)


def _forward(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    plain = type(norm).forward
    if norm.weight is None or norm.weight.dtype == x.dtype:
        with torch.autocast(x.device.type, enabled=False):
            return plain(norm, x)
    return plain(norm, x).to(x.dtype)
