"""Interpolation as a registered operator. Arguments arrive checked and `impl` is never "auto"."""

import importlib

import torch
from torch import Tensor

from ..registration import fake, register


@register
def interpolate_op(
    x0: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, dtype: torch.dtype, impl: str
) -> Tensor:
    """(1 - sigma) x0 + sigma noise, in `dtype`."""
    return importlib.import_module(f".{impl}", __package__).interpolate(x0, sigma, noise, seed, dtype)


@fake("interpolate")
def _(x0, sigma, noise, seed, dtype, impl):
    return x0.new_empty(x0.shape, dtype=dtype)
