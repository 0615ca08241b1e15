"""The two passes on the CPU: C++ where a compiler is found (velocity.cpp), tiles of torch ops otherwise.

Extra memory: 7 doubles per 16384 elements for `measure`, the gradient itself for `velocity_grad`.
"""

import torch

from ..native import build
from ..native.problem import Problem
from . import tiles
from .stats import ROWS, compute_dtype, summarize


def measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, adaptive_weighting, mix):
    lib = build.library()
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    if lib is None:
        sums = tiles.measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, mix)
        return summarize(sums, policy.shape[1:].numel(), ref_cond is not None, adaptive_weighting, dtype)
    problem = Problem(
        seed, policy=policy, old=old, ref_cond=ref_cond, ref_uncond=ref_uncond, x0=x0, noise=noise
    )
    partial = torch.empty(problem.batch, problem.chunks(lib), 7, dtype=torch.float64)
    table = torch.empty(ROWS, problem.batch, dtype=dtype)
    lib.crd_measure(
        problem.words,
        guidance_scale,
        mix,
        adaptive_weighting,
        dtype == torch.float64,
        partial.data_ptr(),
        table.data_ptr(),
        problem.threads(lib),
    )
    return table


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
