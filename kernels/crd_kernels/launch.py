"""What every Triton launch shares: operands as (pointer, strides), the block, and the device."""

import contextlib
import functools

import torch

from . import dispatch, layout

BLOCK = 2048  # elements of one program; eight a thread are one 128-bit load of bf16


def block(dtype):
    """Elements per program for this compute type: float64 residuals take twice the registers."""
    return BLOCK // 2 if dtype == torch.float64 else BLOCK


def options(elements):
    """Launch options for a block of `elements`: eight elements a thread.

    Without contraction of a * b + c the interpreter and every GPU round alike; the passes wait for memory
    anyway.
    """
    return {"num_warps": max(1, elements // (8 * warp_size())), "enable_fp_fusion": False}


@functools.cache
def warp_size():
    """Threads of one warp on the GPU at hand: 32, or 64 on AMD's data center GPUs."""
    if dispatch.interpreting():
        return 32
    from triton.runtime import driver

    return driver.active.get_current_target().warp_size


def operands(tensors):
    """tensors of one shape (B, ...), or None.

    Returns (tensors, strides, sizes, wide): per tensor a tuple (batch stride, inner strides...), the inner
    sizes that the strides refer to, and whether offsets inside a sample need 64 bits.
    """
    tensors, sizes, strides = layout.collapse(tensors)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes, strides = sizes[1:], [None if s is None else s[1:] for s in strides]
    reach = [sum((n - 1) * abs(k) for n, k in zip(sizes, s)) for s in strides if s is not None]
    numel = tensors_numel(tensors)
    packed = [None if t is None else (t.stride(0), *s) for t, s in zip(tensors, strides)]
    return tensors, packed, tuple(sizes), max(*reach, numel) >= 2**31 - BLOCK


def tensors_numel(tensors):
    """Elements of one sample."""
    return next(t for t in tensors if t is not None).shape[1:].numel()


def on(device):
    """Context in which a kernel is launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
