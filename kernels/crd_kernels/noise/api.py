"""interpolate: the noised latent, from given noise or from one seed per sample."""

import torch
from torch import Tensor

from .. import checks, dispatch, fused
from .ops import interpolate_op


@torch.no_grad()
def interpolate(
    x0: Tensor,  # (B, ...)
    sigma: Tensor,  # (B,) float
    noise: Tensor | None = None,  # (B, ...)
    *,
    seed: Tensor | None = None,  # (B,) int64
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, (B, ...) contiguous in `dtype` (x0's unless given).

    With `seed` instead of noise, standard normal noise comes from a counter-based generator (Philox 4x32-10)
    in the kernel and is never stored; `measure`, `velocity_grad` and `crd_loss` make the same numbers from
    the same seeds. A sample's noise depends on its seed and its size alone, not on the batch. The numbers
    agree between implementations to float32 rounding, and between calls of one to the bit.

    sigma: 0 for clean latents, 1 for noise. Computed in fp32, or fp64 when x0 or noise is, no gradient.
    Raises TypeError or ValueError naming the argument.
    """
    if isinstance(x0, torch.Tensor):
        fused.refuse_transforms("interpolate", x0)
    checks.latents(x0=x0, noise=noise)
    checks.noise_or_seed(noise, seed, x0)
    checks.per_sample("sigma", sigma, x0.shape[0], x0.device)
    dtype = x0.dtype if dtype is None else dtype
    checks.choice("dtype", dtype, checks.FLOATS)
    return interpolate_op(x0, sigma, noise, seed, dtype, dispatch.choose(impl, x0.device))
