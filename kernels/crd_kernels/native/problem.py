"""The C++ struct Problem (latents.h), packed from tensors."""

import ctypes

import torch

from .. import layout

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_NAMES = ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise", "out")


class Problem:
    """Holds the words and everything that their pointers point into."""

    def __init__(self, seed=None, **tensors):
        operands, sizes, strides = layout.collapse([tensors.get(name) for name in _NAMES])
        if seed is not None:
            seed = seed.to(torch.int64).contiguous()
        shape = next(t for t in operands if t is not None).shape
        self.batch, self.numel = shape[0], shape[1:].numel()
        words = []
        for operand, inner in zip(operands, strides):
            if operand is None:
                words += [0] * (3 + layout.DIMS)
            else:
                words += [operand.data_ptr(), _DTYPES[operand.dtype], operand.stride(0), *inner]
        words += [0 if seed is None else seed.data_ptr(), self.batch, *sizes, self.numel]
        self.words = (ctypes.c_int64 * len(words))(*words)
        self._keep = operands, seed

    def chunks(self, library):
        """Tasks of one sample, and slots of its partial sums."""
        return -(-self.numel // library.crd_chunk())

    def threads(self, library):
        return min(torch.get_num_threads(), self.batch * self.chunks(library))
