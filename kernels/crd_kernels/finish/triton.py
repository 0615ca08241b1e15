"""Everything on B scalars in one launch: adds up the partial sums, centers, leaves losses and coefficients.

A single program works through the samples in tiles of TILE, so that sums over groups that spread over tiles
need no second launch: O(B) work, a fixed order, no atomics. Against the pass over the latents that came
before it is small: it reads eight numbers where that pass read a block of every latent.
"""

import torch
import triton
import triton.language as tl

from .. import launch
from ..centering.triton import crd_direction, sigmoid64, sum_groups, unit_interval, wide
from ..losses.triton import matching
from ..problem import METHODS, WEIGHTINGS, Kind, Numbers, Scalars
from ..velocity.stats import ROWS, SCALE_FLOOR, SUMS

TILE = 32  # samples of one step
CHUNKS = 32  # partial sums of one step
WARPS = 4
REWARD, CRD, NFT, AWM, DPO, FLOW_MATCHING = (
    tl.constexpr(METHODS.index(name)) for name in ("reward", "crd", "nft", "awm", "dpo", "flow_matching")
)


# Second stage of the sums: per tile of samples, adds the blocks' sums in order, in float64, and writes the
# samples' columns of the (ROWS, B) table of statistics:
#
#   s(v) = max(mean|v - target|, 1e-5), or 1
#   r    = mean((old - target)^2) / s(old) - mean((policy - target)^2) / s(policy)
@triton.jit
def summarize(
    table,
    partial,  # (B, 8, chunks)
    numel,
    chunks,
    batch,
    FLOOR: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ANCHORED: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(batch, TILE), tl.num_programs(0)):
        sample = tile * TILE + tl.arange(0, TILE)
        there = sample < batch
        policy_square, policy_scale = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
        old_square, old_scale = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
        kl, old_kl = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
        deviation, weight = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
        for at in range(0, chunks, CHUNKS):
            lane = at + tl.arange(0, CHUNKS)
            slots = partial + sample[:, None].to(tl.int64) * (8 * chunks) + lane[None, :]
            mask = there[:, None] & (lane < chunks)[None, :]
            policy_square += tl.sum(tl.load(slots, mask, other=0.0).to(tl.float64), 1)
            policy_scale += tl.sum(tl.load(slots + chunks, mask, other=0.0).to(tl.float64), 1)
            old_square += tl.sum(tl.load(slots + 2 * chunks, mask, other=0.0).to(tl.float64), 1)
            old_scale += tl.sum(tl.load(slots + 3 * chunks, mask, other=0.0).to(tl.float64), 1)
            if ANCHORED:
                kl += tl.sum(tl.load(slots + 4 * chunks, mask, other=0.0).to(tl.float64), 1)
                old_kl += tl.sum(tl.load(slots + 5 * chunks, mask, other=0.0).to(tl.float64), 1)
            deviation += tl.sum(tl.load(slots + 6 * chunks, mask, other=0.0).to(tl.float64), 1)
            if MASKED:
                weight += tl.sum(tl.load(slots + 7 * chunks, mask, other=0.0).to(tl.float64), 1)
        elements = weight if MASKED else weight + numel
        policy_square, old_square = policy_square / elements, old_square / elements
        if ADAPTIVE:  # compared this way round, NaN stays NaN
            policy_scale, old_scale = policy_scale / elements, old_scale / elements
            policy_scale = tl.where(policy_scale < FLOOR, FLOOR, policy_scale)
            old_scale = tl.where(old_scale < FLOOR, FLOOR, old_scale)
        else:
            policy_scale, old_scale = weight * 0 + 1, weight * 0 + 1
        column = table + sample
        tl.store(column, old_square / old_scale - policy_square / policy_scale, there)
        tl.store(column + batch, policy_scale, there)
        tl.store(column + 2 * batch, old_scale, there)
        tl.store(column + 3 * batch, policy_square, there)
        tl.store(column + 4 * batch, old_square, there)
        tl.store(column + 5 * batch, kl / elements, there)
        tl.store(column + 6 * batch, old_kl / elements, there)
        tl.store(column + 7 * batch, deviation / elements, there)
        tl.store(column + 8 * batch, tl.full((TILE,), 1.0 if ANCHORED else 0.0, tl.float64), there)
        tl.store(column + 9 * batch, elements, there)


@triton.jit
def scalar64(number):
    return tl.full((1,), number, tl.float64)


# The losses and the coefficients of d loss / d policy = c1 (policy - target) + c2 (policy - reference)
# + c3 (policy - old), from the table of statistics; the formulas are those of finish/reference.py.
@triton.jit
def conclude(
    loss,
    outcome,
    scratch,
    first,
    table,
    advantage,
    sigma,
    kl_weight,
    old_errors,
    batch,
    beta,
    kl_beta,
    kl_min,
    clip,
    ratio_low,
    ratio_high,
    old_kl_beta,
    samples,
    METHOD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ADAPTIVE_KL: tl.constexpr,
    BCE: tl.constexpr,
    UNCENTERED: tl.constexpr,
    TEMPERED: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    CLIPPED: tl.constexpr,
    OLD_TERM: tl.constexpr,
    WEIGHTING: tl.constexpr,
    TILE: tl.constexpr,
):
    policy_total, kl_total = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
    for tile in range(0, tl.cdiv(batch, TILE)):
        sample = tile * TILE + tl.arange(0, TILE)
        there = sample < batch
        elements = tl.load(table + 9 * batch + sample, there, other=1.0).to(tl.float64)
        policy_error = wide(table + 3 * batch, sample, there)
        k = elements * 0 + kl_beta
        if METHOD == REWARD:
            scale = tl.load(table + batch + sample, there, other=1.0).to(tl.float64)
            term, c1 = elements * 0, -2 / elements / scale
            tl.store(loss + sample, tl.load(table + sample, there, other=0.0), there)
        elif METHOD == CRD:
            scale = tl.load(table + batch + sample, there, other=1.0).to(tl.float64)
            a, reward = unit_interval(advantage, sample, there, clip), wide(table, sample, there)
            found = sample if UNCENTERED else tl.load(first + sample, there, other=0)
            term, slope = crd_direction(scratch, found, there, reward, a, beta, BCE, UNCENTERED, batch)
            if TEMPERED:
                other, slope2 = crd_direction(
                    scratch + 3 * batch, found, there, reward, a, beta, BCE, UNCENTERED, batch
                )
                term, slope = (term + other) / 2, (slope + slope2) / 2
            share = clip / beta / samples
            term, c1 = share * term, -2 / elements * (share * slope) / scale
            if ADAPTIVE_KL:
                k = kl_min + a * (kl_beta - kl_min)
        elif METHOD == NFT:
            a, level = unit_interval(advantage, sample, there, clip), wide(sigma, sample, there)
            positive_weight, negative_weight = level * level, level * level
            if ADAPTIVE:
                level = tl.where(there, level, 1.0)
                floor = 1e-5 / level
                positive = tl.load(table + batch + sample, there, other=1.0).to(tl.float64)
                negative = tl.load(table + 2 * batch + sample, there, other=1.0).to(tl.float64)
                positive_weight = level / tl.where(positive < floor, floor, positive)
                negative_weight = level / tl.where(negative < floor, floor, negative)
            share = clip / beta / samples
            positive, negative = share * a * positive_weight, share * (1 - a) * negative_weight
            old_error = wide(table + 4 * batch, sample, there)
            term = positive * policy_error + negative * old_error
            # from the two branches the policy's own error, as in losses/scalars.py
            own = ((1 + beta) * policy_error - (1 - beta) * old_error) / (2 * beta)
            own += (1 - beta * beta) * wide(table + 7 * batch, sample, there)
            tl.debug_barrier()  # everybody has read the row
            tl.store(table + 3 * batch + sample, own, there)
            step = 2 * beta / elements
            c1 = step * (positive - negative)
            c3 = step * ((1 + beta) * negative - (1 - beta) * positive)
            tl.store(outcome + 2 * batch + sample, c3, there)
        elif METHOD == AWM:
            a = wide(advantage, sample, there)
            a = tl.where(a < -clip, -clip, tl.where(a > clip, clip, a))
            error, slope = matching(policy_error, sigma, sample, there, WEIGHTING)
            if OFF_POLICY:
                old_error = wide(table + 4 * batch, sample, there)
                if old_errors is not None:
                    old_error = wide(old_errors, sample, there)
                old_error, _ = matching(old_error, sigma, sample, there, WEIGHTING)
                ratio = tl.exp(old_error - error)
                gain, factor = a * ratio, a * ratio
                if CLIPPED:
                    bounded = tl.where(
                        ratio < ratio_low, ratio_low, tl.where(ratio > ratio_high, ratio_high, ratio)
                    )
                    factor = tl.where(a * bounded < gain, 0.0, factor)
                    gain = tl.where(a * bounded < gain, a * bounded, gain)
                term = -gain / samples
            else:
                term, factor = a * error / samples, a
            c1 = 2 / elements / samples * factor * slope
            if OLD_TERM:
                tl.store(outcome + 2 * batch + sample, old_kl_beta * 2 / elements / samples, there)
                kl_total += tl.where(
                    there, old_kl_beta * wide(table + 7 * batch, sample, there) / samples, 0.0
                )
        elif METHOD == DPO:
            pairs = batch // 2
            preferred = sample < pairs
            other = tl.where(preferred, sample + pairs, sample - pairs)
            gap = policy_error - wide(table + 4 * batch, sample, there)
            rival = wide(table + 3 * batch, other, there) - wide(table + 4 * batch, other, there)
            logit = -beta / 2 * tl.where(preferred, gap - rival, rival - gap)
            # infinite errors have a loss too; NaN comes through the logarithm
            per_pair = tl.where(logit < 0, -logit, 0.0) + tl.log(1 + tl.exp(-tl.abs(logit)))
            term = tl.where(preferred, per_pair, 0.0) / samples
            slope = beta / 2 / samples * sigmoid64(-logit)
            c1 = 2 / elements * tl.where(preferred, slope, -slope)
        else:
            weight = elements * 0 + 1 if advantage is None else wide(advantage, sample, there)
            term, c1 = weight * policy_error / samples, 2 / elements / samples * weight
        if kl_weight is not None:
            k = k * wide(kl_weight, sample, there)
        anchored = wide(table + 8 * batch, sample, there)
        tl.store(outcome + sample, c1, there)
        tl.store(outcome + batch + sample, 2 / elements / samples * k * anchored, there)
        policy_total += tl.where(there, term, 0.0)
        kl_total += tl.where(there, k * wide(table + 5 * batch, sample, there) / samples, 0.0)
    policy_loss, kl_loss = tl.sum(policy_total), tl.sum(kl_total)
    if METHOD != REWARD:
        tl.store(loss, policy_loss + kl_loss)
    for tile in range(0, tl.cdiv(batch, TILE)):
        sample = tile * TILE + tl.arange(0, TILE)
        nothing = tl.zeros((TILE,), tl.float64)
        if METHOD != NFT and not OLD_TERM:
            tl.store(outcome + 2 * batch + sample, nothing, sample < batch)
        tl.store(outcome + 3 * batch + sample, nothing + policy_loss, sample < batch)
        tl.store(outcome + 4 * batch + sample, nothing + kl_loss, sample < batch)


@triton.jit(do_not_specialize_on_alignment=["advantage", "group", "sigma", "kl_weight", "old_errors"])
def finish_kernel(
    table,  # (ROWS, B): written from the partial sums, or read where there are none
    work,  # float64: the partial sums of the first stage, (B, 8, chunks) in the table's dtype, and scratch
    loss,  # () or (B,), or None
    outcome,  # (OUTCOME, B), or None for the rows behind those of the table
    advantage,  # (B,) each, or None
    group,
    sigma,
    kl_weight,
    old_errors,
    numel,
    chunks,
    batch,
    slots,
    scratch_at,  # where in `work` the scratch begins
    beta: tl.float64,
    kl_beta: tl.float64,
    kl_min: tl.float64,
    clip: tl.float64,
    temperature: tl.float64,
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    old_kl_beta: tl.float64,
    samples: tl.float64,
    METHOD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ADAPTIVE_KL: tl.constexpr,
    BCE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    UNCENTERED: tl.constexpr,
    TEMPERED: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    CLIPPED: tl.constexpr,
    OLD_TERM: tl.constexpr,
    WEIGHTING: tl.constexpr,
    ANCHORED: tl.constexpr,
    MASKED: tl.constexpr,
    SUM: tl.constexpr,  # whether there are partial sums
    ROWS: tl.constexpr,
    FLOOR: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # float64 for certain: the interpreter takes numbers for float32 in products with integers
    beta, kl_beta, kl_min = scalar64(beta), scalar64(kl_beta), scalar64(kl_min)
    clip, temperature, old_kl_beta = scalar64(clip), scalar64(temperature), scalar64(old_kl_beta)
    ratio_low, ratio_high, samples = scalar64(ratio_low), scalar64(ratio_high), scalar64(samples)
    if SUM:
        partial = work.to(table.dtype, bitcast=True)
        summarize(table, partial, numel, chunks, batch, FLOOR, ADAPTIVE, ANCHORED, MASKED, TILE, CHUNKS)
        tl.debug_barrier()
    if METHOD != 0:
        if outcome is None:
            outcome = table + ROWS * batch
        scratch, first = work, work
        if METHOD == CRD:
            scratch = work + scratch_at
            first = (scratch + 8 * batch).to(tl.pointer_type(tl.int32), bitcast=True)
            if not UNCENTERED:
                sum_groups(
                    scratch,
                    first,
                    table,
                    advantage,
                    group,
                    batch,
                    slots,
                    clip,
                    temperature,
                    ONE_GROUP,
                    TEMPERED,
                    TILE,
                )
        conclude(
            loss,
            outcome,
            scratch,
            first,
            table,
            advantage,
            sigma,
            kl_weight,
            old_errors,
            batch,
            beta,
            kl_beta,
            kl_min,
            clip,
            ratio_low,
            ratio_high,
            old_kl_beta,
            samples,
            METHOD,
            ADAPTIVE,
            ADAPTIVE_KL,
            BCE,
            UNCENTERED,
            TEMPERED,
            OFF_POLICY,
            CLIPPED,
            OLD_TERM,
            WEIGHTING,
            TILE,
        )


def _constants(kind, anchored, masked, summed):
    """The compile-time arguments of `finish_kernel`, in its order."""
    method, *flags, weighting = kind
    static = METHODS.index(method), *flags, WEIGHTINGS.index(weighting), anchored, masked, summed
    return (*static, ROWS, SCALE_FLOOR, TILE, CHUNKS)


class Finish:
    """The one launch on B scalars, for one number of samples."""

    def __init__(
        self, kind: Kind, batch: int, dtype, device, numel=0, chunks=0, anchored=False, masked=False
    ):
        """chunks: partial sums of a sample in the first stage, 0 where the table is there already."""
        self.kind, self.batch = kind, batch
        self.like = {"dtype": dtype, "device": device}
        slots = 0 if batch <= TILE else triton.next_power_of_2(2 * batch)
        scratch_at = -(-batch * SUMS * chunks * dtype.itemsize // 8)
        self.words = scratch_at
        if kind.method == "crd":  # eight sums a sample; then int32: one a sample, and the hash table
            self.words += 8 * batch + (batch + slots + 1) // 2
        self.integers = numel, chunks, batch, slots, scratch_at
        tiles = triton.cdiv(batch, TILE) if kind.method == "measure" else 1
        # One stage: a load that is fetched ahead would miss what an earlier tile has stored.
        options = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False, **launch.registers(224)}
        constants = _constants(kind, anchored, masked, chunks > 0)
        self.launch = launch.Launcher(finish_kernel, (tiles,), device, constants, **options)

    def work(self):
        """The memory in which the first stage leaves its sums."""
        return torch.empty(max(1, self.words), dtype=torch.float64, device=self.like["device"])

    def __call__(self, table, outcome, work, scalars: Scalars, numbers: Numbers):
        """The loss, () or (B,). table, outcome, work: see the kernel."""
        batch, method = self.batch, self.kind.method
        loss = (
            None if method == "measure" else torch.empty((batch,) if method == "reward" else (), **self.like)
        )
        samples = numbers.denominator or (batch // 2 if method == "dpo" else batch)
        self.launch(table, work, loss, outcome, *scalars, *self.integers, *numbers[2:10], float(samples))
        return loss
