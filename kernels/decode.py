"""The forward kernels for few queries: keys in splits, heads of a group in one tile.

A decoding step has one query and many keys.  A program per (b, h, tile of queries) would leave most of
the device idle and read k and v once for every head of a group.  Here a program takes the rows of all
G = H / H_kv heads that share a key head, times Sq queries, against one split of the keys
(Flash-Decoding: Dao, Haziza, Massa, Sizov 2023, https://pytorch.org/blog/flash-decoding/), by the online
softmax of ``forward`` (FlashAttention-2, Dao 2023, algorithm 1), and leaves of each row

    m_i = max_j x_j      l_i = Σ_j 2^(x_j − m_i)      acc_i = Σ_j 2^(x_j − m_i) v_j       j in split i

in float32.  A second kernel, a program per row, adds the splits up,

    m = max_i m_i      l = Σ_i 2^(m_i − m) l_i      out = Σ_i 2^(m_i − m) acc_i / l      lse = ln 2 · m + ln l

with the sink as one more term of m and l, and writes rows without a key as the mode DEAD asks.

    parts [B, H, Sq, splits, DV + 8] float32: acc, m, l, and what keeps rows aligned

The other arrays are those of ``forward``.  Where there is a block map, the splits are equal parts of its
list of blocks, so that keys which nobody attends to cost nothing and leave no program without work.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from flashfuse.kernels.device_math import LN2, LOG2E, sink_of_rows
from flashfuse.kernels.forward import attend, load_rows, plane_of, row_maximum, tile_start

MAX_QUERIES = 16
"""Longer sites have enough tiles of queries, or enough work in each."""

FEWEST_KEYS = 128
"""Keys of a split: what a split leaves behind is then little beside what it reads."""

MAX_SPLITS = 128
PROGRAMS_PER_PROCESSOR = 2


@functools.lru_cache(maxsize=4096)
def split_count(programs: int, most: int, processors: int) -> int:
    """How many splits of the keys, 1 … min(``most``, 128), where one split makes ``programs`` programs.

    The fewest that keep the device nearly as busy (85 %) as the best number would: the last of the waves in
    which programs run should be full (the rule of FlashAttention-2's ``num_splits_heuristic``).
    """
    slots = PROGRAMS_PER_PROCESSOR * processors
    counts = range(1, max(1, min(most, MAX_SPLITS)) + 1)
    busy = [programs * n / (-(-programs * n // slots) * slots) for n in counts]
    return next(n for n, share in zip(counts, busy, strict=True) if share >= 0.85 * max(busy))


@triton.jit(
    do_not_specialize=[
        "nums", "sqb", "sqh", "sqs", "skb", "skh", "sks", "svb", "svh", "svs", "H", "GROUP", "Sq", "Skv",
        "map_b", "map_h", "splits",
    ]
)  # fmt: skip
def decode_split(  # type: ignore[no-untyped-def]
    Q, K, V, Parts, Map, ptrs, nums,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, H, GROUP, Sq, Skv, map_b, map_h, splits,
    SCORE: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program per (b, kv head, tile of BM of the GROUP · Sq rows, split).

    ``Map`` is the kv_map, or None: then every key is visited, under the mask if there is one.
    """
    split = tl.program_id(0) % splits
    rest = tl.program_id(0) // splits
    tiles = (GROUP * Sq + BM - 1) // BM
    kv_heads = H // GROUP
    b = rest // tiles // kv_heads
    kvh = rest // tiles % kv_heads
    b64 = b.to(tl.int64) * 8
    local = rest % tiles * BM + tl.arange(0, BM)
    in_range = local < GROUP * Sq
    # Rows past the end repeat the last one, so that loads stay inside; they are not stored.
    row = tl.minimum(local, GROUP * Sq - 1)
    h = kvh * GROUP + row // Sq  # [BM]
    q_rows = row % Sq
    q_base = Q + b64 * sqb
    d = tl.arange(0, D_PAD)
    q_ptrs = q_base + h.to(tl.int64)[:, None] * 8 * sqh + q_rows.to(tl.int64)[:, None] * 8 * sqs + d[None, :]
    if D < D_PAD:
        q = tl.load(q_ptrs, mask=(d < D)[None, :], other=0.0)  # [BM, D_PAD]
    else:
        q = tl.load(q_ptrs)
    k_plane = plane_of(K, b, kvh, skb, skh)
    v_plane = plane_of(V, b, kvh, svb, svh)
    acc = tl.zeros([BM, DV_PAD], tl.float32)
    l = tl.zeros([BM], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)

    if Map is not None:
        # The lists of partial and of full blocks lie one behind the other.
        Row = Map + b.to(tl.int64) * map_b + kvh.to(tl.int64) * map_h
        partial = tl.load(Row) * (BLOCK // BN)
        total = partial + tl.load(Row + 1) * (BLOCK // BN)
        share = (total + splits - 1) // splits
        first = tl.minimum(split * share, total)
        end = tl.minimum(first + share, total)
        start = tile_start(Row + 2, first, end, BN, BLOCK)
        for i in range(first, end):
            acc, l, m = attend(
                acc, l, m, q, k_plane, v_plane, sks, svs, start, i < partial, 0, q_rows, b, h[:, None], Sq,
                Skv, ptrs, nums, 0, 0, 0,
                SCORE, MASK, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, False, True, PRECISION,
            )  # fmt: skip
            start = tile_start(Row + 2, i + 1, end, BN, BLOCK)
    else:
        whole = Skv // BN
        total = (Skv + BN - 1) // BN
        share = (total + splits - 1) // splits
        first = tl.minimum(split * share, total)
        end = tl.minimum(first + share, total)
        for i in range(first, tl.minimum(end, whole)):
            acc, l, m = attend(
                acc, l, m, q, k_plane, v_plane, sks, svs, i * BN, True, 0, q_rows, b, h[:, None], Sq, Skv,
                ptrs, nums, 0, 0, 0,
                SCORE, MASK, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, False, False, PRECISION,
            )  # fmt: skip
        if (first <= whole) & (whole < end):
            acc, l, m = attend(
                acc, l, m, q, k_plane, v_plane, sks, svs, whole * BN, True, 0, q_rows, b, h[:, None], Sq, Skv,
                ptrs, nums, 0, 0, 0,
                SCORE, MASK, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, False, True, PRECISION,
            )  # fmt: skip

    slot = ((b * H + h).to(tl.int64) * Sq + q_rows) * splits + split  # [BM]
    at = Parts + slot * (DV + 8)
    dv = tl.arange(0, DV_PAD)
    # Of a split in which a row saw no key, l = 0 says enough.
    seen = in_range & (l != 0.0)
    tl.store(at[:, None] + dv[None, :], acc, mask=seen[:, None] & (dv < DV)[None, :])
    tl.store(at + DV, m, mask=in_range)
    tl.store(at + DV + 1, l, mask=in_range)


@triton.jit(
    do_not_specialize=[
        "nums", "svb", "svh", "svs", "sob", "soh", "sos", "H", "GROUP", "Sq", "Skv", "splits",
    ]
)  # fmt: skip
def decode_combine(  # type: ignore[no-untyped-def]
    Parts, V, Out, Lse, Max, ptrs, nums, svb, svh, svs, sob, soh, sos, H, GROUP, Sq, Skv, splits,
    SINK: tl.constexpr, BASE_2: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, DEAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per row (b, h, q).  BASE_2: m is in units of log 2.  Max may be None."""
    index = tl.program_id(0)
    q = index % Sq
    h = index // Sq % H
    b = index // Sq // H
    UNIT: tl.constexpr = 1.0 if BASE_2 else LOG2E
    base = Parts + index.to(tl.int64) * splits * (DV + 8)
    i = tl.arange(0, SPLITS_PAD)
    m = tl.load(base + i * (DV + 8) + DV, mask=i < splits, other=float("-inf"))
    l = tl.load(base + i * (DV + 8) + DV + 1, mask=i < splits, other=0.0)
    top = tl.max(m, 0)
    if SINK is not None:
        sink = tl.max(sink_of_rows(b, h, q, Sq, Skv, ptrs, nums, SINK, BASE_2, 1), 0)
        top = tl.maximum(top, sink)
    # While a row has seen no key, 0 stands for its maximum: −inf − (−inf) is not a number.
    used = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(l * tl.exp2((m - used) * UNIT), 0)
    if SINK is not None:
        total += tl.exp2((sink - used) * UNIT)
    d = tl.arange(0, DV_PAD)
    acc = tl.zeros([DV_PAD], tl.float32)
    for start in range(0, splits, CHUNK):
        few = start + tl.arange(0, CHUNK)
        at = base + few * (DV + 8)
        m_few = tl.load(at + DV, mask=few < splits, other=float("-inf"))
        l_few = tl.load(at + DV + 1, mask=few < splits, other=0.0)
        seen = (l_few != 0.0)[:, None] & (d < DV)[None, :]
        part = tl.load(at[:, None] + d[None, :], mask=seen, other=0.0)  # [CHUNK, DV_PAD]
        acc += tl.sum(part * tl.exp2((m_few - used) * UNIT)[:, None], 0)

    if Max is not None:
        tl.store(Max + index.to(tl.int64), row_maximum(top, total, BASE_2))

    # Not top = −inf: a row of NaN scores is not dead.
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    acc = acc / total
    if DEAD == 1:
        acc = tl.where(dead, float("nan"), acc)
    elif DEAD == 2:  # noqa: SIM102 (known when compiled; the inner one is not)
        if dead:
            # Rare, so v is read again here instead of at every call.
            v_base = V + b.to(tl.int64) * 8 * svb + (h // GROUP).to(tl.int64) * 8 * svh
            rows = tl.arange(0, CHUNK)
            acc = tl.zeros([DV_PAD], tl.float32)
            for start in range(0, Skv, CHUNK):
                first = tl.cast(start, tl.int32)
                v = load_rows(v_base + first.to(tl.int64) * 8 * svs, rows, svs, Skv - first, DV, DV_PAD, True)
                acc += tl.sum(v.to(tl.float32), 0)
            acc = acc / Skv
    if BASE_2:
        lse = (top + tl.log2(total)) * LN2
    else:
        lse = top + tl.log2(total) * LN2
    tl.store(Lse + index.to(tl.int64), tl.where(dead, float("-inf"), lse))
    o_base = Out + b.to(tl.int64) * 8 * sob + h.to(tl.int64) * 8 * soh + q.to(tl.int64) * 8 * sos
    tl.store(o_base + d, acc.to(Out.dtype.element_ty), mask=d < DV)
