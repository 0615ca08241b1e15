"""Frozen linear layers in 8 or 4 bits (bitsandbytes), on a GPU or the CPU.

Every linear layer inside the network's blocks is replaced; what lies outside them (embedders of image, text
and time, the last norm and projection) stays, as do norms. diffusers' own loader does the same, but refuses
to without a GPU.
"""

from __future__ import annotations

import re

import bitsandbytes as bnb
import torch
from torch import nn


def quantized_layers(network: nn.Module, keep: tuple[str, ...] = ()) -> list[str]:
    """Names of the linear layers that `quantize` replaces: those in numbered blocks, except under `keep`."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and re.match(r"\w+\.\d+\.", name)
        and not any(name == kept or name.startswith(f"{kept}.") for kept in keep)
    ]


def quantize(
    network: nn.Module, kind: str, dtype: torch.dtype, device: torch.device, keep: tuple[str, ...] = ()
) -> None:
    """Replaces linear layers by ones with `int8` or `nf4` weights on `device`, one at a time.

    dtype: of the layers' computation.
    """
    make = {"int8": _int8, "nf4": _nf4}[kind]
    for name in quantized_layers(network, keep):
        parent, _, child = name.rpartition(".")
        parent = network.get_submodule(parent)
        layer = make(getattr(parent, child), dtype, device)
        # bitsandbytes' 4-bit layer, in eval mode on a CPU with AVX512-BF16, repacks its weights for a
        # product without gradient and then uses that one where there should be a gradient, too
        layer.train()
        setattr(parent, child, layer)


def empty_nf4(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """A 4-bit layer in the place of `layer`, still without weight and bias."""
    return bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )


def _nf4(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    new = empty_nf4(layer, dtype)
    new.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
    ).to(device)
    return _with_bias(new, layer, device)


def _int8(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    new = Int8Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        device="meta",
    )
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.to(device, torch.float16))
    new.weight = nn.Parameter(codes, requires_grad=False)
    new.register_buffer("scale", scale)
    new.compute_dtype = dtype
    return _with_bias(new, layer, device)


def _with_bias(new: nn.Module, layer: nn.Linear, device: torch.device) -> nn.Module:
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return new


class Int8Linear(bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer, its weights widened for the product instead of its inputs narrowed.

    Its own product quantizes the inputs, where outliers couple the samples of a batch, and keeps them for the
    backward pass out of reach of activation checkpointing. A group must be the same at any micro-batch.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Int8Product.apply(x, self.weight, self.scale, self.bias, self.compute_dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T + b with W = codes * scale / 127, a scale for each row. Only x has a gradient."""

    @staticmethod
    def forward(ctx, x, codes, scale, bias, dtype):
        ctx.save_for_backward(codes, scale)
        ctx.input_dtype = x.dtype
        bias = bias if bias is None else bias.to(dtype)
        return nn.functional.linear(x.to(dtype), _widened(codes, scale, dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        codes, scale = ctx.saved_tensors
        product = gradient @ _widened(codes, scale, gradient.dtype)
        return product.to(ctx.input_dtype), None, None, None, None


def _widened(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.to(dtype) * (scale / 127).to(dtype)[:, None]
