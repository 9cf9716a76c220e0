"""The Triton variant: host side of the kernels in ``forward``, ``backward`` and ``dropout``.

Implements ``dispatch.Implementation``.  Shapes and formulas are those of ``attention_reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels import backward as backward_kernels
from flashfuse.kernels import block_map, configs, dropout
from flashfuse.kernels.codegen import LOG2E, CaptureType, Generated, capture_type, generate
from flashfuse.kernels.forward import DEAD_MEAN, DEAD_NAN, DEAD_ZERO, attention_forward
from flashfuse.kernels.launch import launch
from flashfuse.kernels.ops import BLOCK, empty_bhsd
from flashfuse.kernels.spec import ScoreProgram

_DEAD = {"none": DEAD_ZERO, "zero": DEAD_ZERO, "nan": DEAD_NAN, "mean": DEAD_MEAN}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, Dv], lse [B, H, Sq] float32 natural log, −inf in dead rows).

    Raises:
        ValueError: shapes do not fit each other, or dropout without a seed.
    """
    site = _Site(q, k, v, captures, ints, maps, seed, program, dropout_p)
    out = empty_bhsd(q, (site.batch, site.heads, site.q_len, site.v_dim))
    lse = q.new_empty((site.batch, site.heads, site.q_len), dtype=torch.float32)
    if site.is_empty:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = (_aligned(t) for t in (q, k, v))
    dead = _DEAD[program.dead_rows]
    mean = None
    if dead == DEAD_MEAN:
        if site.dropout:
            dead = DEAD_ZERO
        else:
            mean = v.mean(2, dtype=torch.float32).contiguous()
    code = site.generate()
    config = configs.choose("forward", max(site.d_pad, site.dv_pad), q.element_size())
    rows = -(-site.q_len // config.bm)
    launch(
        attention_forward,
        rows * site.batch * site.heads,
        *(q, k, v, out, lse, site.kv_map, seed, mean, site.ptrs, site.nums),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(out)),
        *(site.heads, site.group, site.q_len, site.kv_len, *_map_strides(site.kv_map)),
        *(site.threshold, site.drop_scale),
        *(code.score, code.mask, _log2_scale(code), code.folded),
        *(site.dim, site.v_dim, site.d_pad, site.dv_pad, BLOCK, site.even, site.dropout, dead, site.precision),
        *(config.bm, config.bn),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if site.dropout and program.dead_rows == "mean":
        bm, bn, warps, _ = configs.choose("dq", site.dv_pad, v.element_size())
        launch(
            dropout.dead_rows_out,
            -(-site.q_len // bm) * site.batch * site.heads,
            *(v, out, lse, seed, *_strides(v), *_strides(out)),
            *(site.heads, site.group, site.q_len, site.kv_len, site.threshold, site.drop_scale),
            *(site.v_dim, site.dv_pad, site.precision, bm, bn),
            num_warps=warps,
        )
    return out, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    capture_grads: Sequence[int],
) -> list[Tensor]:
    """[dq, dk, dv, *gradients of the captures listed in ``capture_grads``]."""
    site = _Site(q, k, v, captures, ints, maps, seed, program, dropout_p)
    dq, dk, dv = (empty_bhsd(t, t.shape) for t in (q, k, v))
    buffers = [
        torch.zeros(captures[i].shape, dtype=torch.float32, device=captures[i].device) for i in capture_grads
    ]
    grads = [dq, dk, dv]
    if site.is_empty:
        for grad in grads:
            grad.zero_()
        return grads + [b.to(captures[i].dtype) for b, i in zip(buffers, capture_grads, strict=True)]
    q, k, v, do, out = (_aligned(t) for t in (q, k, v, do.to(q.dtype), out))
    buffer_types, buffer_strides = _typed(buffers)
    code = site.generate(tuple(zip(capture_grads, buffer_types, strict=True)))
    lse_used, delta = torch.empty_like(lse), torch.empty_like(lse)
    launch(
        backward_kernels.backward_prepare,
        -(-site.q_len // 64) * site.batch * site.heads,
        *(out, do, lse, lse_used, delta, *_strides(out), *_strides(do), site.heads, site.q_len),
        *(site.v_dim, site.dv_pad, code.folded, 64),
    )
    norm = _row_sums(site, code, q, k, v, do, lse_used, delta)
    mask_and_scale = (code.score, code.mask, code.dscore)
    sizes = (site.dim, site.v_dim, site.d_pad, site.dv_pad, BLOCK, site.even, site.dropout, site.precision)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(do))
    lengths = (site.heads, site.group, site.q_len, site.kv_len)
    # The weight of a single key is the constant 1: rounding must not make a gradient of it.
    constant = site.kv_len == 1
    dscale = 0.0 if constant else 1.0 if code.dscale is None else code.dscale
    accumulate = None if constant else code.accumulate
    numbers = (site.threshold, site.drop_scale, dscale)
    extra = _dead_dv(site, do, lse)
    widest = max(site.d_pad, site.dv_pad)
    config = configs.choose("dkdv", widest, q.element_size())
    launch(
        backward_kernels.backward_dkdv,
        -(-site.kv_len // config.bn) * site.batch * site.kv_heads,
        *(q, k, v, do, dk, dv, lse_used, delta, norm, extra, site.q_map, seed, site.ptrs, site.nums),
        *(*strides, *_strides(dk), *_strides(dv), *(extra.stride()[:3] if extra is not None else (0, 0, 0))),
        *(*lengths, *_map_strides(site.q_map), *numbers),
        *(*mask_and_scale, _log2_scale(code), code.folded, *sizes, config.bm, config.bn),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    config = configs.choose("dq", widest, q.element_size())
    launch(
        backward_kernels.backward_dq,
        -(-site.q_len // config.bm) * site.batch * site.heads,
        *(q, k, v, do, dq, lse_used, delta, norm, site.kv_map, seed, site.ptrs, site.nums),
        *(tuple(buffers), tuple(n for s in buffer_strides for n in s), *strides, *_strides(dq)),
        *(*lengths, *_map_strides(site.kv_map), *numbers),
        *(*mask_and_scale, accumulate, _log2_scale(code), code.folded, *sizes, config.bm, config.bn),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return grads + [b.to(captures[i].dtype) for b, i in zip(buffers, capture_grads, strict=True)]


def dropout_mask(seed: Tensor, dropout_p: float, sizes: tuple[int, int, int, int]) -> Tensor:
    """The keep mask [B, H, Sq, Skv] that ``seed`` draws."""
    batch, heads, q_len, kv_len = sizes
    keep = torch.empty(sizes, dtype=torch.bool, device=seed.device)
    if keep.numel():
        programs = -(-q_len // 32) * -(-kv_len // 64) * batch * heads
        launch(dropout.keep_mask, programs, keep, seed, q_len, kv_len, _threshold(dropout_p), 32, 64)
    return keep


# --- the site ----------------------------------------------------------------------------------


class _Site:
    """Sizes and launch arguments that forward and backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: Sequence[Tensor],
        ints: Sequence[int],
        maps: Sequence[Tensor],
        seed: Tensor | None,
        program: ScoreProgram,
        dropout_p: float,
    ) -> None:
        self.batch, self.heads, self.q_len, self.dim = q.shape
        self.kv_heads, self.kv_len, self.v_dim = k.shape[1], k.shape[2], v.shape[3]
        _check(q, k, v, seed, dropout_p)
        self.group = self.heads // self.kv_heads if self.kv_heads else 1
        self.program = program
        if program.mask is not None and program.mask.is_const and program.mask.value:
            self.program = ScoreProgram(program.score, None, program.dead_rows)
            maps = ()
        self.is_empty = 0 in (self.batch, self.heads, self.q_len, self.kv_len)
        self.d_pad, self.dv_pad = _padded(self.dim), _padded(self.v_dim)
        self.even = self.q_len % BLOCK == 0 and self.kv_len % BLOCK == 0
        self.dropout = dropout_p > 0
        self.threshold = _threshold(dropout_p)
        self.drop_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        self.seed = seed
        self.precision = _precision(q.dtype)
        self.types, strides = _typed(captures)
        self.ptrs = tuple(captures)
        self.nums = (*(n for s in strides for n in s), *ints)
        if self.program.mask is not None and not maps and not self.is_empty:
            maps = _build_maps(self.program, captures, ints, q.device, (self.batch, self.heads, self.q_len, self.kv_len))
        self.kv_map, self.q_map = maps if maps else (None, None)

    def generate(self, grads: tuple[tuple[int, CaptureType], ...] = ()) -> Generated:
        return generate(self.program, self.types, grads, self.precision != "ieee")


def _check(q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, dropout_p: float) -> None:
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or v.shape[:3] != k.shape[:3] or (k.shape[1] and heads % k.shape[1]):
        raise ValueError(
            "expected q [B, H, Sq, D], k [B, H_kv, Skv, D], v [B, H_kv, Skv, Dv] with H a multiple of H_kv, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"expected q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if dropout_p > 0 and seed is None:
        raise ValueError("expected a seed: dropout_p > 0")


def _build_maps(
    program: ScoreProgram,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    device: torch.device,
    sizes: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor]:
    mask = program.mask_program
    tensors = dict(zip(program.captures, captures, strict=True))
    numbers = dict(zip(program.ints, ints, strict=True))
    return block_map.build(
        [tensors[n] for n in mask.captures], [numbers[n] for n in mask.ints], device, sizes, mask
    )


def _typed(tensors: Sequence[Tensor]) -> tuple[tuple[CaptureType, ...], tuple[tuple[int, ...], ...]]:
    pairs = [capture_type(t) for t in tensors]
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _threshold(dropout_p: float) -> int:
    """Signed 32-bit: a uniform int32 is below it with probability ``dropout_p``."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "tf32"  # of no effect
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _log2_scale(code: Generated) -> float | None:
    return None if code.scale is None else code.scale * LOG2E


def _aligned(t: Tensor) -> Tensor:
    """``t`` with a dense last axis and strides in whole units of 8 elements, copied only if needed."""
    strides = t.stride()
    fits = strides[3] == 1 and all(n == 1 or s % 8 == 0 for n, s in zip(t.shape[:3], strides[:3], strict=True))
    # Offsets inside a tile are 32-bit.
    return t if fits and strides[2] < 2**23 else t.contiguous()


def _strides(t: Tensor) -> tuple[int, int, int]:
    b, h, s, _ = t.stride()
    return b // 8, h // 8, s // 8


def _map_strides(kv_map: Tensor | None) -> tuple[int, int, int]:
    """Strides of b, h and the row; an axis of size 1 serves every b or h."""
    if kv_map is None:
        return 0, 0, 0
    lead_b, lead_h, rows, row = kv_map.shape
    return (lead_h * rows * row if lead_b > 1 else 0), (rows * row if lead_h > 1 else 0), row


# --- dead rows and huge scores -----------------------------------------------------------------


def _row_sums(
    site: _Site, code: Generated, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor
) -> Tensor | None:
    """The norm of ``backward_rows``; replaces ``delta`` where do · out is not exact enough."""
    exact = site.precision == "ieee" or code.sums_rows
    if code.folded and not exact:
        return None
    norm = None if code.folded else torch.empty_like(lse)
    bm, bn, warps, _ = configs.choose("dq", max(site.d_pad, site.dv_pad), q.element_size())
    launch(
        backward_kernels.backward_rows,
        -(-site.q_len // bm) * site.batch * site.heads,
        *(q, k, v, do, lse, norm, delta, site.seed, site.ptrs, site.nums),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(do)),
        *(site.heads, site.group, site.q_len, site.kv_len, site.threshold, site.drop_scale),
        *(code.score, code.mask, _log2_scale(code), code.folded, exact),
        *(site.dim, site.v_dim, site.d_pad, site.dv_pad, site.dropout, site.precision, bm, bn),
        num_warps=warps,
    )
    return norm


def _dead_dv(site: _Site, do: Tensor, lse: Tensor) -> Tensor | None:
    """What dead rows add to dv, broadcastable to [B, H_kv, Skv, Dv] float32; ``None`` for nothing."""
    mode = site.program.dead_rows
    if mode not in ("mean", "nan"):
        return None
    grouped = (site.batch, site.kv_heads, site.group)
    if mode == "mean" and site.dropout:
        extra = do.new_empty((site.batch, site.kv_heads, site.kv_len, site.v_dim), dtype=torch.float32)
        bm, bn, warps, _ = configs.choose("dkdv", site.dv_pad, do.element_size())
        launch(
            dropout.dead_rows_dv,
            -(-site.kv_len // bn) * site.batch * site.kv_heads,
            *(do, lse, extra, site.seed, *_strides(do), site.heads, site.group, site.q_len, site.kv_len),
            *(site.threshold, site.drop_scale, site.v_dim, site.dv_pad, site.precision, bm, bn),
            num_warps=warps,
        )
        return extra
    dead = lse == float("-inf")
    if mode == "nan":
        any_dead = dead.view(*grouped, site.q_len).any(-1).any(-1)
        total = torch.where(any_dead, float("nan"), 0.0)[..., None].expand(*grouped[:2], site.v_dim).contiguous()
    else:
        sums = torch.where(dead[..., None], do, 0).sum(2, dtype=torch.float32)
        total = sums.view(*grouped, site.v_dim).sum(2) / site.kv_len
    return total[:, :, None].expand(-1, -1, site.kv_len, -1)
