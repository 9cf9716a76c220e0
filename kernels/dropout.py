"""Dropout on the device: the keep mask itself, and rows without keys (weights 1/Skv before dropout)."""

from __future__ import annotations

import triton
import triton.language as tl

from flashfuse.kernels.device_math import dot_add, keep_draw
from flashfuse.kernels.forward import load_rows


@triton.jit(do_not_specialize=["Sq", "Skv", "threshold"])
def keep_mask(Keep, Seed, Sq, Skv, threshold, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keep[B H, Sq, Skv], the mask that every kernel draws."""
    q_tiles, kv_tiles = (Sq + BM - 1) // BM, (Skv + BN - 1) // BN
    pid = tl.program_id(0)
    kv_start = pid % kv_tiles * BN
    q_start = (pid // kv_tiles) % q_tiles * BM
    bh = pid // kv_tiles // q_tiles
    keep = keep_draw(tl.load(Seed), bh, q_start, kv_start, BM, BN) >= threshold
    q = q_start + tl.arange(0, BM)
    kv = kv_start + tl.arange(0, BN)
    offset = (bh.to(tl.int64) * Sq + q[:, None]) * Skv + kv[None, :]
    tl.store(Keep + offset, keep, mask=(q < Sq)[:, None] & (kv < Skv)[None, :])


@triton.jit(
    do_not_specialize=[
        "svb", "svh", "svs", "sob", "soh", "sos", "H", "GROUP", "Sq", "Skv", "threshold", "drop_scale",
    ]
)  # fmt: skip
def dead_rows_out(  # type: ignore[no-untyped-def]
    V, Out, Lse, Seed, svb, svh, svs, sob, soh, sos, H, GROUP, Sq, Skv, threshold, drop_scale,
    DV: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j R_ij v_j / Skv in the rows of a tile with lse = −∞; others are left alone."""
    tiles = (Sq + BM - 1) // BM
    bh = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BM
    b64, h64 = (bh // H).to(tl.int64) * 8, (bh % H).to(tl.int64) * 8
    kvh64 = (bh % H // GROUP).to(tl.int64) * 8
    local = tl.arange(0, BM)
    lse = tl.load(Lse + bh.to(tl.int64) * Sq + first + local, mask=local < Sq - first, other=0.0)
    dead = lse == float("-inf")
    if tl.max(dead.to(tl.int32), 0) > 0:
        seed = tl.load(Seed)
        acc = tl.zeros([BM, DV_PAD], tl.float32)
        for i in range(0, (Skv + BN - 1) // BN):
            start = tl.cast(i, tl.int32) * BN
            v_base = V + b64 * svb + kvh64 * svh + start.to(tl.int64) * 8 * svs
            v = load_rows(v_base, tl.arange(0, BN), svs, Skv - start, DV, DV_PAD, True)
            keep = keep_draw(seed, bh, first, start, BM, BN) >= threshold
            acc = dot_add(tl.where(keep, 1.0, 0.0).to(v.dtype), v, acc, PRECISION)
        acc = acc * (drop_scale / Skv)
        d = tl.arange(0, DV_PAD)
        o_base = Out + b64 * sob + h64 * soh + first.to(tl.int64) * 8 * sos
        o_ptrs = o_base + local[:, None] * (sos * 8) + d[None, :]
        tl.store(o_ptrs, acc.to(Out.dtype.element_ty), mask=dead[:, None] & (d < DV)[None, :])
