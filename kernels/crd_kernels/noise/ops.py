"""Interpolation as a registered operator. Arguments arrive checked and `impl` is never "auto"."""

import importlib

import torch
from torch import Tensor
from torch.library import custom_op


@custom_op("crd_kernels::interpolate", mutates_args=())
def interpolate_op(
    x0: Tensor, sigma: Tensor, noise: Tensor | None, seed: Tensor | None, dtype: torch.dtype, impl: str
) -> Tensor:
    """(1 - sigma) x0 + sigma noise, in `dtype`."""
    return importlib.import_module(f".{impl}", __package__).interpolate(x0, sigma, noise, seed, dtype)


@interpolate_op.register_fake
def _(x0, sigma, noise, seed, dtype, impl):
    return x0.new_empty(x0.shape, dtype=dtype)
