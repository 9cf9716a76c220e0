"""Tables: what scores load alike in many tiles, as models with relative positions do.

    of distances   table[.., kv − q + c]                   d table[.., d + c] = Σ over b and kv − q = d of g
    of pairs       table[index[q, kv], h], bias[h, q, kv]  d table[i, h] = Σ over b and index[q, kv] = i of g

with g = dS · d score / d load.  Adding every element of g to the table in memory would cost more than the
attention.  Tiles on one diagonal of the scores have the same distances in the same places, and a tile has
the same pairs in all batch entries.  So a kernel of its own walks such tiles, sums them in registers, and
adds one number for each distance or pair; it computes dS anew for that.

What is loaded of a table of pairs is gathered into rows beforehand, where many batch entries read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashfuse.kernels.backward import ds_tile
from flashfuse.kernels.device_math import MODERATE, sum_up, zeros_beside
from flashfuse.kernels.forward import load_tile, plane_of
from flashfuse.kernels.row_stats import load_stats


@triton.jit
def _table_tile(  # type: ignore[no-untyped-def]
    i, length_of_one, first_q, first_kv, h, H, GROUP, Sq, Skv, Q, K, V, DOut, Stats, ptrs, nums,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sgb, sgh, sgs, seed, threshold, drop_scale,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    EVEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """The gradients of the load in the i-th of the tiles that share it, of all batch entries."""
    local = tl.arange(0, TILE)
    b = i // length_of_one
    first = (first_q + i % length_of_one) * TILE
    start = (first_kv + i % length_of_one) * TILE
    bh = b * H + h
    at = bh.to(tl.int64) * Sq + first + local
    lse, delta, norm = load_stats(Stats, at, local < Sq - first, not EVEN, FOLDED)
    q = load_tile(plane_of(Q, b, h, sqb, sqh), first, local, sqs, Sq, D, D_PAD, not EVEN)
    do = load_tile(plane_of(DOut, b, h, sgb, sgh), first, local, sgs, Sq, DV, DV_PAD, not EVEN)
    kvh = h // GROUP
    k_plane, v_plane = plane_of(K, b, kvh, skb, skh), plane_of(V, b, kvh, svb, svh)
    rows = tl.minimum(first + local, Sq - 1)
    ds, s, _, kv = ds_tile(
        q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start, True, first, rows, b, h, Sq, Skv,
        ptrs, nums, seed, bh, threshold, drop_scale, SCORE, MASK, SCALE, FOLDED,
        D, DV, D_PAD, DV_PAD, TILE, TILE, DROPOUT, not EVEN, PRECISION, False, FLAT,
    )  # fmt: skip
    if SLOPE is not None:
        # A weight of 0 has no part in it, even where the derivative overflows.
        of_load = SLOPE(s, b, h, rows[:, None], kv[None, :], Sq, Skv, ptrs, nums)
        ds = tl.where(ds == 0.0, 0.0, ds * of_load)
    return ds


@triton.jit
def _sums_by_distance(x, offsets, TILE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """[TILE]: the sums of x [TILE, TILE] over j − i = d, for each d of ``offsets``."""
    column = tl.arange(0, TILE)[:, None] + offsets[None, :]
    inside = (column >= 0) & (column < TILE)
    skewed = tl.gather(x, tl.where(inside, column, 0), 1)
    if PRECISION == "ieee":
        skewed = skewed.to(tl.float64)
    return tl.sum(tl.where(inside, skewed, 0.0), 0)


@triton.jit(
    do_not_specialize=[
        "nums", "gnums", "sqb", "sqh", "sqs", "skb", "skh", "sks", "svb", "svh", "svs", "sgb", "sgh", "sgs",
        "BATCH", "H", "GROUP", "Sq", "Skv", "parts", "threshold", "drop_scale",
    ]
)  # fmt: skip
def backward_table(  # type: ignore[no-untyped-def]
    Q, K, V, DOut, Stats, Seed, Ends, ptrs, gptrs, nums, gnums,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sgb, sgh, sgs,
    BATCH, H, GROUP, Sq, Skv, parts, threshold, drop_scale,
    SCORE: tl.constexpr, MASK: tl.constexpr, SLOPE: tl.constexpr, ADD: tl.constexpr, REACH: tl.constexpr,
    REACH_IS_MASK: tl.constexpr, ENDS: tl.constexpr, FLAT: tl.constexpr, SKIPS_ENDS: tl.constexpr,
    SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    EVEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BY_DISTANCE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program per (h, diagonal of tiles TILE × TILE, part of it); long diagonals come first.

    Unless BY_DISTANCE, a single tile stands for the diagonal.  The tiles are those of all batch entries; of
    as many parts, each is one entry.  If SKIPS_ENDS, the kernel of dq has the sums of tiles in the ends.
    """
    q_tiles, kv_tiles = (Sq + TILE - 1) // TILE, (Skv + TILE - 1) // TILE
    rank = tl.program_id(0) // (H * parts)
    h = tl.program_id(0) % H
    part = tl.program_id(0) // H % parts
    if BY_DISTANCE:
        diagonals = q_tiles + kv_tiles - 1
        step = (rank + 1) // 2
        diagonal = diagonals // 2 + tl.where(rank % 2 == 1, -step, step)
        first_q = tl.maximum(q_tiles - 1 - diagonal, 0)
        first_kv = tl.maximum(diagonal - (q_tiles - 1), 0)
        length_of_one = tl.minimum(q_tiles - first_q, kv_tiles - first_kv)
    else:
        first_q, first_kv, length_of_one = rank // kv_tiles, rank % kv_tiles, 1
    count = (BATCH * length_of_one).to(tl.int64)
    begin, end = (part * count // parts).to(tl.int32), ((part + 1) * count // parts).to(tl.int32)
    b = begin // length_of_one
    local = tl.arange(0, TILE)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)
    # What distances alone say is alike in every tile of the diagonal: that the table is one number, that all
    # is forbidden, that all is allowed.
    easy = end
    if ENDS is not None:
        low, high = ENDS(Ends, b, h, Sq, Skv, ptrs, nums)
        distance = (first_kv - first_q) * TILE
        in_ends = (distance + TILE - 1 <= low) | (distance - TILE + 1 >= high)
        if SKIPS_ENDS:
            if in_ends:
                return
        else:
            easy = tl.where(in_ends, end, begin)
    if REACH is not None:
        rows, columns = first_q * TILE + local, first_kv * TILE + local
        reached = REACH(b, h, rows[:, None], columns[None, :], Sq, Skv, ptrs, nums).to(tl.int32)
        end = tl.where(tl.max(tl.max(reached, 1), 0) > 0, end, begin)
        easy = tl.where(tl.min(tl.min(reached, 1), 0) > 0, tl.minimum(easy, end), begin)
    total = tl.zeros([TILE, TILE], tl.float32)
    low_total = zeros_beside(total, PRECISION == "ieee")
    HAS_EASY: tl.constexpr = MASK is None or REACH_IS_MASK
    if not HAS_EASY:
        easy = begin
    elif (REACH is not None) or (ENDS is not None):
        for i in range(begin, easy):
            of_tile = _table_tile(
                i, length_of_one, first_q, first_kv, h, H, GROUP, Sq, Skv, Q, K, V, DOut, Stats,
                ptrs, nums, sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sgb, sgh, sgs, seed, threshold,
                drop_scale, SCORE, None, SLOPE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, EVEN, DROPOUT, PRECISION,
                TILE, None if SKIPS_ENDS else FLAT,
            )  # fmt: skip
            total, low_total = sum_up(total, low_total, of_tile)
    else:
        easy = begin
    for i in range(easy, end):
        of_tile = _table_tile(
            i, length_of_one, first_q, first_kv, h, H, GROUP, Sq, Skv, Q, K, V, DOut, Stats,
            ptrs, nums, sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sgb, sgh, sgs, seed, threshold,
            drop_scale, SCORE, MASK, SLOPE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, EVEN, DROPOUT, PRECISION,
            TILE, None,
        )  # fmt: skip
        total, low_total = sum_up(total, low_total, of_tile)
    if not BY_DISTANCE:
        at_q, at_kv = (first_q * TILE + local)[:, None], (first_kv * TILE + local)[None, :]
        # Zeros are written too.
        ADD(total, total, b, h, at_q, at_kv, Sq, Skv, ptrs, nums, gptrs, gnums)
    elif end > begin:
        # In memory, additions at one place wait for each other: one for each distance.
        for side in tl.static_range(2):
            offsets = local + (side * TILE - TILE + 1)
            sums = _sums_by_distance(total, offsets, TILE, PRECISION)[None, :]
            distances = ((first_kv - first_q) * TILE + offsets)[None, :]
            # Any pair at a distance is at its place.
            at_q, at_kv = tl.maximum(-distances, 0), tl.maximum(distances, 0)
            ADD(sums, sums, b, h, at_q, at_kv, Sq, Skv, ptrs, nums, gptrs, gnums)


@triton.jit(do_not_specialize=["table_r", "table_d", "length", "values_r", "values_d"])
def table_ends(  # type: ignore[no-untyped-def]
    Table, Values, Ends, table_r, table_d, length, values_r, values_d, CHUNK: tl.constexpr
):
    """Per row of a table [rows, length]: up to which index, and from which on, it is one number.

    One program per row.  A number that float32 does not add up with others well (or NaN) is none; where
    there are Values, [rows, ..], of which the table holds indices, what is said of numbers goes for them.
    """
    row = tl.program_id(0)
    base = Table + row.to(tl.int64) * table_r
    first = tl.load(base)
    last = tl.load(base + (length - 1).to(tl.int64) * table_d)
    at_first, at_last = first, last
    if Values is not None:
        values = Values + row.to(tl.int64) * values_r
        at_first = tl.load(values + first.to(tl.int64) * values_d)
        at_last = tl.load(values + last.to(tl.int64) * values_d)
    low = tl.where(tl.abs(at_first.to(tl.float32)) < MODERATE, length - 1, -1)
    high = tl.where(tl.abs(at_last.to(tl.float32)) < MODERATE, 0, length)
    for i in range(0, length, CHUNK):
        at = i + tl.arange(0, CHUNK)
        value = tl.load(base + at.to(tl.int64) * table_d, mask=at < length, other=0.0)
        low = tl.minimum(low, tl.min(tl.where((at < length) & (value != first), at - 1, length - 1), 0))
        high = tl.maximum(high, tl.max(tl.where((at < length) & (value != last), at + 1, 0), 0))
    tl.store(Ends + row * 2, low)
    tl.store(Ends + row * 2 + 1, high)


@triton.jit(do_not_specialize=["nums", "H", "Sq", "Skv"])
def gather_pairs(  # type: ignore[no-untyped-def]
    Pairs, ptrs, nums, H, Sq, Skv, LOAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Pairs [H, Sq, row] = what LOAD reads at h, q and kv; Skv keys fill a row up to the next eight."""
    row = (Skv + 7) // 8 * 8
    kv_tiles = (row + KEYS - 1) // KEYS
    h, tile = tl.program_id(0) % H, tl.program_id(0) // H
    q = (tile // kv_tiles * ROWS + tl.arange(0, ROWS))[:, None]
    key = (tile % kv_tiles * KEYS + tl.arange(0, KEYS))[None, :]
    kv = tl.minimum(key, Skv - 1)
    value = LOAD(0.0, h * 0, h, tl.minimum(q, Sq - 1), kv, Sq, Skv, ptrs, nums)
    at = (h.to(tl.int64) * Sq + q) * row + key
    tl.store(Pairs + at, value.to(Pairs.dtype.element_ty), mask=(q < Sq) & (key < row))
