"""The backward kernels (FlashAttention-2, Dao 2023, algorithm 2, in two passes instead of atomic additions).

With P the softmax weights, R the dropout keep-mask over 1 − p (1 without dropout):

    delta_i = do_i · out_i                      dP = (do vᵀ) ∘ R
    dS = P ∘ (dP − delta)                       dX = dS ∘ d score / d s
    dv = (P ∘ R)ᵀ do      dk = dXᵀ q      dq = dX k      d capture += Σ dS · d score / d load

    q dq [B, H, Sq, D]   k dk [B, H_kv, Skv, D]   v dv [B, H_kv, Skv, DV]   do out [B, H, Sq, DV]
    Stats [B, H, Sq, 2 or 4]: what ``row_stats`` keeps of each row

One kernel walks the queries of a tile of keys (dk, dv; it sums over the heads of a group), one the
keys of a tile of queries (dq, captures).  P is recomputed as 2^(x − lse).  A dead row has lse = +∞
here, so that its weights vanish.  Where such rows attend to every key alike, the same kernels run
once more as UNIFORM, over all tiles with a dead row: P is 1/Skv there, and 0 in other rows.  So they
do where a gradient of NaN reaches everything that such rows see: delta is NaN there then.

A sink is in lse, and so in P and delta; its own gradient follows from them on the host (``sinks.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashfuse.kernels.device_math import (
    LOG2E,
    as_written,
    dot_rows,
    dot_sum,
    keep_draw,
    zeros_beside,
)
from flashfuse.kernels.forward import (
    along_keys,
    count_ends,
    count_ends_of_range,
    load_rows,
    load_tile,
    plane_of,
    tile_of_ends,
    tile_of_rest,
)
from flashfuse.kernels.row_stats import any_dead_row, load_stats, load_stats_of_columns, weights_of

# --- dk, dv -----------------------------------------------------------------------------------


@triton.jit
def _dkdv_tile(  # type: ignore[no-untyped-def]
    dk, dv, dk_low, dv_low, k, v, q_plane, do_plane, stats_base, sqs, sgs, start, partial, kv, kv_first,
    b, h, Sq, Skv, ptrs, nums, seed, bh, threshold, drop_scale,
    SCORE: tl.constexpr, MASK: tl.constexpr, DSCORE: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DROPOUT: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
    UNIFORM: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    FLAT: tl.constexpr = None, LINE: tl.constexpr = False,
):  # fmt: skip
    """One tile of BM queries into dk [BN, D_PAD], if OF_K, and dv [BN, DV_PAD], if OF_V. Scores: [kv, q]."""
    start = tl.cast(start, tl.int32)
    local = tl.arange(0, BM)
    q = load_tile(q_plane, start, local, sqs, Sq, D, D_PAD, CHECK)  # [BM, D_PAD]
    rows = start + local
    IS_FLAT: tl.constexpr = FLAT is not None
    lse, delta, norm = load_stats_of_columns(stats_base, rows, rows < Sq, BM, CHECK, FOLDED, IS_FLAT)
    if CHECK:
        rows = tl.minimum(rows, Sq - 1)
    s = dot_rows(k, q, PRECISION)  # [BN, BM]
    do = load_tile(do_plane, start, local, sgs, Sq, DV, DV_PAD, CHECK)  # [BM, DV_PAD]
    if OF_K:
        dp = dot_rows(v, do, PRECISION)  # [BN, BM]
    if FLAT is not None:
        t = SCORE(0.0, b, h, tl.minimum(start, Sq - 1), kv_first, Sq, Skv, ptrs, nums)
        x = s * (FLAT * LOG2E)
        if LINE:
            x += (along_keys(tl.arange(0, BN), b, h, Sq, Skv, ptrs, nums, SCORE) * LOG2E)[:, None]
        p = tl.exp2(x + (t * LOG2E - lse)[None, :])
    else:
        if SCALE is not None:
            x = s * SCALE
        else:
            x = SCORE(s, b, h, rows[None, :], kv[:, None], Sq, Skv, ptrs, nums)
        p = weights_of(x, lse[None, :], norm[None, :], Skv, FOLDED, UNIFORM, PRECISION)
    if MASK is not None:  # noqa: SIM102 (known when compiled; the inner one is not)
        if partial:
            allowed = MASK(b, h, rows[None, :], kv[:, None], Sq, Skv, ptrs, nums)
            p = tl.where(allowed, p, 0.0)
    if DROPOUT:
        keep = tl.trans(keep_draw(seed, bh, start, kv_first, BM, BN)) >= threshold
        if OF_V:
            dv, dv_low = dot_sum(as_written(tl.where(keep, p, 0.0)).to(do.dtype), do, dv, dv_low, PRECISION)
        if OF_K:
            dp = tl.where(keep, dp, 0.0) * drop_scale
    elif OF_V:
        dv, dv_low = dot_sum(p.to(do.dtype), do, dv, dv_low, PRECISION)
    if OF_K:
        ds = p * (dp - delta[None, :])
        if DSCORE is not None:
            ds = ds * DSCORE(s, b, h, rows[None, :], kv[:, None], Sq, Skv, ptrs, nums)
            if CHECK:
                # Past the end a derivative may be infinite.
                ds = tl.where((start + local < Sq)[None, :], ds, 0.0)
        dk, dk_low = dot_sum(ds.to(q.dtype), q, dk, dk_low, PRECISION)
    return dk, dv, dk_low, dv_low


@triton.jit(
    do_not_specialize=[
        "nums", "sqb", "sqh", "sqs", "skb", "skh", "sks", "svb", "svh", "svs", "sgb", "sgh", "sgs",
        "sdkb", "sdkh", "sdks", "sdvb", "sdvh", "sdvs", "sxkb", "sxkh", "sxks", "sxvb", "sxvh", "sxvs",
        "H", "GROUP", "Sq", "Skv", "flags", "map_b", "map_h", "row", "threshold", "drop_scale", "dscale",
    ]
)  # fmt: skip
def backward_dkdv(  # type: ignore[no-untyped-def]
    Q, K, V, DOut, DK, DV_, Stats, Dead, ExtraK, ExtraV, Map, Seed, Ends, ptrs, nums,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sgb, sgh, sgs, sdkb, sdkh, sdks, sdvb, sdvh, sdvs,
    sxkb, sxkh, sxks, sxvb, sxvh, sxvs, H, GROUP, Sq, Skv, flags, map_b, map_h, row, threshold, drop_scale,
    dscale,
    SCORE: tl.constexpr, MASK: tl.constexpr, DSCORE: tl.constexpr, ENDS: tl.constexpr,
    FLAT: tl.constexpr, LINE: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIFORM: tl.constexpr, DEAD_ARE_NAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program per (b, kv head, tile of BN keys); ``Map`` is the q_map.  DK or DV_ may be None.

    ExtraK and ExtraV, float32 and shaped like dk and dv, are added to them.  Where there is a ``Dead``, with
    so many ``flags`` for the heads of a group, they hold nothing where all are 0, and there UNIFORM writes
    nothing.  If DEAD_ARE_NAN, dv is NaN where one is not.
    """
    WIDTH: tl.constexpr = 2 if FOLDED else 4
    OF_K: tl.constexpr = DK is not None
    OF_V: tl.constexpr = DV_ is not None
    tiles = (Skv + BN - 1) // BN
    plane = tl.program_id(0) // tiles
    if UNIFORM:  # noqa: SIM102 (known when compiled; the inner one is not)
        if not any_dead_row(Dead, plane, flags):
            return
    # First keys first: under a causal mask they are seen by the most queries.
    first = tl.program_id(0) % tiles * BN
    kv_heads = H // GROUP
    b = plane // kv_heads
    kvh = plane % kv_heads
    b64, kvh64, first64 = b.to(tl.int64) * 8, kvh.to(tl.int64) * 8, first.to(tl.int64) * 8
    local = tl.arange(0, BN)
    k = load_rows(K + b64 * skb + kvh64 * skh + first64 * sks, local, sks, Skv - first, D, D_PAD, not EVEN)
    v = load_rows(V + b64 * svb + kvh64 * svh + first64 * svs, local, svs, Skv - first, DV, DV_PAD, not EVEN)
    kv = first + local
    if not EVEN:
        kv = tl.minimum(kv, Skv - 1)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)
    dk = tl.zeros([BN, D_PAD], tl.float32)
    dv = tl.zeros([BN, DV_PAD], tl.float32)
    # For wide heads there are no registers left for both; dv is the one without differences in it.
    dk_low = zeros_beside(dk, PRECISION == "ieee" and D_PAD <= 128)
    dv_low = zeros_beside(dv, PRECISION == "ieee")
    for g in range(0, GROUP):
        h = kvh * GROUP + g
        bh = b * H + h
        q_plane = plane_of(Q, b, h, sqb, sqh)
        do_plane = plane_of(DOut, b, h, sgb, sgh)
        stats_base = Stats + bh.to(tl.int64) * Sq * WIDTH
        most, least = 0, 0
        if ENDS is not None:
            low, high = ENDS(Ends, b, h, Sq, Skv, ptrs, nums)
            # The last and the first query of a tile that lies all within the one end and the other.
            most, least = first - high, first + BN - 1 - low
        before, after = 0, 0
        if MASK is not None:
            Row = Map + b.to(tl.int64) * map_b + h.to(tl.int64) * map_h + (first // BLOCK).to(tl.int64) * row
            partial, full, start = tl.load(Row), tl.load(Row + 1), tl.load(Row + 2) * BLOCK
            if ENDS is not None:
                Full = Row + 2 + partial
                before, after = count_ends(Full, full, (most + 1) // BLOCK - 1, (least + BLOCK - 1) // BLOCK)
                num_tiles = (before + after) * (BLOCK // BM)
                start = tile_of_ends(Full, 0, full, before, after, BM, BLOCK)
                for i in range(0, num_tiles):
                    dk, dv, dk_low, dv_low = _dkdv_tile(
                        dk, dv, dk_low, dv_low, k, v, q_plane, do_plane, stats_base, sqs, sgs, start, False,
                        kv, first, b, h, Sq, Skv, ptrs, nums, seed, bh, threshold, drop_scale,
                        SCORE, None, DSCORE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, not EVEN,
                        PRECISION, UNIFORM, OF_K, OF_V, FLAT, LINE,
                    )  # fmt: skip
                    start = tile_of_ends(Full, i + 1, full, before, after, BM, BLOCK)
                start = tile_of_rest(Row, 0, partial, full, before, after, BM, BLOCK)
            num_tiles = (partial + full - before - after) * (BLOCK // BM)
            for i in range(0, num_tiles):
                dk, dv, dk_low, dv_low = _dkdv_tile(
                    dk, dv, dk_low, dv_low, k, v, q_plane, do_plane, stats_base, sqs, sgs, start,
                    i < partial * (BLOCK // BM), kv, first, b, h, Sq, Skv, ptrs, nums, seed, bh, threshold,
                    drop_scale, SCORE, MASK, DSCORE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT,
                    not EVEN, PRECISION, UNIFORM, OF_K, OF_V,
                )  # fmt: skip
                start = tile_of_rest(Row, i + 1, partial, full, before, after, BM, BLOCK)
        elif UNIFORM:
            for start in range(0, Sq, BM):
                rows = start + tl.arange(0, BM)
                dead = tl.load(stats_base + rows * WIDTH, mask=rows < Sq, other=0.0) == float("inf")
                if tl.max(dead.to(tl.int32), 0) > 0:
                    dk, dv, dk_low, dv_low = _dkdv_tile(
                        dk, dv, dk_low, dv_low, k, v, q_plane, do_plane, stats_base, sqs, sgs, start, False,
                        kv, first, b, h, Sq, Skv, ptrs, nums, seed, bh, threshold, drop_scale,
                        SCORE, None, DSCORE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, not EVEN,
                        PRECISION, UNIFORM, OF_K, OF_V,
                    )  # fmt: skip
        else:
            whole = tl.cdiv(Sq, BM)
            if ENDS is not None:
                before, after = count_ends_of_range(whole, (most + 1) // BM - 1, (least + BM - 1) // BM)
                for i in range(0, before + after):
                    start = tl.where(i < before, i, i + whole - before - after) * BM
                    dk, dv, dk_low, dv_low = _dkdv_tile(
                        dk, dv, dk_low, dv_low, k, v, q_plane, do_plane, stats_base, sqs, sgs, start, False,
                        kv, first, b, h, Sq, Skv, ptrs, nums, seed, bh, threshold, drop_scale,
                        SCORE, None, DSCORE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, not EVEN,
                        PRECISION, UNIFORM, OF_K, OF_V, FLAT, LINE,
                    )  # fmt: skip
            for start in range(before * BM, (whole - after) * BM, BM):
                dk, dv, dk_low, dv_low = _dkdv_tile(
                    dk, dv, dk_low, dv_low, k, v, q_plane, do_plane, stats_base, sqs, sgs, start, False,
                    kv, first, b, h, Sq, Skv, ptrs, nums, seed, bh, threshold, drop_scale,
                    SCORE, None, DSCORE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, not EVEN,
                    PRECISION, UNIFORM, OF_K, OF_V,
                )  # fmt: skip
    inside = local < Skv - first
    has_extra = inside
    if Dead is not None:
        any_dead = any_dead_row(Dead, plane, flags)
        has_extra = local < tl.where(any_dead, Skv - first, 0)
    if DV_ is not None:
        if DROPOUT:
            dv = dv * drop_scale
        if DEAD_ARE_NAN:
            dv = tl.where(any_dead, float("nan"), dv)
        dv_base = DV_ + b64 * sdvb + kvh64 * sdvh + first64 * sdvs
        extra_base = ExtraV
        if ExtraV is not None:
            extra_base = ExtraV + b64 * sxvb + kvh64 * sxvh + first64 * sxvs
        _store_rows(dv_base, sdvs, dv, extra_base, sxvs, local, inside, has_extra, DV, DV_PAD)
    if DK is not None:
        dk = dk * dscale
        dk_base = DK + b64 * sdkb + kvh64 * sdkh + first64 * sdks
        extra_base = ExtraK
        if ExtraK is not None:
            extra_base = ExtraK + b64 * sxkb + kvh64 * sxkh + first64 * sxks
        _store_rows(dk_base, sdks, dk, extra_base, sxks, local, inside, has_extra, D, D_PAD)


@triton.jit
def _store_rows(  # type: ignore[no-untyped-def]
    base, stride, value, extra_base, extra_stride, local, inside, has_extra, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    """The rows inside of value [ROWS, D_PAD], plus the extra ones there are, to a matrix of D columns."""
    d = tl.arange(0, D_PAD)
    used = (d < D)[None, :]
    if extra_base is not None:
        at_extra = extra_base + local[:, None] * (extra_stride * 8) + d[None, :]
        value += tl.load(at_extra, mask=has_extra[:, None] & used, other=0.0)
    at = base + local[:, None] * (stride * 8) + d[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside[:, None] & used)


# --- dq and captures --------------------------------------------------------------------------


@triton.jit
def ds_tile(  # type: ignore[no-untyped-def]
    q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start, partial, q_first, rows, b, h, Sq, Skv,
    ptrs, nums, seed, bh, threshold, drop_scale,
    SCORE: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DROPOUT: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
    UNIFORM: tl.constexpr, FLAT: tl.constexpr = None, LINE: tl.constexpr = False,
):  # fmt: skip
    """(dS, s, k, positions of keys) of one tile of BN keys, dS and s [BM, BN]; masked where ``partial``."""
    columns = tl.arange(0, BN)
    k = load_tile(k_plane, start, columns, sks, Skv, D, D_PAD, CHECK)  # [BN, D_PAD]
    v = load_tile(v_plane, start, columns, svs, Skv, DV, DV_PAD, CHECK)  # [BN, DV_PAD]
    kv = start + columns
    inside = (kv < Skv)[None, :]
    if CHECK:
        kv = tl.minimum(kv, Skv - 1)
    s = dot_rows(q, k, PRECISION)  # [BM, BN]
    # In front of the exponentials, beside which it runs.
    dp = dot_rows(do, v, PRECISION)  # [BM, BN]
    if FLAT is not None:
        t = SCORE(0.0, b, h, rows if LINE else q_first, start, Sq, Skv, ptrs, nums)
        x = s * (FLAT * LOG2E)
        if LINE:
            x += (along_keys(columns, b, h, Sq, Skv, ptrs, nums, SCORE) * LOG2E)[None, :]
        p = tl.exp2(x + ((t - lse) * LOG2E - norm)[:, None])
    else:
        if SCALE is not None:
            x = s * SCALE
        else:
            x = SCORE(s, b, h, rows[:, None], kv[None, :], Sq, Skv, ptrs, nums)
        p = weights_of(x, lse[:, None], norm[:, None], Skv, FOLDED, UNIFORM, PRECISION)
    if DROPOUT:
        dp = tl.where(keep_draw(seed, bh, q_first, start, BM, BN) >= threshold, dp, 0.0) * drop_scale
    ds = p * (dp - delta[:, None])
    if MASK is not None:
        if partial:
            allowed = MASK(b, h, rows[:, None], kv[None, :], Sq, Skv, ptrs, nums)
            if CHECK:
                allowed = allowed & inside
            ds = tl.where(allowed, ds, 0.0)
    elif CHECK:
        ds = tl.where(inside, ds, 0.0)
    return ds, s, k, kv


@triton.jit
def _dq_tile(  # type: ignore[no-untyped-def]
    dq, low, sums, ends, q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start, partial, q_first, rows,
    b, h, Sq, Skv, ptrs, nums, gptrs, gnums, seed, bh, threshold, drop_scale,
    SCORE: tl.constexpr, MASK: tl.constexpr, DSCORE: tl.constexpr, ACCUMULATE: tl.constexpr,
    SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DROPOUT: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr,
    UNIFORM: tl.constexpr, REFINES: tl.constexpr, TILE: tl.constexpr,
    FLAT: tl.constexpr = None, LINE: tl.constexpr = False,
):  # fmt: skip
    """One tile of BN keys into dq [BM, D_PAD], the captures' gradients, and the sums of dS.

    sums, of [BM, 4] each: over all keys, if REFINES; if TILE, over the keys of tiles of TILE × TILE that lie
    in the one and in the other of ``ends``.
    """
    start = tl.cast(start, tl.int32)
    ds, s, k, kv = ds_tile(
        q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start, partial, q_first, rows, b, h, Sq, Skv,
        ptrs, nums, seed, bh, threshold, drop_scale, SCORE, MASK, SCALE, FOLDED,
        D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, CHECK, PRECISION, UNIFORM, FLAT, LINE,
    )  # fmt: skip
    every, before, after = sums
    if REFINES or TILE is not None:
        # The four sums of a row that the threads of a quad have: they exchange nothing here.
        part = tl.sum(tl.sum(tl.reshape(ds, [BM, BN // 8, 4, 2]), 3), 1)
        every += part
        if TILE is not None:
            distance = start // TILE * TILE - rows // TILE * TILE
            is_before = distance + TILE - 1 <= ends[0]
            is_after = (distance - TILE + 1 >= ends[1]) & (is_before == 0)
            before += tl.where(is_before[:, None], part, 0.0)
            after += tl.where(is_after[:, None], part, 0.0)
    if ACCUMULATE is not None:
        inside = q_first + tl.arange(0, BM) < Sq
        if UNIFORM:
            inside = inside & (lse == float("inf"))
        of_pairs = rows[:, None], kv[None, :]
        ACCUMULATE(ds, s, b, h, *of_pairs, Sq, Skv, ptrs, nums, gptrs, gnums, inside[:, None], not CHECK)
    if DSCORE is not None:
        ds = ds * DSCORE(s, b, h, rows[:, None], kv[None, :], Sq, Skv, ptrs, nums)
        if CHECK:
            # Past the end a derivative may be infinite.
            ds = tl.where((start + tl.arange(0, BN) < Skv)[None, :], ds, 0.0)
    dq, low = dot_sum(ds.to(k.dtype), k, dq, low, PRECISION)
    return dq, low, (every, before, after)


@triton.jit(
    do_not_specialize=[
        "nums", "gnums", "sqb", "sqh", "sqs", "skb", "skh", "sks", "svb", "svh", "svs", "sgb", "sgh", "sgs",
        "sdqb", "sdqh", "sdqs", "H", "GROUP", "Sq", "Skv", "flags", "map_b", "map_h", "row", "threshold",
        "drop_scale", "dscale",
    ]
)  # fmt: skip
def backward_dq(  # type: ignore[no-untyped-def]
    Q, K, V, DOut, DQ, Stats, Dead, Map, Seed, Ends, ptrs, gptrs, nums, gnums,
    sqb, sqh, sqs, skb, skh, sks, svb, svh, svs, sgb, sgh, sgs, sdqb, sdqh, sdqs,
    H, GROUP, Sq, Skv, flags, map_b, map_h, row, threshold, drop_scale, dscale,
    SCORE: tl.constexpr, MASK: tl.constexpr, DSCORE: tl.constexpr, ACCUMULATE: tl.constexpr,
    ENDS: tl.constexpr, FLAT: tl.constexpr, LINE: tl.constexpr,
    ADD: tl.constexpr, SLOPE: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIFORM: tl.constexpr, REFINES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program per (b, h, tile of BM rows); ``Map`` is the kv_map.

    UNIFORM writes dead rows alone, and leaves at once where all ``flags`` of its group in ``Dead`` are 0.
    If REFINES, the dS of a row sum to 0.  What they sum to instead, out being rounded, is added to delta,
    for the kernels that follow.  If TILE, the ends of a table of distances share an element each, with this
    SLOPE; what tiles of TILE × TILE that lie in them sum to is ADDed to its gradient.
    """
    tiles = (Sq + BM - 1) // BM
    bh = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = bh // H
    h = bh % H
    kvh = h // GROUP
    if UNIFORM:  # noqa: SIM102 (known when compiled; the inner one is not)
        if not any_dead_row(Dead, bh // GROUP, flags):
            return
    first = tile * BM
    b64, h64 = b.to(tl.int64) * 8, h.to(tl.int64) * 8
    first64 = first.to(tl.int64) * 8
    partial, full, start = 0, 0, 0
    if MASK is not None:
        Row = Map + b.to(tl.int64) * map_b + h.to(tl.int64) * map_h + (first // BLOCK).to(tl.int64) * row
        partial, full, start = tl.load(Row), tl.load(Row + 1), tl.load(Row + 2) * BLOCK
    local = tl.arange(0, BM)
    in_range = local < Sq - first
    at = bh.to(tl.int64) * Sq + first + local
    lse, delta, norm = load_stats(Stats, at, in_range, True, FOLDED)
    if UNIFORM:
        dead = in_range & (lse == float("inf"))
        if tl.max(dead.to(tl.int32), 0) == 0:
            return
    q = load_rows(Q + b64 * sqb + h64 * sqh + first64 * sqs, local, sqs, Sq - first, D, D_PAD, not EVEN)
    do = load_rows(DOut + b64 * sgb + h64 * sgh + first64 * sgs, local, sgs, Sq - first, DV, DV_PAD, not EVEN)
    k_plane = plane_of(K, b, kvh, skb, skh)
    v_plane = plane_of(V, b, kvh, svb, svh)
    rows = tl.minimum(first + local, Sq - 1)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)
    dq = tl.zeros([BM, D_PAD], tl.float32)
    dq_low = zeros_beside(dq, PRECISION == "ieee")
    sums = (tl.zeros([BM, 4], tl.float32), tl.zeros([BM, 4], tl.float32), tl.zeros([BM, 4], tl.float32))
    most, least = 0, 0
    ends = (0, 0)
    if ENDS is not None:
        ends = ENDS(Ends, b, h, Sq, Skv, ptrs, nums)
        most, least = ends[0] + first, ends[1] + first + BM - 1
    before, after = 0, 0
    if MASK is not None:
        if ENDS is not None:
            Full = Row + 2 + partial
            before, after = count_ends(Full, full, (most + 1) // BLOCK - 1, (least + BLOCK - 1) // BLOCK)
            num_tiles = (before + after) * (BLOCK // BN)
            start = tile_of_ends(Full, 0, full, before, after, BN, BLOCK)
            for i in range(0, num_tiles):
                dq, dq_low, sums = _dq_tile(
                    dq, dq_low, sums, ends, q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start, False,
                    first, rows, b, h, Sq, Skv, ptrs, nums, gptrs, gnums, seed, bh, threshold, drop_scale,
                    SCORE, None, DSCORE, ACCUMULATE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT,
                    False, PRECISION, UNIFORM, REFINES, TILE, FLAT, LINE,
                )  # fmt: skip
                start = tile_of_ends(Full, i + 1, full, before, after, BN, BLOCK)
            start = tile_of_rest(Row, 0, partial, full, before, after, BN, BLOCK)
        num_tiles = (partial + full - before - after) * (BLOCK // BN)
        for i in range(0, num_tiles):
            dq, dq_low, sums = _dq_tile(
                dq, dq_low, sums, ends, q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start,
                i < partial * (BLOCK // BN), first, rows, b, h, Sq, Skv, ptrs, nums, gptrs, gnums, seed, bh,
                threshold, drop_scale, SCORE, MASK, DSCORE, ACCUMULATE, SCALE, FOLDED,
                D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT, not EVEN, PRECISION, UNIFORM, REFINES, TILE,
            )  # fmt: skip
            start = tile_of_rest(Row, i + 1, partial, full, before, after, BN, BLOCK)
    else:
        whole = Skv // BN * BN
        if ENDS is not None:
            before, after = count_ends_of_range(Skv // BN, (most + 1) // BN - 1, (least + BN - 1) // BN)
            for i in range(0, before + after):
                start = tl.where(i < before, i, i + Skv // BN - before - after) * BN
                dq, dq_low, sums = _dq_tile(
                    dq, dq_low, sums, ends, q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start, False,
                    first, rows, b, h, Sq, Skv, ptrs, nums, gptrs, gnums, seed, bh, threshold, drop_scale,
                    SCORE, None, DSCORE, ACCUMULATE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT,
                    False, PRECISION, UNIFORM, REFINES, TILE, FLAT, LINE,
                )  # fmt: skip
        for start in range(before * BN, whole - after * BN, BN):
            dq, dq_low, sums = _dq_tile(
                dq, dq_low, sums, ends, q, do, lse, delta, norm, k_plane, v_plane, sks, svs, start, False,
                first, rows, b, h, Sq, Skv, ptrs, nums, gptrs, gnums, seed, bh, threshold, drop_scale,
                SCORE, None, DSCORE, ACCUMULATE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT,
                False, PRECISION, UNIFORM, REFINES, TILE,
            )  # fmt: skip
        if not EVEN:  # noqa: SIM102 (known when compiled; the inner one is not)
            if whole < Skv:
                dq, dq_low, sums = _dq_tile(
                    dq, dq_low, sums, ends, q, do, lse, delta, norm, k_plane, v_plane, sks, svs, whole, False,
                    first, rows, b, h, Sq, Skv, ptrs, nums, gptrs, gnums, seed, bh, threshold, drop_scale,
                    SCORE, None, DSCORE, ACCUMULATE, SCALE, FOLDED, D, DV, D_PAD, DV_PAD, BM, BN, DROPOUT,
                    True, PRECISION, UNIFORM, REFINES, TILE,
                )  # fmt: skip
    if REFINES:
        WIDTH: tl.constexpr = 2 if FOLDED else 4
        tl.store(Stats + at * WIDTH + 1, delta + tl.sum(sums[0], 1), mask=in_range)
    if TILE is not None:
        for i in tl.static_range(2):
            distance = tl.minimum(tl.maximum(ends[i], 1 - Sq), Skv - 1) + tl.zeros([1, 1], tl.int32)
            at_q, at_kv = tl.maximum(-distance, 0), tl.maximum(distance, 0)
            gradient = tl.sum(tl.sum(sums[i + 1], 1), 0) + tl.zeros([1, 1], tl.float32)
            if SLOPE is not None:
                of_load = SLOPE(gradient, b, h, at_q, at_kv, Sq, Skv, ptrs, nums)
                gradient = tl.where(gradient == 0.0, 0.0, gradient * of_load)
            ADD(gradient, gradient, b, h, at_q, at_kv, Sq, Skv, ptrs, nums, gptrs, gnums)
    dq = dq * dscale
    dq_base = DQ + b64 * sdqb + h64 * sdqh + first64 * sdqs
    if UNIFORM:
        _store_rows(dq_base, sdqs, dq, None, 0, local, dead, dead, D, D_PAD)
    else:
        _store_rows(dq_base, sdqs, dq, None, 0, local, in_range, in_range, D, D_PAD)
