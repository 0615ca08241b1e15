"""The two passes on the CPU: C++ where a compiler is found (velocity.cpp), tiles of torch ops otherwise.

Extra memory: 7 doubles per 16384 elements for `measure`, the gradient itself for `velocity_grad`.
"""

import ctypes

import torch

from .. import layout
from . import build, tiles
from .stats import compute_dtype, summarize

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def measure(policy, old, ref_cond, ref_uncond, x0, noise, guidance_scale, adaptive_weighting):
    lib = build.library()
    double = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise) == torch.float64
    batch, numel = policy.shape[0], policy[0].numel()
    if lib is None:
        sums = tiles.measure(policy, old, ref_cond, ref_uncond, x0, noise, guidance_scale)
    else:
        chunks = -(-numel // lib.crd_chunk())
        partial = torch.empty(batch, chunks, 7, dtype=torch.float64)
        problem, _keep = _problem(batch, numel, [policy, old, ref_cond, ref_uncond, x0, noise, None])
        threads = min(torch.get_num_threads(), batch * chunks)
        lib.crd_measure(problem, guidance_scale, double, partial.data_ptr(), threads)
        sums = partial[:, 0].clone()
        for chunk in range(1, chunks):
            sums += partial[:, chunk]
        sums = sums.T
    dtype = torch.float64 if double else torch.float32
    return summarize(sums, numel, ref_cond is not None, adaptive_weighting, dtype)


def velocity_grad(policy, ref_cond, ref_uncond, x0, noise, c1, c2, guidance_scale):
    lib = build.library()
    gradient = torch.empty_like(policy)
    if lib is None:
        tiles.velocity_grad(gradient, policy, ref_cond, ref_uncond, x0, noise, c1, c2, guidance_scale)
        return gradient
    double = compute_dtype(policy, ref_cond, ref_uncond, x0, noise) == torch.float64
    batch, numel = policy.shape[0], policy[0].numel()
    problem, _keep = _problem(batch, numel, [policy, None, ref_cond, ref_uncond, x0, noise, gradient])
    c1, c2 = c1.double().contiguous(), c2.double().contiguous()
    threads = min(torch.get_num_threads(), batch * -(-numel // lib.crd_chunk()))
    lib.crd_gradient(problem, guidance_scale, double, c1.data_ptr(), c2.data_ptr(), threads)
    return gradient


def _problem(batch, numel, operands):
    """The C++ struct Problem as 64-bit words, and the tensors that its pointers point into."""
    operands, sizes, strides = layout.collapse(operands)
    words = []
    for operand, inner in zip(operands, strides):
        if operand is None:
            words += [0] * (3 + layout.DIMS)
        else:
            words += [operand.data_ptr(), _DTYPES[operand.dtype], operand.stride(0), *inner]
    words += [batch, *sizes, numel]
    return (ctypes.c_int64 * len(words))(*words), operands
