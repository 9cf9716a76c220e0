"""What the backward keeps of each row: ``Stats``, and which rows are dead.

    Stats [B, H, Sq, 2] float32: lse and delta; unless FOLDED [B, H, Sq, 4]: lse, delta, norm, and log2(e) lse
    + norm, less what a LINE gains from the first query of its tile on

One of two kernels fills them: ``backward_prepare``, or ``backward_rows`` where sums over the keys of a row
are needed again.  The kernels of ``backward`` and ``tables`` read them; see there for the formulas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashfuse.kernels.device_math import LOG2E, dot_rows, keep_draw, power_of_e, sink_of_rows, sum_up
from flashfuse.kernels.forward import load_rows, tile_of_rest

HUGE_LSE: tl.constexpr = tl.constexpr(4096.0)


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    x, lse, norm, Skv, FOLDED: tl.constexpr, UNIFORM: tl.constexpr, PRECISION: tl.constexpr
):
    """P of a tile of scores x, from the statistics of its rows."""
    if UNIFORM:
        return tl.where(lse == float("inf"), 1.0 / Skv, 0.0) + tl.zeros_like(x)
    elif FOLDED:
        return tl.exp2(x - lse)
    else:
        return power_of_e(x - lse, norm, PRECISION)


@triton.jit
def _lse_and_delta(  # type: ignore[no-untyped-def]
    Out, DOut, Lse, Dead, sob, soh, sos, sgb, sgh, sgs, bh, first, H, Sq,
    DV: tl.constexpr, DV_PAD: tl.constexpr, FOLDED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """lse as the other kernels want it, base 2 where FOLDED and +∞ in dead rows and past the last, and delta.

    Into Dead, unless None: 1 where a row of this program's tile is dead, else 0, by program.
    """
    b64, h64 = (bh // H).to(tl.int64) * 8, (bh % H).to(tl.int64) * 8
    local = tl.arange(0, BM)
    first64 = first.to(tl.int64) * 8
    out = load_rows(Out + b64 * sob + h64 * soh + first64 * sos, local, sos, Sq - first, DV, DV_PAD, True)
    do = load_rows(DOut + b64 * sgb + h64 * sgh + first64 * sgs, local, sgs, Sq - first, DV, DV_PAD, True)
    rows = bh.to(tl.int64) * Sq + first + local
    inside = local < Sq - first
    lse = tl.load(Lse + rows, mask=inside, other=float("inf"))
    dead = lse == float("-inf")
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    # Where the mode made the row NaN, its weights of 0 must still give 0.
    delta = tl.where(dead & (delta != delta), 0.0, delta)
    if FOLDED:
        lse = lse * LOG2E
    if Dead is not None:
        tl.store(Dead + tl.program_id(0), tl.max(dead.to(tl.int32), 0))
    return tl.where(dead, float("inf"), lse), delta


@triton.jit
def any_dead_row(Dead, group, flags):  # type: ignore[no-untyped-def]
    """Whether a row is dead in the heads of a group, of which ``Dead`` has so many flags."""
    base = Dead + group.to(tl.int64) * flags
    found = tl.zeros([128], tl.int32)
    for i in range(0, flags, 128):
        at = i + tl.arange(0, 128)
        found |= tl.load(base + at, mask=at < flags, other=0)
    return tl.max(found, 0) > 0


@triton.jit(do_not_specialize=["sob", "soh", "sos", "sgb", "sgh", "sgs", "H", "Sq"])
def backward_prepare(  # type: ignore[no-untyped-def]
    Out, DOut, Lse, Stats, Dead, sob, soh, sos, sgb, sgh, sgs, H, Sq,
    DV: tl.constexpr, DV_PAD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Stats, of a FOLDED program that needs no sums of rows."""
    tiles = (Sq + BM - 1) // BM
    bh = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BM
    lse, delta = _lse_and_delta(
        Out, DOut, Lse, Dead, sob, soh, sos, sgb, sgh, sgs, bh, first, H, Sq, DV, DV_PAD, True, BM
    )
    local = tl.arange(0, BM)
    at = bh.to(tl.int64) * Sq + first + local
    tl.store(Stats + at * 2, lse, mask=local < Sq - first)
    tl.store(Stats + at * 2 + 1, delta, mask=local < Sq - first)


@triton.jit(
    do_not_specialize=[
        "nums", "sqb", "sqh", "sqs", "skb", "skh", "sks", "svb", "svh", "svs", "sgb", "sgh", "sgs",
        "sob", "soh", "sos", "H", "GROUP", "Sq", "Skv", "map_b", "map_h", "row", "threshold", "drop_scale",
    ]
)  # fmt: skip
def backward_rows(  # type: ignore[no-untyped-def]
    Q, K, V, DOut, Out, Lse, Stats, Dead, Map, Seed, ptrs, nums,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sgb, sgh, sgs, sob, soh, sos,
    H, GROUP, Sq, Skv, map_b, map_h, row, threshold, drop_scale,
    SCORE: tl.constexpr, MASK: tl.constexpr, SINK: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    EXACT: tl.constexpr, LINE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Stats, with row sums again from the scores: norm = log2 of the weights' sum; if EXACT, delta = Σ P dP.

    One program per (b, h, tile of BM rows); ``Map`` is the kv_map.

    The sink's weight is in the sum, and has no dP.  Norm is 0 but for the rounding of lse.  It matters
    where lse cannot hold it: at a row maximum of −3.4e38 (a finite mask over every key) float32 drops
    the ``ln l`` of lse = m + ln l, and the sum is l.  Unless EXACT, only such rows are summed.  A FOLDED
    program has no norm.

    Where the score is a line over q and kv, LINE is the tile of queries in the kernel of dk and dv.
    """
    tiles = (Sq + BM - 1) // BM
    bh = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BM
    b = bh // H
    h = bh % H
    local = tl.arange(0, BM)
    inside = local < Sq - first
    at = bh.to(tl.int64) * Sq + first + local
    WIDTH: tl.constexpr = 2 if FOLDED else 4
    lse, delta = _lse_and_delta(
        Out, DOut, Lse, Dead, sob, soh, sos, sgb, sgh, sgs, bh, first, H, Sq, DV, DV_PAD, FOLDED, BM
    )
    live = tl.abs(lse) < float("inf")
    if not EXACT:
        live = live & (tl.abs(lse) > HUGE_LSE)
    norm = tl.zeros([BM], tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        b64, h64, kvh64 = b.to(tl.int64) * 8, h.to(tl.int64) * 8, (h // GROUP).to(tl.int64) * 8
        first64 = first.to(tl.int64) * 8
        q = load_rows(Q + b64 * sqb + h64 * sqh + first64 * sqs, local, sqs, Sq - first, D, D_PAD, True)
        if EXACT:
            do_base = DOut + b64 * sgb + h64 * sgh + first64 * sgs
            do = load_rows(do_base, local, sgs, Sq - first, DV, DV_PAD, True)
            seed = 0
            if DROPOUT:
                seed = tl.load(Seed)
            weighted, weighted_low = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        rows = tl.minimum(first + local, Sq - 1)
        k_base = K + b64 * skb + kvh64 * skh
        v_base = V + b64 * svb + kvh64 * svh
        total, total_low = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        num_tiles, partial, full, start = (Skv + BN - 1) // BN, 0, 0, 0
        if MASK is not None:
            Row = Map + b.to(tl.int64) * map_b + h.to(tl.int64) * map_h + (first // BLOCK).to(tl.int64) * row
            partial, full, start = tl.load(Row), tl.load(Row + 1), tl.load(Row + 2) * BLOCK
            num_tiles = (partial + full) * (BLOCK // BN)
        for i in range(0, num_tiles):
            start = tl.cast(start, tl.int32)
            offset = start.to(tl.int64) * 8
            columns = tl.arange(0, BN)
            k = load_rows(k_base + offset * sks, columns, sks, Skv - start, D, D_PAD, True)
            s = dot_rows(q, k, PRECISION)  # [BM, BN]
            kv = tl.minimum(start + columns, Skv - 1)
            if SCALE is not None:
                x = s * SCALE
            else:
                x = SCORE(s, b, h, rows[:, None], kv[None, :], Sq, Skv, ptrs, nums)
            p = weights_of(x, lse[:, None], norm[:, None], Skv, FOLDED, False, PRECISION)
            p = tl.where((start + columns < Skv)[None, :], p, 0.0)
            if MASK is not None:  # noqa: SIM102 (known when compiled; the inner one is not)
                if i < partial * (BLOCK // BN):
                    p = tl.where(MASK(b, h, rows[:, None], kv[None, :], Sq, Skv, ptrs, nums), p, 0.0)
            total, total_low = sum_up(total, total_low, tl.sum(p, 1))
            if EXACT:
                v = load_rows(v_base + offset * svs, columns, svs, Skv - start, DV, DV_PAD, True)
                dp = dot_rows(do, v, PRECISION)
                if DROPOUT:
                    keep = keep_draw(seed, bh, first, start, BM, BN) >= threshold
                    dp = tl.where(keep, dp * drop_scale, 0.0)
                weighted, weighted_low = sum_up(weighted, weighted_low, tl.sum(p * dp, 1))
            if MASK is not None:
                start = tile_of_rest(Row, i + 1, partial, full, 0, 0, BN, BLOCK)
            else:
                start += BN
        if SINK is not None:
            sink = sink_of_rows(b, h, rows, Sq, Skv, ptrs, nums, SINK, FOLDED, BM)
            total += weights_of(sink, lse, norm, Skv, FOLDED, False, PRECISION)
        norm = tl.where(live, tl.log2(total), 0.0)
        if EXACT:
            delta = tl.where(live, weighted / total, delta)
    tl.store(Stats + at * WIDTH, lse, mask=inside)
    tl.store(Stats + at * WIDTH + 1, delta, mask=inside)
    if not FOLDED:
        tl.store(Stats + at * WIDTH + 2, norm, mask=inside)
        if LINE is not None:
            zeros = tl.zeros_like(local)
            lse -= SCORE(0.0, b, h, (first + local) % LINE, zeros, Sq, Skv, ptrs, nums)
            lse += SCORE(0.0, b, h, zeros, zeros, Sq, Skv, ptrs, nums)
        tl.store(Stats + at * WIDTH + 3, lse * LOG2E + norm, mask=inside)


@triton.jit
def load_stats(Stats, rows, inside, CHECK: tl.constexpr, FOLDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(lse, delta, norm) of ``rows``; where not ``inside`` +∞, 0 and 0, with which the weights vanish."""
    WIDTH: tl.constexpr = 2 if FOLDED else 4
    if CHECK:
        lse = tl.load(Stats + rows * WIDTH, mask=inside, other=float("inf"))
        delta = tl.load(Stats + rows * WIDTH + 1, mask=inside, other=0.0)
    else:
        lse = tl.load(Stats + rows * WIDTH)
        delta = tl.load(Stats + rows * WIDTH + 1)
    norm = lse
    if not FOLDED:
        if CHECK:
            norm = tl.load(Stats + rows * WIDTH + 2, mask=inside, other=0.0)
        else:
            norm = tl.load(Stats + rows * WIDTH + 2)
    return lse, delta, norm


@triton.jit
def load_stats_of_columns(  # type: ignore[no-untyped-def]
    Stats, rows, inside, ROWS: tl.constexpr, CHECK: tl.constexpr, FOLDED: tl.constexpr, LAST: tl.constexpr
):
    """The same, for a tile of scores with the rows as its columns; if LAST, the last of ``Stats`` for lse.

    There a thread needs many rows.  Vectors of fewer than 128 numbers it would read for itself; one tile of
    so many the threads read together.  Half as many numbers are read twice for that.
    """
    WIDTH: tl.constexpr = 2 if FOLDED else 4
    if ROWS < 32:
        lse, delta, norm = load_stats(Stats, rows, inside, CHECK, FOLDED)
        if LAST:
            lse = tl.load(Stats + rows * WIDTH + 3, mask=inside, other=float("inf"))
    else:
        COLUMNS: tl.constexpr = 4 if ROWS < 64 else WIDTH
        at = (rows * WIDTH)[:, None] + tl.arange(0, COLUMNS)[None, :] % WIDTH
        if CHECK:
            stats = tl.load(Stats + at, mask=inside[:, None], other=0.0)
        else:
            stats = tl.load(Stats + at)
        # [.., i] of the first and of the second half: lse and delta; norm and the last, or again those.
        if COLUMNS == 4:
            even, odd = tl.split(tl.reshape(stats, [ROWS, 2, 2]))
            lse, norm = tl.split(even)
            delta, last = tl.split(odd)
            if LAST:
                lse = last
        else:
            lse, delta = tl.split(stats)
            norm = lse
        if CHECK:
            lse = tl.where(inside, lse, float("inf"))
    return lse, delta, norm
