"""What the losses beside CRD need of a sample on its own, for the launch on B scalars (finish/triton.py)."""

import triton
import triton.language as tl

from ..centering.triton import wide


@triton.jit
def matching(error, sigma, sample, there, WEIGHTING: tl.constexpr):
    """AWM's weighed matching error g(e, t) and its derivative with respect to e."""
    if WEIGHTING == 0:
        return error, tl.full(error.shape, 1.0, tl.float64)
    else:
        t = wide(sigma, sample, there)
        if WEIGHTING == 1:
            return t * error, t
        elif WEIGHTING == 2:
            return t * t * error, t * t
        elif WEIGHTING == 3:
            root = tl.sqrt(error + 1e-10)
            return t * (root - 1e-5), t / (2 * root)
        else:
            root = tl.sqrt(tl.sqrt(error + 1e-10))
            return 4 * t * (root - 0.0031622776601683794), t * root / (error + 1e-10)
