"""Interpolation on the CPU: C++ where a compiler is found (interpolate.cpp), sample by sample otherwise."""

import torch

from ..native import build
from ..native.problem import Problem
from . import reference


def interpolate(x0, sigma, noise, seed, dtype):
    out = torch.empty(x0.shape, dtype=dtype, device="cpu")
    lib = build.library()
    if lib is None:
        for b in range(x0.shape[0]):
            one = slice(b, b + 1)
            eps, own = (None if t is None else t[one] for t in (noise, seed))
            out[one] = reference.interpolate(x0[one], sigma[one], eps, own, dtype)
        return out
    tensors = (None, None, None, None, x0, noise, None, out)
    problem, sigma = Problem(tensors), sigma.double().contiguous()
    seed = None if seed is None else seed.contiguous()
    double = torch.float64 in (x0.dtype, None if noise is None else noise.dtype)
    lib.crd_interpolate(problem.words(tensors, seed), sigma.data_ptr(), double, torch.get_num_threads())
    return out
