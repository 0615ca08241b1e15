"""The C++ struct Problem (latents.h), packed from tensors."""

import ctypes

import torch

from .. import layout

# The codes of latents.h.
DTYPES = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float64: 3,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.bool: 9,
}
OPERANDS = 8  # policy, old, ref_cond, ref_uncond, x0, noise, mask, out
WORDS = 3 + layout.DIMS  # of an operand


class Problem:
    """One layout: everything but the tensors' addresses, which `words` fills in."""

    def __init__(self, tensors):
        """tensors: the OPERANDS, of one shape (B, ...), or None."""
        sizes, strides = layout.collapse(tensors)
        given = next(t for t in tensors if t is not None)
        batch, numel = given.shape[0], given.shape[1:].numel()
        pad = layout.DIMS - len(sizes)
        words = []
        for operand, inner in zip(tensors, strides):
            if operand is None:
                words += [0] * WORDS
            else:
                words += [0, DTYPES[operand.dtype], operand.stride(0), *[0] * pad, *inner]
        words += [0, batch, *[1] * pad, *sizes, numel]
        self._type = ctypes.c_int64 * len(words)
        self._template = self._type(*words)
        self._places = [(WORDS * i, i) for i, t in enumerate(tensors) if t is not None]

    def words(self, tensors, seed):
        """The struct for these tensors, which the caller keeps alive; seed: (B,) int64 contiguous, or None"""
        words = self._type.from_buffer_copy(self._template)
        for place, index in self._places:
            words[place] = tensors[index].data_ptr()
        if seed is not None:
            words[WORDS * OPERANDS] = seed.data_ptr()
        return words
