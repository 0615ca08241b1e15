"""Everything on B scalars in one launch: adds up the partial sums, centers, leaves losses and coefficients.

A single program works through the samples in tiles of TILE, so that sums over groups that spread over tiles
need no second launch: O(B) work, a fixed order, no atomics. Against the pass over the latents that came
before it is small: it reads eight numbers where that pass read a block of every latent.
"""

import torch
import triton
import triton.language as tl

from .. import launch
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


@triton.jit
def wide(pointer, sample, there):
    """A per-sample number in float64."""
    return tl.load(pointer + sample, there, other=0.0).to(tl.float64)


@triton.jit
def unit_interval(advantage, sample, there, clip):
    """a = clip(clip(A, -c, c) / (2c) + 1/2, 0, 1); compared this way round, NaN stays NaN."""
    a = wide(advantage, sample, there)
    a = tl.where(a < -clip, -clip, tl.where(a > clip, clip, a)) / (2 * clip) + 0.5
    return tl.where(a < 0, 0.0, tl.where(a > 1, 1.0, a))


@triton.jit
def sigmoid64(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def number_groups(
    first, group, sample, lane, there, tile, batch, slots, ONE_GROUP: tl.constexpr, TILE: tl.constexpr
):
    """The first sample of each sample's group, and whether a sample leads its group in this tile.

    first: (batch,) int32, written; behind it an open-addressed hash table of `slots` entries, used where
    there is more than one tile: the first sample of the group that a slot belongs to, or -1. Lanes that reach
    for one free slot at a time write it all, and read back whose it is; the others go on to the next.
    """
    ids = tl.zeros((TILE,), tl.int64) if ONE_GROUP else tl.load(group + sample, there, other=0).to(tl.int64)
    same = (ids[:, None] == ids[None, :]) & there[:, None] & there[None, :]
    leader = tl.min(tl.where(same, lane[None, :], TILE), 1)
    leads = there & (leader == lane)
    found = sample
    if slots > 0:
        heads = first + batch
        mixed = (ids ^ (ids >> 32)) * 0x1E3779B97F4A7C15
        slot = ((mixed >> 33) & (slots - 1)).to(tl.int32)
        open_ = leads
        while tl.max(open_.to(tl.int32)) > 0:
            held = tl.load(heads + slot, open_, other=0)
            tl.debug_barrier()
            tl.store(heads + slot, sample, open_ & (held < 0))
            tl.debug_barrier()
            held = tl.load(heads + slot, open_, other=0)
            theirs = tl.zeros((TILE,), tl.int64)
            if not ONE_GROUP:
                theirs = tl.load(group + held, open_, other=0).to(tl.int64)
            hit = open_ & (theirs == ids)
            found = tl.where(hit, held, found)
            open_ = open_ & (theirs != ids)
            slot = (slot + 1) & (slots - 1)
            tl.debug_barrier()
    # every lane takes what the leader of its group in this tile has found
    found = tl.max(tl.where(same & (lane[None, :] == leader[:, None]), found[None, :], -1), 1)
    tl.store(first + sample, found, there)
    return same, leads, found


@triton.jit
def add_to_group(sums, values, same, leads, found, sample):
    """Adds up values over each group of this tile, then to what earlier tiles left in `sums`."""
    total = tl.sum(tl.where(same, values[None, :], 0.0), 1)
    goes_on = leads & (found != sample)  # the tile with a group's first sample begins its sums
    total += tl.load(sums + found, goes_on, other=0.0)
    tl.store(sums + found, total, leads)


@triton.jit
def largest_of_group(sums, values, same, leads, found, sample):
    total = tl.max(tl.where(same, values[None, :], float("-inf")), 1)
    goes_on = leads & (found != sample)
    total = tl.maximum(total, tl.load(sums + found, goes_on, other=float("-inf")))
    tl.store(sums + found, total, leads)


@triton.jit
def softmax_weight(a, top, temperature, direction):
    """exp((a - top) / T) with the group's largest a, `top`. At T = 0 what is positive in the first direction,
    and else all alike."""
    positive = tl.where(a > 0, tl.exp(a - top), a * 0)
    selected = tl.where((direction == 0) & (top > 0), positive, 1.0)
    softmax = tl.exp((a - top) / tl.where(temperature == 0, 1.0, temperature))
    return tl.where(temperature == 0, selected, softmax)


@triton.jit
def crd_direction(sums, found, there, reward, a, beta, BCE: tl.constexpr, batch):
    """One direction's terms and derivatives with respect to the rewards, from its group's three sums."""
    weight = tl.load(sums + found, there, other=1.0)
    r_centered = reward - tl.load(sums + batch + found, there, other=0.0) / weight
    a_centered = a - tl.load(sums + 2 * batch + found, there, other=0.0) / weight
    if BCE:
        logit, label = beta * r_centered, sigmoid64(a_centered)
        positive = tl.where(logit > 0, logit, logit * 0)
        term = positive - logit * label + tl.log(1 + tl.exp(-tl.abs(logit)))
        return term, beta * (sigmoid64(logit) - label)
    else:
        delta = beta * r_centered - a_centered
        return delta * delta, 2 * beta * delta


# Sums over the groups of centered reward distillation, into scratch, (8, B) doubles at each group's first
# sample: per direction the sums of w, w r and w a, where w = 1, or exp((a - max a) / T) and
# exp((min a - a) / T), for which the largest a and -a of every group come first.
@triton.jit
def sum_groups(
    scratch,
    first,
    table,
    advantage,
    group,
    batch,
    slots,
    clip,
    temperature,
    ONE_GROUP: tl.constexpr,
    TEMPERED: tl.constexpr,
    TILE: tl.constexpr,
):
    lane = tl.arange(0, TILE)
    for at in range(0, slots, TILE * 8):
        place = at + tl.arange(0, TILE * 8)
        tl.store(first + batch + place, -1, place < slots)
    tl.debug_barrier()
    for tile in range(0, tl.cdiv(batch, TILE)):
        sample = tile * TILE + lane
        there = sample < batch
        same, leads, found = number_groups(
            first, group, sample, lane, there, tile, batch, slots, ONE_GROUP, TILE
        )
        a = unit_interval(advantage, sample, there, clip)
        if TEMPERED:
            largest_of_group(scratch + 6 * batch, a, same, leads, found, sample)
            largest_of_group(scratch + 7 * batch, -a, same, leads, found, sample)
        else:
            reward = wide(table, sample, there)
            add_to_group(scratch, tl.where(there, 1.0, 0.0).to(tl.float64), same, leads, found, sample)
            add_to_group(scratch + batch, reward, same, leads, found, sample)
            add_to_group(scratch + 2 * batch, a, same, leads, found, sample)
        tl.debug_barrier()
    if TEMPERED:
        for tile in range(0, tl.cdiv(batch, TILE)):
            sample = tile * TILE + lane
            there = sample < batch
            found = tl.load(first + sample, there, other=-1)
            same = (found[:, None] == found[None, :]) & there[:, None] & there[None, :]
            leads = there & (tl.min(tl.where(same, lane[None, :], TILE), 1) == lane)
            a, reward = unit_interval(advantage, sample, there, clip), wide(table, sample, there)
            for direction in range(2):
                tilted = a * (1 - 2 * direction)
                top = tl.load(scratch + (6 + direction) * batch + found, there, other=1.0)
                w = softmax_weight(tilted, top, temperature, direction)
                sums = scratch + 3 * direction * batch
                add_to_group(sums, w, same, leads, found, sample)
                add_to_group(sums + batch, w * reward, same, leads, found, sample)
                add_to_group(sums + 2 * batch, w * a, same, leads, found, sample)
            tl.debug_barrier()


@triton.jit
def matching(error, sigma, sample, there, WEIGHTING: tl.constexpr):
    """AWM's weighed matching error g(e, t) and its derivative with respect to e."""
    if WEIGHTING == 0:
        return error, error * 0 + 1
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
    TEMPERED: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    CLIPPED: tl.constexpr,
    THIRD: tl.constexpr,
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
            found = tl.load(first + sample, there, other=0)
            term, slope = crd_direction(scratch, found, there, reward, a, beta, BCE, batch)
            if TEMPERED:
                other, slope2 = crd_direction(scratch + 3 * batch, found, there, reward, a, beta, BCE, batch)
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
            if THIRD:
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
            per_pair = tl.where(logit < 0, -logit, logit * 0) + tl.log(1 + tl.exp(-tl.abs(logit)))
            term = tl.where(preferred, per_pair, per_pair * 0) / samples
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
        if METHOD != NFT and not THIRD:
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
    TEMPERED: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    CLIPPED: tl.constexpr,
    THIRD: tl.constexpr,
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
            TEMPERED,
            OFF_POLICY,
            CLIPPED,
            THIRD,
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
