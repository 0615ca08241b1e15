"""Centering within prompt groups as part of the one launch on B scalars (finish/triton.py).

Groups are given by arbitrary integers, in any order. Samples are taken in tiles; inside a tile every sample
is compared with every other, between tiles sums are kept at each group's first sample, which a hash table in
global memory finds again. Barriers stand between what one tile writes and the next one reads: all tiles are
the same program's.
"""

import triton
import triton.language as tl


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
        hashed = (ids ^ (ids >> 32)) * 0x1E3779B97F4A7C15
        slot = ((hashed >> 33) & (slots - 1)).to(tl.int32)
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
def crd_direction(sums, found, there, reward, a, beta, BCE: tl.constexpr, UNCENTERED: tl.constexpr, batch):
    """One direction's terms and derivatives with respect to the rewards, from its group's three sums."""
    r_centered, a_centered = reward, a
    if not UNCENTERED:
        weight = tl.load(sums + found, there, other=1.0)
        r_centered = reward - tl.load(sums + batch + found, there, other=0.0) / weight
        a_centered = a - tl.load(sums + 2 * batch + found, there, other=0.0) / weight
    if BCE:
        logit, label = beta * r_centered, sigmoid64(a_centered)
        positive = tl.where(logit > 0, logit, 0.0)
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
