"""The two passes on the CPU: C++ where a compiler is found (velocity.cpp), tiles of torch ops otherwise.

Extra memory: 7 doubles per 16384 elements for `measure`, the gradient itself for `velocity_grad`.
"""

import torch

from ..native import build
from ..native.problem import Problem
from . import tiles
from .stats import compute_dtype, summarize


def measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, adaptive_weighting):
    lib = build.library()
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    if lib is None:
        sums = tiles.measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale)
    else:
        problem = Problem(
            seed, policy=policy, old=old, ref_cond=ref_cond, ref_uncond=ref_uncond, x0=x0, noise=noise
        )
        partial = torch.empty(problem.batch, problem.chunks(lib), 7, dtype=torch.float64)
        double, threads = dtype == torch.float64, problem.threads(lib)
        lib.crd_measure(problem.words, guidance_scale, double, partial.data_ptr(), threads)
        sums = partial[:, 0].clone()
        for chunk in range(1, partial.shape[1]):
            sums += partial[:, chunk]
        sums = sums.T
    return summarize(sums, policy.shape[1:].numel(), ref_cond is not None, adaptive_weighting, dtype)


def velocity_grad(policy, ref_cond, ref_uncond, x0, noise, seed, c1, c2, guidance_scale):
    lib = build.library()
    gradient = torch.empty_like(policy)
    if lib is None:
        tiles.velocity_grad(gradient, policy, ref_cond, ref_uncond, x0, noise, seed, c1, c2, guidance_scale)
        return gradient
    problem = Problem(
        seed, policy=policy, ref_cond=ref_cond, ref_uncond=ref_uncond, x0=x0, noise=noise, out=gradient
    )
    double = compute_dtype(policy, ref_cond, ref_uncond, x0, noise) == torch.float64
    c1, c2 = c1.double().contiguous(), c2.double().contiguous()
    threads = problem.threads(lib)
    lib.crd_gradient(problem.words, guidance_scale, double, c1.data_ptr(), c2.data_ptr(), threads)
    return gradient
