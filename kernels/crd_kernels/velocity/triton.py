"""The two passes in Triton, for GPUs: 6 reads an element, then 5 reads and 1 write."""

import torch
import triton
import triton.language as tl

from .. import launch
from ..finish import triton as finishing
from ..noise.triton import load_latent, seeded_noise, store_latent
from ..problem import NOTHING, Kind, Latents, Numbers, Scalars, compute_dtype
from .stats import OUTCOME, ROWS


# Per-sample sums, first stage. With
#
#   target    = noise - x0
#   reference = ref_uncond + w (ref_cond - ref_uncond)     (ref_cond where there is no ref_uncond)
#
# one program adds up one block of one sample, in registers, in a fixed tree:
#
#   0 (policy - target)^2     1 |policy - target|      2 (old - target)^2     3 |old - target|
#   4 (policy - reference)^2  5 (old - reference)^2    6 (policy - old)^2   7 1, with a mask
#
# each weighted by the mask where there is one (an element of weight 0 is not looked at, be it NaN). With a
# mix m, sums 0 to 3 are of (1 - m) old + m policy and (1 + m) old - m policy; without `old` the policy stands
# in. The sums go to the program's own slots of partial, (B, 8, chunks) of the compute type. No atomics; what
# a sample adds up to does not depend on the batch it came in. Every input is read once.
@triton.jit
def measure_kernel(
    partial,  # float64 memory
    policy,
    old,  # or None
    ref_cond,  # or None
    ref_uncond,  # or None
    x0,
    noise,  # or None
    mask,  # or None
    seed,  # (B,) int64 when noise is None
    policy_strides,  # (batch stride, inner strides...) each
    old_strides,
    ref_cond_strides,
    ref_uncond_strides,
    x0_strides,
    noise_strides,
    mask_strides,
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
    there = lane < numel - begin

    p = load_latent(policy, policy_strides, sizes, sample, begin, lane, there, WIDE, ACC)
    o = p
    if old is not None:
        o = load_latent(old, old_strides, sizes, sample, begin, lane, there, WIDE, ACC)
    target = -load_latent(x0, x0_strides, sizes, sample, begin, lane, there, WIDE, ACC)
    if seed is None:
        target += load_latent(noise, noise_strides, sizes, sample, begin, lane, there, WIDE, ACC)
    else:
        target += tl.where(there, seeded_noise(seed, sample, begin, BLOCK), 0.0).to(ACC)

    # Every load comes before the reduction's barriers, so that all are in flight together.
    policy_error, old_error, moved = p - target, o - target, p - o
    if MIX:
        m = tl.full((1,), mix, ACC)
        policy_error, old_error = (1 - m) * o + m * p - target, (1 + m) * o - m * p - target
    policy_drift, old_drift = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    if ref_cond is not None:
        reference = load_latent(ref_cond, ref_cond_strides, sizes, sample, begin, lane, there, WIDE, ACC)
        if ref_uncond is not None:
            uncond = load_latent(ref_uncond, ref_uncond_strides, sizes, sample, begin, lane, there, WIDE, ACC)
            reference = uncond + tl.full((1,), guidance_scale, ACC) * (reference - uncond)
        policy_drift, old_drift = p - reference, o - reference

    policy_abs, old_abs, weight = tl.abs(policy_error), tl.abs(old_error), tl.zeros((BLOCK,), ACC)
    if mask is not None:
        weight = load_latent(mask, mask_strides, sizes, sample, begin, lane, there, WIDE, ACC)
        seen = weight != 0
        policy_error, old_error = tl.where(seen, policy_error, 0.0), tl.where(seen, old_error, 0.0)
        policy_drift, old_drift = tl.where(seen, policy_drift, 0.0), tl.where(seen, old_drift, 0.0)
        policy_abs, old_abs = weight * tl.abs(policy_error), weight * tl.abs(old_error)
        moved = tl.where(seen, moved, 0.0)
    policy_square, old_square = policy_error * policy_error, old_error * old_error
    policy_drift, old_drift, moved = policy_drift * policy_drift, old_drift * old_drift, moved * moved
    if mask is not None:
        policy_square, old_square, moved = weight * policy_square, weight * old_square, weight * moved
        policy_drift, old_drift = weight * policy_drift, weight * old_drift

    # Joined to (BLOCK, 2, 2, 2), the sums cost one reduction with one exchange between warps, not seven.
    # Sum k = 4 x + 2 y + z lies at [x, y, z].
    even = tl.join(tl.join(policy_square, policy_drift), tl.join(old_square, moved))  # 0, 4; 2, 6
    odd = tl.join(tl.join(policy_abs, old_drift), tl.join(old_abs, weight))  # 1, 5; 3, 7
    sums = tl.reshape(tl.sum(tl.join(even, odd), 0), (8,))
    slot = partial.to(tl.pointer_type(ACC), bitcast=True) + sample.to(tl.int64) * (8 * chunks) + chunk
    tl.store(slot + tl.arange(0, 8) * chunks, sums)


# d loss / d policy = upstream mask (c1 (policy - target) + c2 (policy - reference) + c3 (policy - old))
#
# target and reference as above; upstream is the gradient that came in, one number or one per sample. Every
# input is read once, the result is written once.
@triton.jit(do_not_specialize_on_alignment=["c1", "c2", "c3", "upstream"])
def gradient_kernel(
    gradient,
    policy,
    old,  # or None
    ref_cond,  # or None
    ref_uncond,  # or None
    x0,
    noise,  # or None
    mask,  # or None
    seed,  # (B,) int64 when noise is None
    c1,  # (B,), or the table of a loss, in which c1, c2 and c3 are the rows behind the statistics
    c2,  # (B,), or None
    c3,  # (B,), or None
    upstream,  # () or (B,), or None
    upstream_stride,
    gradient_strides,
    policy_strides,
    old_strides,
    ref_cond_strides,
    ref_uncond_strides,
    x0_strides,
    noise_strides,
    mask_strides,
    sizes,
    numel,
    chunks,
    batch,
    guidance_scale: tl.float64,
    ROWS: tl.constexpr,  # of statistics in the table, or 0 where c1, c2 and c3 are given one by one
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    begin = chunk.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    there = lane < numel - begin
    if ROWS > 0:
        c1 += ROWS * batch
        c2 = c1 + batch
        c3 = c2 + batch

    p = load_latent(policy, policy_strides, sizes, sample, begin, lane, there, WIDE, ACC)
    target = -load_latent(x0, x0_strides, sizes, sample, begin, lane, there, WIDE, ACC)
    if seed is None:
        target += load_latent(noise, noise_strides, sizes, sample, begin, lane, there, WIDE, ACC)
    else:
        target += seeded_noise(seed, sample, begin, BLOCK).to(ACC)
    scale = tl.full((1,), 1.0, ACC)
    if upstream is not None:
        scale = scale * tl.load(upstream + sample.to(tl.int64) * upstream_stride).to(ACC)
    result = tl.load(c1 + sample).to(ACC) * scale * (p - target)
    if ref_cond is not None:
        reference = load_latent(ref_cond, ref_cond_strides, sizes, sample, begin, lane, there, WIDE, ACC)
        if ref_uncond is not None:
            uncond = load_latent(ref_uncond, ref_uncond_strides, sizes, sample, begin, lane, there, WIDE, ACC)
            reference = uncond + tl.full((1,), guidance_scale, ACC) * (reference - uncond)
        result += tl.load(c2 + sample).to(ACC) * scale * (p - reference)
    if old is not None:
        o = load_latent(old, old_strides, sizes, sample, begin, lane, there, WIDE, ACC)
        result += tl.load(c3 + sample).to(ACC) * scale * (p - o)
    if mask is not None:
        weight = load_latent(mask, mask_strides, sizes, sample, begin, lane, there, WIDE, ACC)
        result = tl.where(weight != 0, weight * result, 0.0)
    store_latent(gradient, gradient_strides, sizes, sample, begin, lane, there, result, WIDE)


class Passes:
    """The launches for tensors of one layout (crd_kernels/passes.py)."""

    def __init__(self, latents: Latents, scalars: Scalars, kind: Kind):
        policy = latents.policy
        self.kind, self.device, self.batch = kind, policy.device, policy.shape[0]
        self.dtype = compute_dtype(*latents[:6])
        numel = policy.shape[1:].numel()
        strides, sizes, wide, far = launch.operands([*latents[:6], latents.mask])
        elements = launch.block(self.dtype, far)
        self.chunks = triton.cdiv(numel, elements)
        self.layout = (*strides, sizes, numel, self.chunks)
        self.contiguous = all(t is None or t.is_contiguous() for t in (*scalars, latents.seed))
        self.launch = self._launcher(measure_kernel, self.chunks, kind.mixed, wide, elements)
        about = latents.ref_cond is not None, latents.mask is not None
        self.finish = finishing.Finish(kind, self.batch, self.dtype, self.device, numel, self.chunks, *about)
        self.backwards: dict = {}

    def _launcher(self, kernel, chunks, static, wide, elements):
        grid, constants = (self.batch * chunks,), (static, wide, ACC[self.dtype], elements)
        return launch.Launcher(kernel, grid, self.device, constants, **launch.options(self.dtype))

    def measure(self, latents: Latents, numbers: Numbers):
        return self._run(latents, NOTHING, numbers, ROWS)[0]

    def forward(self, latents: Latents, scalars: Scalars, numbers: Numbers):
        return self._run(latents, scalars, numbers, ROWS + OUTCOME)

    def _run(self, latents, scalars, numbers, rows):
        if not self.contiguous:
            latents = latents._replace(seed=_contiguous(latents.seed))
            scalars = [_contiguous(t) for t in scalars]
        *tensors, seed, mask = latents
        work = self.finish.work()
        self.launch(work, *tensors, mask, seed, *self.layout, numbers.guidance_scale, numbers.mix)
        table = torch.empty((rows, self.batch), dtype=self.dtype, device=self.device)
        return table, self.finish(table, None, work, scalars, numbers)

    def backward(self, latents: Latents, table, upstream, numbers: Numbers):
        return self._gradient(latents, (table, None, None), upstream, numbers, ROWS)

    def gradient(self, latents: Latents, coefficients, numbers: Numbers):
        if not self.contiguous:
            coefficients = [_contiguous(c) for c in coefficients]
        return self._gradient(latents, coefficients, None, numbers, 0)

    def _gradient(self, latents, coefficients, upstream, numbers, rows):
        policy, old, ref_cond, ref_uncond, x0, noise, seed, mask = latents
        gradient = torch.empty_like(policy)
        tensors = (gradient, policy, old, ref_cond, ref_uncond, x0, noise, mask)
        stride = 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)
        known = self.backwards.get((rows, stride))
        if known is None:
            strides, sizes, wide, far = launch.operands(tensors)
            elements, numel = launch.block(self.dtype, far), policy.shape[1:].numel()
            chunks = triton.cdiv(numel, elements)
            run = self._launcher(gradient_kernel, chunks, rows, wide, elements)
            known = self.backwards[rows, stride] = run, (stride, *strides, sizes, numel, chunks, self.batch)
        run, layout = known
        run(*tensors, _contiguous(seed), *coefficients, upstream, *layout, numbers.guidance_scale)
        return gradient


ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()
