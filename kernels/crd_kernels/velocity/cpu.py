"""The two passes on the CPU in C++ (velocity.cpp); without a compiler the definition runs (passes.py).

Extra memory: 8 doubles per 16384 elements for the sums, the gradient itself for `gradient`.
"""

import torch

from ..finish import cpu as finishing
from ..native import build
from ..native.problem import Problem
from ..problem import Kind, Latents, Numbers, Scalars, compute_dtype
from .stats import OUTCOME, ROWS

# What velocity.cpp adds up; the other rows of the table are 0 then, and nobody reads them.
FULL, MIXED, ALONE, PAIR = range(4)


class Passes:
    """The two passes over latents of one layout (crd_kernels/passes.py)."""

    def __init__(self, latents: Latents, scalars: Scalars, kind: Kind):
        self.kind = kind
        self.dtype = compute_dtype(*latents[:6])
        self.double = self.dtype == torch.float64
        self.batch = latents.policy.shape[0]
        self.statistics = ROWS * self.batch * self.dtype.itemsize  # bytes of a table in front of the outcome
        self.reading = Problem([*latents[:6], latents.mask, None])
        self.writing: Problem | None = None  # both made when needed
        self.finish: finishing.Finish | None = None
        self.sums = FULL
        if kind.mixed:
            self.sums = MIXED
        elif kind.method in ("flow_matching", "awm", "dpo"):
            self.sums = ALONE if latents.old is None else PAIR

    def measure(self, latents: Latents, numbers: Numbers):
        return self._measure(latents, numbers, ROWS)

    def forward(self, latents: Latents, scalars: Scalars, numbers: Numbers):
        table = self._measure(latents, numbers, ROWS + OUTCOME)
        if self.finish is None:
            self.finish = finishing.Finish(self.kind, self.batch, self.dtype, scalars)
        return table, self.finish(table, table.data_ptr() + self.statistics, scalars, numbers)

    def _measure(self, latents, numbers, rows):
        *tensors, seed, mask = latents
        seed = None if seed is None else seed.contiguous()
        table = torch.empty((rows, self.batch), dtype=self.dtype, device="cpu")
        build.library().crd_measure(
            self.reading.words((*tensors, mask), seed),
            numbers.guidance_scale,
            numbers.mix,
            self.sums,
            self.kind.adaptive_weighting,
            self.double,
            table.data_ptr(),
            torch.get_num_threads(),
        )
        return table

    def backward(self, latents: Latents, table, upstream, numbers: Numbers):
        c1, row = table.data_ptr() + self.statistics, self.statistics // ROWS
        if upstream.dtype != self.dtype:
            upstream = upstream.to(self.dtype)
        pointers = (c1, c1 + row, c1 + 2 * row if self.kind.old_term else None)
        return self._gradient(latents, pointers, upstream, numbers)

    def gradient(self, latents: Latents, coefficients, numbers: Numbers):
        kept = [None if c is None else c.to(self.dtype).contiguous() for c in coefficients]
        return self._gradient(latents, [None if c is None else c.data_ptr() for c in kept], None, numbers)

    def _gradient(self, latents, pointers, upstream, numbers):
        policy, old, ref_cond, ref_uncond, x0, noise, seed, mask = latents
        seed = None if seed is None else seed.contiguous()
        gradient = torch.empty_like(policy)
        tensors = (
            policy,
            None if pointers[2] is None else old,
            ref_cond,
            ref_uncond,
            x0,
            noise,
            mask,
            gradient,
        )
        if self.writing is None:
            self.writing = Problem(tensors)
        at, stride = None, 0
        if upstream is not None:
            at, stride = upstream.data_ptr(), 0 if upstream.dim() == 0 else upstream.stride(0)
        build.library().crd_gradient(
            self.writing.words(tensors, seed),
            numbers.guidance_scale,
            self.double,
            *pointers,
            at,
            stride,
            torch.get_num_threads(),
        )
        return gradient
