"""The two passes in Triton, for GPUs: 6 reads an element, then 5 reads and 1 write."""

import torch
import triton
import triton.language as tl

from .. import launch
from ..noise.triton import load_latent, seeded_noise, store_latent
from .stats import ROWS, SCALE_FLOOR, compute_dtype

SLOTS = 8  # partial sums of a block: seven and an empty one


# Per-sample sums, first stage. With
#
#   target    = noise - x0
#   reference = ref_uncond + w (ref_cond - ref_uncond)     (ref_cond where there is no ref_uncond)
#
# one program adds up one block of one sample, in registers, in a fixed tree:
#
#   0 (policy - target)^2     1 |policy - target|      2 (old - target)^2     3 |old - target|
#   4 (policy - reference)^2  5 (old - reference)^2    6 (policy - old)^2
#
# where with a mix m sums 0 to 3 are of (1 - m) old + m policy and (1 + m) old - m policy,
# and stores the seven sums in its own slots of partial, (B, 8, chunks). No atomics; what a sample adds up to
# does not depend on the batch it came in. Every input is read once.
@triton.jit
def measure_kernel(
    partial,
    policy,
    old,
    ref_cond,  # or None
    ref_uncond,  # or None
    x0,
    noise,  # or None
    seed,  # (B,) int64 when noise is None
    policy_strides,  # (batch stride, inner strides...) each
    old_strides,
    ref_cond_strides,
    ref_uncond_strides,
    x0_strides,
    noise_strides,
    sizes,  # inner sizes
    numel,
    chunks,
    guidance_scale: tl.float64,
    mix: tl.float64,
    MIX: tl.constexpr,  # whether mix is not 0
    WIDE: tl.constexpr,  # offsets inside a sample need 64 bits
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    begin = chunk.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - begin

    p = load_latent(policy, policy_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    o = load_latent(old, old_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    target = -load_latent(x0, x0_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    if seed is None:
        target += load_latent(noise, noise_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    else:
        target += tl.where(mask, seeded_noise(seed, sample, begin, BLOCK), 0.0).to(ACC)

    # Every load comes before the reduction's barriers, so that all are in flight together.
    policy_error, old_error, moved = p - target, o - target, p - o
    if MIX:
        m = tl.full((1,), mix, ACC)
        policy_error, old_error = (1 - m) * o + m * p - target, (1 + m) * o - m * p - target
    policy_drift, old_drift = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    if ref_cond is not None:
        reference = load_latent(ref_cond, ref_cond_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
        if ref_uncond is not None:
            uncond = load_latent(ref_uncond, ref_uncond_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
            reference = uncond + tl.full((1,), guidance_scale, ACC) * (reference - uncond)
        policy_drift, old_drift = p - reference, o - reference

    # Joined to (BLOCK, 2, 2, 2), the sums cost one reduction with one exchange between warps, not seven.
    # Sum k = 4 x + 2 y + z lies at [x, y, z]; the eighth is empty.
    even = tl.join(
        tl.join(policy_error * policy_error, policy_drift * policy_drift),  # 0, 4
        tl.join(old_error * old_error, moved * moved),  # 2, 6
    )
    odd = tl.join(
        tl.join(tl.abs(policy_error), old_drift * old_drift),  # 1, 5
        tl.join(tl.abs(old_error), tl.zeros((BLOCK,), ACC)),  # 3, 7
    )
    sums = tl.reshape(tl.sum(tl.join(even, odd), 0), (8,))
    slot = partial + sample.to(tl.int64) * (8 * chunks) + chunk
    tl.store(slot + tl.arange(0, 8) * chunks, sums)


# Per-sample sums, second stage: one program adds the slots of one sample in order, in float64, and turns them
# into its column of the (ROWS, B) table (the rows of `Stats`):
#
#   s(v) = max(mean|v - target|, 1e-5), or 1
#   r    = mean((old - target)^2) / s(old) - mean((policy - target)^2) / s(policy)
@triton.jit
def summarize_kernel(
    table,
    partial,
    numel,
    chunks,
    batch,
    FLOOR: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0)
    slots = partial + sample.to(tl.int64) * (8 * chunks)
    policy_square = mean_of(slots, numel, chunks, BLOCK)
    policy_scale = mean_of(slots + chunks, numel, chunks, BLOCK)
    old_square = mean_of(slots + 2 * chunks, numel, chunks, BLOCK)
    old_scale = mean_of(slots + 3 * chunks, numel, chunks, BLOCK)
    deviation = mean_of(slots + 6 * chunks, numel, chunks, BLOCK)
    if ADAPTIVE:  # compared this way round, NaN stays NaN
        policy_scale = tl.where(policy_scale < FLOOR, FLOOR, policy_scale)
        old_scale = tl.where(old_scale < FLOOR, FLOOR, old_scale)
    else:
        policy_scale = policy_scale * 0 + 1
        old_scale = old_scale * 0 + 1
    column = table + sample
    tl.store(column, old_square / old_scale - policy_square / policy_scale)
    tl.store(column + batch, policy_scale)
    tl.store(column + 2 * batch, old_scale)
    tl.store(column + 3 * batch, policy_square)
    tl.store(column + 4 * batch, old_square)
    if ANCHORED:
        tl.store(column + 5 * batch, mean_of(slots + 4 * chunks, numel, chunks, BLOCK))
        tl.store(column + 6 * batch, mean_of(slots + 5 * chunks, numel, chunks, BLOCK))
        tl.store(column + 8 * batch, 1.0)
    else:
        tl.store(column + 5 * batch, 0.0)
        tl.store(column + 6 * batch, 0.0)
        tl.store(column + 8 * batch, 0.0)
    tl.store(column + 7 * batch, deviation)


@triton.jit
def mean_of(slots, numel, chunks, BLOCK: tl.constexpr):
    """Sum of `chunks` partial sums in fixed order, over numel; float64."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, chunks, BLOCK):
        total += tl.load(slots + at + lane, lane < chunks - at, other=0.0).to(tl.float64)
    return tl.sum(total) / numel


# d loss / d policy = c1 (policy - target) + c2 (policy - reference) + c3 (policy - old)
#
# target and reference as above; the last term only with c3. Every input is read once, the result is written
# once.
@triton.jit
def gradient_kernel(
    gradient,
    policy,
    old,  # or None
    ref_cond,  # or None
    ref_uncond,  # or None
    x0,
    noise,  # or None
    seed,  # (B,) int64 when noise is None
    c1,  # (B,)
    c2,  # (B,)
    c3,  # (B,), or None with old
    gradient_strides,
    policy_strides,
    old_strides,
    ref_cond_strides,
    ref_uncond_strides,
    x0_strides,
    noise_strides,
    sizes,
    numel,
    chunks,
    guidance_scale: tl.float64,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    begin = chunk.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < numel - begin

    p = load_latent(policy, policy_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    target = -load_latent(x0, x0_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    if seed is None:
        target += load_latent(noise, noise_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
    else:
        target += seeded_noise(seed, sample, begin, BLOCK).to(ACC)
    result = tl.load(c1 + sample).to(ACC) * (p - target)
    if ref_cond is not None:
        reference = load_latent(ref_cond, ref_cond_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
        if ref_uncond is not None:
            uncond = load_latent(ref_uncond, ref_uncond_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
            reference = uncond + tl.full((1,), guidance_scale, ACC) * (reference - uncond)
        result += tl.load(c2 + sample).to(ACC) * (p - reference)
    if c3 is not None:
        o = load_latent(old, old_strides, sizes, sample, begin, lane, mask, WIDE, ACC)
        result += tl.load(c3 + sample).to(ACC) * (p - o)
    store_latent(gradient, gradient_strides, sizes, sample, begin, lane, mask, result, WIDE)


def measure(policy, old, ref_cond, ref_uncond, x0, noise, seed, guidance_scale, adaptive_weighting, mix):
    latents = [policy, old, ref_cond, ref_uncond, x0, noise]
    dtype = compute_dtype(*latents)
    batch, numel, elements = policy.shape[0], policy.shape[1:].numel(), launch.block(dtype)
    chunks = triton.cdiv(numel, elements)
    partial = torch.empty((batch, SLOTS, chunks), dtype=dtype, device=policy.device)
    table = torch.empty((ROWS, batch), dtype=dtype, device=policy.device)
    latents, strides, sizes, wide = launch.operands(latents)
    with launch.on(policy.device):
        measure_kernel[(batch * chunks,)](
            partial,
            *latents,
            None if seed is None else seed.contiguous(),
            *strides,
            sizes,
            numel,
            chunks,
            guidance_scale,
            mix,
            MIX=mix != 0,
            WIDE=wide,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK=elements,
            **launch.options(elements),
        )
        summarize_kernel[(batch,)](
            table,
            partial,
            numel,
            chunks,
            batch,
            FLOOR=SCALE_FLOOR,
            ADAPTIVE=adaptive_weighting,
            ANCHORED=ref_cond is not None,
            BLOCK=256,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return table


def velocity_grad(policy, old, ref_cond, ref_uncond, x0, noise, seed, c1, c2, c3, guidance_scale):
    dtype = compute_dtype(policy, old, ref_cond, ref_uncond, x0, noise)
    batch, numel, elements = policy.shape[0], policy.shape[1:].numel(), launch.block(dtype)
    chunks = triton.cdiv(numel, elements)
    gradient = torch.empty_like(policy)
    latents = [gradient, policy, old, ref_cond, ref_uncond, x0, noise]
    latents, strides, sizes, wide = launch.operands(latents)
    with launch.on(policy.device):
        gradient_kernel[(batch * chunks,)](
            *latents,
            None if seed is None else seed.contiguous(),
            c1.contiguous(),
            c2.contiguous(),
            None if c3 is None else c3.contiguous(),
            *strides,
            sizes,
            numel,
            chunks,
            guidance_scale,
            WIDE=wide,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK=elements,
            **launch.options(elements),
        )
    return gradient
