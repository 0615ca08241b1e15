"""Noise by seed and interpolation in Triton. The numbers are those of reference.py and native/philox.h."""

import torch
import triton
import triton.language as tl

from .. import launch
from ..problem import compute_dtype


@triton.jit
def load_latent(pointer, strides, sizes, sample, begin, lane, mask, WIDE: tl.constexpr, ACC: tl.constexpr):
    """Elements begin + lane of one sample in the compute type; masked lanes are 0."""
    return tl.load(pointer + offsets(strides, sizes, sample, begin, lane, WIDE), mask, other=0.0).to(ACC)


@triton.jit
def store_latent(pointer, strides, sizes, sample, begin, lane, mask, value, WIDE: tl.constexpr):
    """Rounds to the tensor's dtype; float64 reaches a 16-bit one by way of float32, as all targets can."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    where = pointer + offsets(strides, sizes, sample, begin, lane, WIDE)
    tl.store(where, value.to(pointer.dtype.element_ty), mask)


@triton.jit
def offsets(strides, sizes, sample, begin, lane, WIDE: tl.constexpr):
    """Where elements begin + lane of a sample lie: strides = (batch, inner...), sizes = inner sizes."""
    DIMS: tl.constexpr = len(sizes)
    base = sample.to(tl.int64) * strides[0]
    if DIMS == 1:
        base += begin * strides[1]
        inner = (lane.to(tl.int64) if WIDE else lane) * strides[1]
    else:
        index = begin + lane if WIDE else begin.to(tl.int32) + lane
        inner = index * 0
        for i in tl.static_range(DIMS - 1):
            inner += (index % sizes[DIMS - 1 - i]) * strides[DIMS - i]
            index = index // sizes[DIMS - 1 - i]
        inner += index * strides[1]
    return base + inner


@triton.jit
def seeded_noise(seed, sample, begin, BLOCK: tl.constexpr):
    """Normals of elements begin + [0, BLOCK) of one sample, float32; begin is a multiple of 4.

    Word w of counter i is element 4 i + w: two joins put the four words of a counter side by side.
    """
    counter = begin // 4 + tl.arange(0, BLOCK // 4)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed + sample), low, high, low * 0, low * 0)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def box_muller(first, second):
    """sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v) with u and v = ((word >> 8) + 1/2) 2^-24."""
    u = ((first >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    v = ((second >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    # ln u: u = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1) / (m + 1)). The approximate
    # logarithm of GPUs has no correct digit near u = 1.
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    series = q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9))))
    log = exponent.to(tl.float32) * 0.69314718056 + 2.0 * (s + s * series)
    radius = tl.sqrt(-2.0 * log)
    # cos and sin of 2 pi v: reduced to an eighth of a turn, then Taylor's series.
    quadrant = (v * 4.0 + 0.5).to(tl.int32)
    x = (v - quadrant.to(tl.float32) * 0.25) * 6.28318530718
    q = x * x
    sine = x * (1.0 + q * (-1.0 / 6 + q * (1.0 / 120 + q * (-1.0 / 5040 + q * (1.0 / 362880)))))
    cosine = 1.0 + q * (-0.5 + q * (1.0 / 24 + q * (-1.0 / 720 + q * (1.0 / 40320))))
    swap = (quadrant & 1) != 0
    a, b = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    a = tl.where(((quadrant + 1) & 2) != 0, -a, a)
    b = tl.where((quadrant & 2) != 0, -b, b)
    return radius * a, radius * b


# x_sigma = (1 - sigma) x0 + sigma noise
#
# One program per block of a sample: one read of x0 (and of noise, or none with a seed), one write.
@triton.jit
def interpolate_kernel(
    out,
    x0,
    noise,  # or None
    seed,  # (B,) int64, or None
    sigma,  # (B,)
    out_strides,
    x0_strides,
    noise_strides,
    sizes,
    numel,
    chunks,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    begin = chunk.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - begin
    clean = load_latent(x0, x0_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    if seed is None:
        eps = load_latent(noise, noise_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    else:
        eps = seeded_noise(seed, sample, begin, BLOCK).to(ACC)
    level = tl.load(sigma + sample).to(ACC)
    result = (1.0 - level) * clean + level * eps
    store_latent(out, out_strides, sizes, sample, begin, lane, mask, result, WIDE)


def interpolate(x0, sigma, noise, seed, dtype):
    out = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    dtype = compute_dtype(x0, noise)
    strides, sizes, wide, far = launch.operands([out, x0, noise])
    elements, numel = launch.block(dtype, far), out.shape[1:].numel()
    chunks = triton.cdiv(numel, elements)
    constants = (wide, tl.float64 if dtype == torch.float64 else tl.float32, elements)
    grid, options = (out.shape[0] * chunks,), launch.options(dtype)
    run = launch.Launcher(interpolate_kernel, grid, out.device, constants, **options)
    seed = None if seed is None else seed.contiguous()
    run(out, x0, noise, seed, sigma.contiguous(), *strides, sizes, numel, chunks)
    return out
