"""What every Triton launch shares: compiled handles, operands as (pointer, strides), block, device."""

import contextlib
import functools
import os

import torch

from . import dispatch, layout

BLOCK = 2048  # elements of one program; eight a thread are one 128-bit load of bf16
# A function from a kernel's name to a context around its launch: NVTX ranges with CRD_NVTX=1, or a counter's.
observer = torch.cuda.nvtx.range if os.environ.get("CRD_NVTX") == "1" else None


class Launcher:
    """A kernel with its grid, its compile-time constants and its launch options, for tensors of one layout.

    The first call goes through Triton, which compiles; later ones launch the compiled handle, past Triton's
    own look at every argument. So one Launcher serves only calls whose arguments Triton would specialise
    alike: the same dtypes, the same alignment of pointers to 16 bytes, the same integers.
    """

    def __init__(self, kernel, grid, device, constants, **options):
        self.kernel, self.grid, self.device = kernel, (*grid, *[1] * (3 - len(grid))), device
        self.constants, self.options = tuple(constants), options
        self.handle = None

    def __call__(self, *arguments):
        if observer is not None or self.handle is None or self._elsewhere():
            self._with_care(arguments)
        else:
            self.handle(*arguments, *self.constants)

    def _elsewhere(self):
        """Whether another device is the current one."""
        return self.device.type == "cuda" and self.device.index != torch.cuda.current_device()

    def _with_care(self, arguments):
        with contextlib.ExitStack() as stack:
            if observer is not None:
                stack.enter_context(observer(self.kernel.__name__))
            if self._elsewhere():
                stack.enter_context(torch.cuda.device(self.device))
            if self.handle is not None:
                return self.handle(*arguments, *self.constants)
            from .compiled_files import whole_files  # here: it imports triton

            stack.enter_context(whole_files())
            compiled = self.kernel[self.grid](*arguments, *self.constants, **self.options)
            if compiled is not None:  # None: the interpreter ran it
                self.handle = compiled[self.grid]


def block(dtype, far=False):
    """Elements per program for this compute type: float64 residuals take twice the registers.

    far: of latents with offsets of 64 bits or of many dimensions, which take as many again.
    """
    return BLOCK // (2 if dtype == torch.float64 else 1) // (2 if far else 1)


def options(dtype):
    """Launch options for a block of this compute type: eight elements a thread, four of far ones.

    Without contraction of a * b + c the interpreter and every GPU round alike; the passes wait for memory
    anyway.
    """
    return {"num_warps": max(1, block(dtype) // (8 * warp_size())), "enable_fp_fusion": False}


def registers(most):
    """Launch options that let a thread have this many, where one can say so: one program need not share."""
    return {"maxnreg": most} if target() is not None and target().backend == "cuda" else {}


def warp_size():
    """Threads of one warp on the GPU at hand: 32, or 64 on AMD's data center GPUs."""
    return 32 if target() is None else target().warp_size


@functools.cache
def target():
    """The GPU at hand as Triton names it; None in the interpreter."""
    if dispatch.interpreting():
        return None
    from triton.runtime import driver

    from .compiled_files import whole_files

    with whole_files():  # the driver has a library of its own, compiled and kept like kernels
        return driver.active.get_current_target()


def operands(tensors):
    """tensors of one shape (B, ...), or None.

    Returns (strides, sizes, wide, far): per tensor a tuple (batch stride, inner strides...), the inner sizes
    that the strides refer to, whether offsets inside a sample need 64 bits, and whether the block is to be
    half as large for the registers that finding an element takes.
    """
    sizes, strides = layout.collapse(tensors)
    reach = [sum((n - 1) * abs(k) for n, k in zip(sizes, s)) for s in strides if s is not None]
    numel = next(t for t in tensors if t is not None).shape[1:].numel()
    packed = [None if t is None else (t.stride(0), *s) for t, s in zip(tensors, strides)]
    wide = max(*reach, numel) >= 2**31 - BLOCK
    return packed, tuple(sizes), wide, wide or len(sizes) > 4
