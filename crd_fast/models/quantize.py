"""Frozen linear layers in 8 or 4 bits (bitsandbytes), on a GPU or the CPU.

Every linear layer inside the network's blocks is replaced; what lies outside them (embedders of image, text
and time, the last norm and projection) stays, as do norms. diffusers' own loader does the same, but refuses
to without a GPU.
"""

from __future__ import annotations

import copy
import re
from typing import Any

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
    network: nn.Module,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    keep: tuple[str, ...] = (),
    home: torch.device | None = None,
) -> None:
    """Replaces linear layers by ones with `int8` or `nf4` weights, one at a time, quantized on `device`.

    dtype: of the layers' computation; home: where their weights go, by default `device`.
    """
    make = {"int8": _int8, "nf4": _nf4}[kind]
    for name in quantized_layers(network, keep):
        above, _, child = name.rpartition(".")
        parent = network.get_submodule(above)
        layer = make(getattr(parent, child), dtype, device)
        if home is not None and home != device:
            layer.to(home)
        setattr(parent, child, layer)


def empty_nf4(layer: nn.Linear, dtype: torch.dtype) -> Nf4Linear:
    """A 4-bit layer in the place of `layer`, still without weight and bias."""
    return Nf4Linear(
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
    weight: Any = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
    )
    new.weight = weight.to(device)
    return _with_bias(new, layer, device)


def _int8(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    new = Int8Linear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        device="meta",
    )
    weight = layer.weight.data.to(device, torch.float32)  # bitsandbytes' own goes through float16
    scale = weight.abs().amax(1)
    codes = (weight / scale.clamp(min=1e-30)[:, None] * 127).round().to(torch.int8)
    new.weight = nn.Parameter(codes, requires_grad=False)
    new.register_buffer("scale", scale)
    new.compute_dtype = dtype
    return _with_bias(new, layer, device)


def _with_bias(new: nn.Module, layer: nn.Linear, device: torch.device) -> nn.Module:
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return new


class Nf4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit layer, with all that its backward pass needs saved by autograd.

    Its own product keeps the weights out of reach of activation checkpointing: a block whose weights are on
    the device only while it runs would keep them there. In eval mode on a CPU with AVX512-BF16 it also
    repacks its weights for a product without gradient, and uses that one where there should be a gradient.
    And it returns the dtype of its input, where a plain layer under autocast returns that of its computation:
    after a norm in float32 all would be float32.
    """

    weight: Any  # a parameter with `quant_state`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.weight.quant_state
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        scales = state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code
        return _Nf4Product.apply(x.to(self.compute_dtype), self.weight, bias, state, *scales)


class _Nf4Product(torch.autograd.Function):
    """x W^T + b with W in 4 bits. Only x has a gradient. scales: the tensors of `state` and its `state2`."""

    @staticmethod
    def forward(ctx, x, codes, bias, state, *scales):
        ctx.save_for_backward(codes, *scales)
        ctx.state = state
        return bnb.matmul_4bit(x, codes, state, bias=bias)

    @staticmethod
    def backward(ctx, gradient):
        codes, absmax, code, offset, absmax2, code2 = ctx.saved_tensors
        state = copy.copy(ctx.state)  # its own tensors may be back on the host
        state.absmax, state.code, state.offset, state.state2 = absmax, code, offset, copy.copy(state.state2)
        state.state2.absmax, state.state2.code = absmax2, code2
        wide = bnb.functional.dequantize_4bit(codes.view(-1, 1), state)
        return gradient @ wide.to(gradient.dtype), *[None] * 8


class Int8Linear(bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer, its weights widened for the product instead of its inputs narrowed.

    Its own product quantizes the inputs, where outliers couple the samples of a batch, and keeps them for the
    backward pass out of reach of activation checkpointing. A group must be the same at any micro-batch.
    """

    compute_dtype: torch.dtype

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
