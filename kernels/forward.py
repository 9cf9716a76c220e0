"""The forward kernel: online softmax over tiles (FlashAttention-2, Dao 2023, algorithm 1).

For one tile of BM query rows, over tiles of BN keys, with x = score(q·k, …) in base-2 units:

    m' = max(m, rowmax x)       p = 2^(x − m')       alpha = 2^(m − m')
    l  = alpha l + rowsum p     acc = alpha acc + drop(p) v
    out = acc / l               lse = ln 2 · m + ln l       max = ln 2 · m

A sink is one more x of the row, after the last tile, with which no v comes.

    q [B, H, Sq, D]   k [B, H_kv, Skv, D]   v [B, H_kv, Skv, DV]   out [B, H, Sq, DV]   lse max [B, H, Sq]

Strides along b, h and s come in units of 8 elements, which tells the compiler that rows are
aligned; the innermost stride is 1.  ``Map`` is the kv_map of ``block_map``: partial blocks run the
mask, full ones do not.  A row with no key (l = 0) is written as the mode DEAD asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from flashfuse.kernels.device_math import (
    LN2,
    LOG2E,
    as_written,
    dot_add,
    dot_rows,
    keep_draw,
    power_of_e,
    sink_of_rows,
)

UNSPECIALIZED = [
    "nums", "sqb", "sqh", "sqs", "skb", "skh", "sks", "svb", "svh", "svs", "sob", "soh", "sos",
    "H", "GROUP", "Sq", "Skv", "map_b", "map_h", "row", "threshold", "drop_scale",
]  # fmt: skip
DEAD_ZERO, DEAD_NAN, DEAD_MEAN = 0, 1, 2


@triton.jit
def tile_start(Blocks, i, n, BN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """First element of the i-th of n tiles of size BN in a list of blocks."""
    RATIO: tl.constexpr = BLOCK // BN
    block = tl.load(Blocks + i // RATIO, mask=i < n, other=0)
    return block * BLOCK + (i % RATIO) * BN


@triton.jit
def count_ends(Blocks, n, most, least, CHUNK: tl.constexpr = 128):  # type: ignore[no-untyped-def]
    """How many of an ascending list of n blocks are at most ``most``; of the others at least ``least``."""
    before = 0
    after = 0
    for i in range(0, n, CHUNK):
        at = i + tl.arange(0, CHUNK)
        block = tl.load(Blocks + at, mask=at < n, other=0)
        low = (at < n) & (block <= most)
        before += tl.sum(low.to(tl.int32), 0)
        after += tl.sum(((at < n) & (block >= least) & (low == 0)).to(tl.int32), 0)
    return before, after


@triton.jit
def tile_of_ends(Blocks, i, n, before, after, BN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """First element of the i-th tile of the first ``before`` and the last ``after`` of n blocks."""
    RATIO: tl.constexpr = BLOCK // BN
    between = (n - before - after) * RATIO
    return tile_start(Blocks, tl.where(i < before * RATIO, i, i + between), n * RATIO, BN, BLOCK)


@triton.jit
def tile_of_rest(  # type: ignore[no-untyped-def]
    Row, i, partial, full, before, after, BN: tl.constexpr, BLOCK: tl.constexpr
):
    """First element of the i-th tile of a row of the map: partial blocks, then full ones less ends."""
    RATIO: tl.constexpr = BLOCK // BN
    skipped = tl.where(i < partial * RATIO, 0, before * RATIO)
    return tile_start(Row + 2, i + skipped, (partial + full - after) * RATIO, BN, BLOCK)


@triton.jit
def count_ends_of_range(n, most, least):  # type: ignore[no-untyped-def]
    """The same of the list 0, …, n − 1."""
    before = tl.minimum(tl.maximum(most + 1, 0), n)
    return before, tl.minimum(tl.maximum(n - least, 0), n - before)


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    base, rows, stride, size, D: tl.constexpr, D_PAD: tl.constexpr, CHECK: tl.constexpr
):
    """[ROWS, D_PAD] of a matrix [size, D] with row stride 8·stride; zero outside."""
    d = tl.arange(0, D_PAD)
    ptrs = base + rows[:, None] * (stride * 8) + d[None, :]
    if CHECK and D < D_PAD:
        return tl.load(ptrs, mask=(rows < size)[:, None] & (d < D)[None, :], other=0.0)
    elif CHECK:
        return tl.load(ptrs, mask=(rows < size)[:, None], other=0.0)
    elif D < D_PAD:
        return tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


def descriptor_of(
    sizes: Sequence[int], strides: Sequence[int], rows: int, columns: int
) -> Callable[[Any], Any]:
    """What makes descriptors of tensors [B, H, S, D] like that, which are read in tiles [rows, columns]."""
    # An axis of one element may have any stride.
    known = {
        "shape": list(sizes),
        "strides": [s if n > 1 else 8 for n, s in zip(sizes[:3], strides[:3], strict=True)] + [1],
        "block_shape": [1, 1, rows, columns],
        "padding": "zero",
        "round_f32_to_tf32": False,
    }

    def make(t: Any) -> Any:
        # Not by the constructor: its checks, which the site has made, take longer than a launch.
        made = object.__new__(TensorDescriptor)
        made.__dict__.update(known, base=t)
        return made

    return make


@triton.jit
def plane_of(X, b, h, stride_b, stride_h):  # type: ignore[no-untyped-def]
    """What :func:`load_tile` reads rows of X [B, H, S, D] from, at (b, h): X is a pointer or a descriptor."""
    if isinstance(X, tl.tensor_descriptor):
        return (X, b, h)
    else:
        return (X + b.to(tl.int64) * 8 * stride_b + h.to(tl.int64) * 8 * stride_h, b, h)


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    plane, start, local, stride, size, D: tl.constexpr, D_PAD: tl.constexpr, CHECK: tl.constexpr
):
    """[ROWS, D_PAD] from row ``start`` on of a plane [size, D]; zero outside."""
    base, b, h = plane
    if isinstance(base, tl.tensor_descriptor):
        ROWS: tl.constexpr = local.shape[0]
        return tl.reshape(base.load([b, h, start, 0]), [ROWS, D_PAD])
    else:
        return load_rows(base + start.to(tl.int64) * 8 * stride, local, stride, size - start, D, D_PAD, CHECK)


@triton.jit
def along_keys(columns, b, h, Sq, Skv, ptrs, nums, SCORE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BN]: what a score that is a line over the keys gains over the columns of a tile."""
    zeros = tl.zeros_like(columns)
    value = SCORE(0.0, b, h, zeros, columns, Sq, Skv, ptrs, nums)
    return value - SCORE(0.0, b, h, zeros, zeros, Sq, Skv, ptrs, nums)


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    acc, l, m, q, k_plane, v_plane, sks, svs, start, partial, q_first, q_rows, b, h, Sq, Skv, ptrs, nums,
    seed, bh, threshold,
    SCORE: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DROPOUT: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr = None, LINE: tl.constexpr = False,
):  # fmt: skip
    """One tile of BN keys into acc [BM, DV_PAD], l [BM], m [BM]; only a ``partial`` one runs the mask.

    FLAT is a where the score is a s + t, with one number t for the tile, or one for each row and, of a LINE,
    one for each column.
    """
    start = tl.cast(start, tl.int32)
    columns = tl.arange(0, BN)
    k = load_tile(k_plane, start, columns, sks, Skv, D, D_PAD, CHECK)  # [BN, D_PAD]
    s = dot_rows(q, k, PRECISION)  # [BM, BN]
    kv = start + columns
    inside = (kv < Skv)[None, :]
    if CHECK:
        kv = tl.minimum(kv, Skv - 1)
    if SCALE is None and FLAT is None:
        s = SCORE(s, b, h, q_rows[:, None], kv[None, :], Sq, Skv, ptrs, nums)
    if MASK is not None:
        if partial:
            allowed = MASK(b, h, q_rows[:, None], kv[None, :], Sq, Skv, ptrs, nums)
            if CHECK:
                allowed = allowed & inside
            s = tl.where(allowed, s, float("-inf"))
    elif CHECK:
        s = tl.where(inside, s, float("-inf"))
    if FLAT is not None:
        if LINE:
            t = SCORE(0.0, b, h, q_rows, start, Sq, Skv, ptrs, nums)
            s = s * FLAT + along_keys(columns, b, h, Sq, Skv, ptrs, nums, SCORE)[None, :]
            m_new = tl.maximum(m, tl.max(s, 1) + t)
        else:
            t = SCORE(0.0, b, h, q_first, start, Sq, Skv, ptrs, nums)
            m_new = tl.maximum(m, tl.max(s, 1) * FLAT + t)
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
        UNIT: tl.constexpr = LOG2E if LINE else FLAT * LOG2E
        p = tl.exp2(s * UNIT + ((t - m_used) * LOG2E)[:, None])
        alpha = tl.exp2((m - m_used) * LOG2E)
    elif SCALE is not None:
        m_new = tl.maximum(m, tl.max(s, 1) * SCALE)
        # While a row has seen no key, 0 stands for its maximum: −inf − (−inf) is not a number.
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * SCALE - m_used[:, None])  # [BM, BN]
        alpha = tl.exp2(m - m_used)
    else:
        m_new = tl.maximum(m, tl.max(s, 1))
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
        if FOLDED:
            p = tl.exp2(s - m_used[:, None])
            alpha = tl.exp2(m - m_used)
        else:
            # Scores may be huge (a loaded −3.4e38): subtract before changing the base.
            p = power_of_e(s - m_used[:, None], 0.0, PRECISION)
            alpha = power_of_e(m - m_used, 0.0, PRECISION)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if DROPOUT:
        draw = keep_draw(seed, bh, q_first, start, BM, BN)
        p = as_written(tl.where(draw >= threshold, p, 0.0))
    v = load_tile(v_plane, start, columns, svs, Skv, DV, DV_PAD, CHECK)  # [BN, DV_PAD]
    acc = dot_add(p.to(v.dtype), v, acc, PRECISION)
    return acc, l, m_new


@triton.jit
def row_maximum(m, l, BASE_2: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest score of rows, whose running maximum m leaves NaN out: their sum l does not."""
    m = tl.where((l != l) & (m < float("inf")), float("nan"), m)
    if BASE_2:
        m = m * LN2
    return m


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward(  # type: ignore[no-untyped-def]
    Q, K, V, Out, Lse, Max, Map, Seed, DeadMean, Ends, ptrs, nums,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sob, soh, sos,
    H, GROUP, Sq, Skv, map_b, map_h, row, threshold, drop_scale,
    SCORE: tl.constexpr, MASK: tl.constexpr, SINK: tl.constexpr, ENDS: tl.constexpr,
    FLAT: tl.constexpr, LINE: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr, DEAD: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program per (b, h, tile of BM rows).  SCALE is log2(e)·c where the score is s·c, else None.

    DeadMean is the mean of v over kv, [B, H_kv, DV] float32, for DEAD_MEAN.  Max may be None.
    """
    tiles = (Sq + BM - 1) // BM
    bh = tl.program_id(0) // tiles
    # Last rows first: under a causal mask they are the longest.
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = bh // H
    h = bh % H
    kvh = h // GROUP
    b64, h64 = b.to(tl.int64) * 8, h.to(tl.int64) * 8
    first = tile * BM
    local = tl.arange(0, BM)
    partial, full, start = 0, 0, 0
    if MASK is not None:
        # Asked for before all else, for what the loop loads waits for it.
        Row = Map + b.to(tl.int64) * map_b + h.to(tl.int64) * map_h + (first // BLOCK).to(tl.int64) * row
        partial, full, start = tl.load(Row), tl.load(Row + 1), tl.load(Row + 2) * BLOCK
    q_base = Q + b64 * sqb + h64 * sqh + first.to(tl.int64) * 8 * sqs
    k_plane = plane_of(K, b, kvh, skb, skh)
    v_plane = plane_of(V, b, kvh, svb, svh)
    q = load_rows(q_base, local, sqs, Sq - first, D, D_PAD, not EVEN)  # [BM, D_PAD]
    # Rows past the end repeat the last one, so that loads of captures stay inside; they are not stored.
    q_rows = tl.minimum(first + local, Sq - 1)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)
    acc = tl.zeros([BM, DV_PAD], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    most, least = 0, 0
    if ENDS is not None:
        low, high = ENDS(Ends, b, h, Sq, Skv, ptrs, nums)
        # The last and the first key of a tile that lies all within the one end and the other.
        most, least = low + first, high + first + BM - 1

    before, after = 0, 0
    if MASK is not None:
        if ENDS is not None:
            Full = Row + 2 + partial
            before, after = count_ends(Full, full, (most + 1) // BLOCK - 1, (least + BLOCK - 1) // BLOCK)
            num_tiles = (before + after) * (BLOCK // BN)
            start = tile_of_ends(Full, 0, full, before, after, BN, BLOCK)
            for i in range(0, num_tiles):
                acc, l, m = attend(
                    acc, l, m, q, k_plane, v_plane, sks, svs, start, False, first, q_rows, b, h, Sq, Skv,
                    ptrs, nums, seed, bh, threshold,
                    SCORE, None, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, False, PRECISION,
                    FLAT, LINE,
                )  # fmt: skip
                start = tile_of_ends(Full, i + 1, full, before, after, BN, BLOCK)
            start = tile_of_rest(Row, 0, partial, full, before, after, BN, BLOCK)
        num_tiles = (partial + full - before - after) * (BLOCK // BN)
        for i in range(0, num_tiles):
            acc, l, m = attend(
                acc, l, m, q, k_plane, v_plane, sks, svs, start, i < partial * (BLOCK // BN), first, q_rows,
                b, h, Sq, Skv, ptrs, nums, seed, bh, threshold,
                SCORE, MASK, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, not EVEN, PRECISION,
            )  # fmt: skip
            start = tile_of_rest(Row, i + 1, partial, full, before, after, BN, BLOCK)
    else:
        whole = Skv // BN * BN
        if ENDS is not None:
            before, after = count_ends_of_range(Skv // BN, (most + 1) // BN - 1, (least + BN - 1) // BN)
            for i in range(0, before + after):
                start = tl.where(i < before, i, i + Skv // BN - before - after) * BN
                acc, l, m = attend(
                    acc, l, m, q, k_plane, v_plane, sks, svs, start, False, first, q_rows, b, h, Sq, Skv,
                    ptrs, nums, seed, bh, threshold,
                    SCORE, None, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, False, PRECISION,
                    FLAT, LINE,
                )  # fmt: skip
        for start in range(before * BN, whole - after * BN, BN):
            acc, l, m = attend(
                acc, l, m, q, k_plane, v_plane, sks, svs, start, False, first, q_rows, b, h, Sq, Skv,
                ptrs, nums, seed, bh, threshold,
                SCORE, None, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, False, PRECISION,
            )  # fmt: skip
        if not EVEN:  # noqa: SIM102 (known when compiled; the inner one is not)
            if whole < Skv:
                acc, l, m = attend(
                    acc, l, m, q, k_plane, v_plane, sks, svs, whole, False, first, q_rows, b, h, Sq, Skv,
                    ptrs, nums, seed, bh, threshold,
                    SCORE, None, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, True, PRECISION,
                )  # fmt: skip

    if SINK is not None:
        sink = sink_of_rows(b, h, q_rows, Sq, Skv, ptrs, nums, SINK, SCALE is not None or FOLDED, BM)
        m_new = tl.maximum(m, sink)
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
        if SCALE is not None or FOLDED:
            p = tl.exp2(sink - m_used)
            alpha = tl.exp2(m - m_used)
        else:
            p = power_of_e(sink - m_used, 0.0, PRECISION)
            alpha = power_of_e(m - m_used, 0.0, PRECISION)
        l = l * alpha + p
        acc = acc * alpha[:, None]
        m = m_new

    # Not m = −inf: a row of NaN scores is not dead.
    dead = l == 0.0
    l_used = tl.where(dead, 1.0, l)
    factor = 1.0 / l_used
    if DROPOUT:
        factor = factor * drop_scale
    acc = acc * factor[:, None]
    d = tl.arange(0, DV_PAD)
    if DEAD == 1:
        acc = tl.where(dead[:, None], float("nan"), acc)
    elif DEAD == 2:
        mean = tl.load(DeadMean + (b.to(tl.int64) * (H // GROUP) + kvh) * DV + d, mask=d < DV, other=0.0)
        acc = tl.where(dead[:, None], mean[None, :], acc)
    if SCALE is not None or FOLDED:
        lse = (m + tl.log2(l_used)) * LN2
    else:
        lse = m + tl.log2(l_used) * LN2
    lse = tl.where(dead, float("-inf"), lse)
    in_range = local < Sq - first
    rows = bh.to(tl.int64) * Sq + first + local
    tl.store(Lse + rows, lse, mask=in_range)
    if Max is not None:
        tl.store(Max + rows, row_maximum(m, l, SCALE is not None or FOLDED), mask=in_range)
    o_base = Out + b64 * sob + h64 * soh + first.to(tl.int64) * 8 * sos
    o_ptrs = o_base + local[:, None] * (sos * 8) + d[None, :]
    tl.store(o_ptrs, acc.to(Out.dtype.element_ty), mask=in_range[:, None] & (d < DV)[None, :])
