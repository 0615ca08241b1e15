"""The two passes on the CPU: C++ where a compiler is found (velocity.cpp), tiles of torch ops otherwise.

Extra memory: 7 doubles per 16384 elements for `measure`, the gradient itself for `velocity_grad`.
"""

import torch

from ..native import build
from ..native.problem import Problem
from . import tiles
from .stats import compute_dtype, summarize


def measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, adaptive_weighting, mix):
    lib = build.library()
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    if lib is None:
        sums = tiles.measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, mix)
    else:
        problem = Problem(
            seed, policy=policy, old=old, ref_cond=ref_cond, ref_uncond=ref_uncond, x0=x0, noise=noise
        )
        partial = torch.empty(problem.batch, problem.chunks(lib), 7, dtype=torch.float64)
        double, threads = dtype == torch.float64, problem.threads(lib)
        lib.crd_measure(problem.words, guidance_scale, mix, double, partial.data_ptr(), threads)
        sums = partial[:, 0].clone()
        for chunk in range(1, partial.shape[1]):
            sums += partial[:, chunk]
        sums = sums.T
    return summarize(sums, policy.shape[1:].numel(), ref_cond is not None, adaptive_weighting, dtype)


def velocity_grad(policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale):
    lib = build.library()
    gradient = torch.empty_like(policy)
    if lib is None:
        tiles.velocity_grad(
            gradient, policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale
        )
        return gradient
    problem = Problem(
        seed,
        policy=policy,
        old=old,
        ref_cond=ref_cond,
        ref_uncond=ref_uncond,
        x0=x0,
        noise=noise,
        out=gradient,
    )
    double = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise) == torch.float64
    scales = [None if c is None else c.double().contiguous() for c in (c1, c2, c3)]
    pointers = [None if c is None else c.data_ptr() for c in scales]
    lib.crd_gradient(problem.words, guidance_scale, double, *pointers, problem.threads(lib))
    return gradient
