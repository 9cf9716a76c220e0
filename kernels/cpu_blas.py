"""Attention on a CPU in tiles of matrix products: any score, dropout, gradients of captures.

For rows I of one batch entry and the columns J they can reach, with c = 1 / (1 - p) and the dropout
mask Z (FlashAttention, arXiv 2205.14135, section 3 and appendix B; recomputed, never saved):

    S = score(q_I k_Jᵀ)    P = softmax_J(S)    out_I = c (P ∘ Z) v_J
    dP = Z ∘ c do_I v_Jᵀ   dS = P ∘ (dP - rowsum(P ∘ dP) + dlse_I)
    dq_I = score'(S) dS k_J    dk_J += (score'(S) dS)ᵀ q_I    dv_J += c (P ∘ Z)ᵀ do_I

A sink is one more column of S, of whose weight nothing is made: d sink = −P_sink (rowsum(P ∘ dP) − dlse).

A tile holds whole rows, so the softmax is not split.  Query heads that share a key head are stacked
as rows of one product.  float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flashfuse.kernels.cpu_reach import Cut, tiles
from flashfuse.kernels.cpu_score import Sizes, Tile, TileValues, form_of
from flashfuse.kernels.derivative import derivative
from flashfuse.kernels.expr import ONE, ZERO, S, contains, load
from flashfuse.kernels.ops import empty_bhsd
from flashfuse.kernels.spec import AVERAGING, NAN, REACHING, SCORES_ONLY, ScoreProgram

_ROWS = 128
"""Rows of a tile, if it has few columns."""

_TILE_ELEMENTS = 1 << 20
"""Scores per tile, over all heads: few enough to stay in cache, enough to share among threads."""


class Dropout:
    """The keep mask, a function of the seed and the position alone.

    Each row and each column of a head draws a random word; the word of an element mixes the two.
    Tiles of any shape can therefore be replayed in any order, in a few passes of integer
    arithmetic, where drawing from a generator costs ten times as much.
    """

    def __init__(self, seed: Tensor, p: float, sizes: Sizes) -> None:
        batch, heads, q_len, kv_len = sizes
        generator = torch.Generator().manual_seed(_to_one_word(seed))
        low, high = -(1 << 31), 1 << 31

        def draw(length: int) -> Tensor:
            return torch.randint(low, high, (batch, heads, length), dtype=torch.int32, generator=generator)

        self.rows, self.columns = draw(q_len), draw(kv_len)
        self.scale = 1 / (1 - p) if p < 1 else 0.0
        # A word below the threshold drops: that many of 2^32, less one where p is 1.
        self.threshold = min(round(p * 2**32), 2**32 - 1) - (1 << 31)

    def keep_bits(self, tile: Tile) -> Tensor:
        """[H, rows, columns] int32: 1 where kept, 0 where dropped."""
        columns = tile.take(self.columns[tile.b0, tile.h0 : tile.h1], 1)
        x = tile.rows_of(self.rows)[0, :, :, None] + columns[:, None]
        # x(2x + 1) is a permutation of the words that carries low bits up; the shift brings high bits
        # down, and the odd factor carries them up again.  The sign and what follows it decide.
        x = torch.addcmul(x, x, x, value=2)
        x.bitwise_xor_(x >> 15).mul_(0x2C1B3C6D)
        return x.ge_(self.threshold)


def _to_one_word(seed: Tensor) -> int:
    word = 0
    for value in seed.reshape(-1).tolist():
        word = (word * 0x9E3779B97F4A7C15 + int(value)) % (1 << 63)
    return word


def _drop(weights: Tensor, bits: Tensor) -> None:
    """Zeroes the dropped weights in place."""
    if weights.dtype == torch.float32:
        # As integers of one width: mixed types would convert element by element.
        weights.view(torch.int32).mul_(bits)
    else:
        weights.mul_(bits)


class _Site:
    """One call: its program, its tensors by name, and the steps that forward and backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        captures: Sequence[Tensor],
        ints: Sequence[int],
        seed: Tensor | None,
        program: ScoreProgram,
        dropout_p: float,
    ) -> None:
        self.program, self.form = program, form_of(program)
        self.captures: Mapping[str, Tensor] = dict(zip(program.captures, captures, strict=True))
        self.ints = tuple(zip(program.ints, ints, strict=True))
        self.sizes: Sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        self.group = q.shape[1] // k.shape[1]
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.keeps_dead_rows_zero = program.dead_rows in ("none", "zero")
        self.dropout = None
        if dropout_p:
            assert seed is not None
            self.dropout = Dropout(seed, dropout_p, self.sizes)

    def tiles(self) -> Sequence[Tile]:
        cut = Cut(_ROWS, True, self.group, _TILE_ELEMENTS)
        return tiles(self.program, self.captures, self.ints, self.sizes, cut, self.dtype)

    def spread(self, tile: Tile) -> list[Tile]:
        """``tile`` against every key: what rows without a key spread over, also what no other row reaches."""
        wide = tile.widened(self.form, self.sizes[3])
        of_a_row = wide.scores // (wide.q1 - wide.q0)
        rows = max(16, _TILE_ELEMENTS // of_a_row // 16 * 16)
        return [replace(wide, q0=q0, q1=min(q0 + rows, wide.q1)) for q0 in range(wide.q0, wide.q1, rows)]

    def values(self, tile: Tile) -> TileValues:
        return TileValues(self.form, self.captures, self.ints, self.sizes, tile, self.dtype)

    def stacked(self, x: Tensor, tile: Tile) -> Tensor:
        """Rows of ``x`` [B, H, Sq, D] → [H_kv of the tile, heads per key head * rows, D]."""
        kv_heads = tile.kv_heads(self.group)
        return tile.rows_of(x).to(self.dtype).reshape(kv_heads.stop - kv_heads.start, -1, x.shape[-1])

    def weights(self, tile: Tile, q_rows: Tensor, keys: Tensor) -> _Weights | None:
        """Softmax weights of a tile that is not empty, before dropout; ``keys`` [H_kv, columns, D].

        ``None`` where a row without a key has weights that are not in the tile: see :meth:`spread`.
        """
        form, values = self.form, self.values(tile)
        shape = (1, tile.h1 - tile.h0, tile.q1 - tile.q0, tile.columns)
        keys = keys.mT
        if form.scale is not None:
            additive = additive_of(values, tile)
            stacked = (q_rows.shape[0], q_rows.shape[1], keys.shape[-1])
            if additive is None:
                scores = torch.baddbmm(q_rows.new_empty(()), q_rows, keys, beta=0, alpha=form.scale)
            else:
                additive = additive.expand(shape).reshape(stacked)
                scores = torch.baddbmm(additive, q_rows, keys, alpha=form.scale)
            scores = scores.view(shape)
        else:
            products = torch.bmm(q_rows, keys).view(shape)
            values["s"] = products
            scores = values.tensor(form.score).to(self.dtype).expand(products.shape)
            allowed = allowed_of(values, tile)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, float("-inf"))
        if form.sink is not None:
            logit = values.tensor(form.sink).to(self.dtype)
            scores = torch.cat([scores, logit.expand(*shape[:3], 1)], -1)
        highest = scores.amax(-1, keepdim=True)
        weights = torch.softmax(scores, -1)
        dead = highest == float("-inf")
        lse = highest - weights.amax(-1, keepdim=True).log_()
        if not dead.any():
            return _Weights(tile, values, weights[0], lse[0], highest[0], None)
        if not self.keeps_dead_rows_zero and tile.columns < self.sizes[3]:
            return None
        averages = 1 / self.sizes[3] if self.program.dead_rows in AVERAGING else 0.0
        fill = float("nan") if self.program.dead_rows in NAN else averages
        weights.masked_fill_(dead, fill)
        lse.masked_fill_(dead, float("-inf"))
        return _Weights(tile, values, weights[0], lse[0], highest[0], dead[0])


class _Weights:
    """``weights`` [H, rows, columns] of ``tile``; ``lse``, ``highest`` and ``dead`` (if any is) [H, rows, 1].

    Under a sink ``all_weights`` has its weight as one more column.
    """

    def __init__(
        self,
        tile: Tile,
        values: TileValues,
        weights: Tensor,
        lse: Tensor,
        highest: Tensor,
        dead: Tensor | None,
    ) -> None:
        self.tile, self.values, self.lse, self.highest, self.dead = tile, values, lse, highest, dead
        self.all_weights, self.weights = weights, weights[..., : tile.columns]

    def score_gradient(
        self, d_weights: Tensor, dlse: Tensor | None, dtype: torch.dtype, balanced: bool
    ) -> tuple[Tensor, Tensor | None]:
        """dS [H, rows, columns], and d sink [1, H, rows, 1] under a sink; ``dlse`` [H, rows, 1].

        Without a sink rows of dS add up to 0, but for dlse.  ``balanced`` takes off by weight what roundings
        leave: an original that subtracts the maximum of its scores, and differentiates that, does no less.
        """
        has_sink = self.weights.shape != self.all_weights.shape
        d_weights = F.pad(d_weights, (0, 1)) if has_sink else d_weights
        d_score = torch._softmax_backward_data(d_weights, self.all_weights, -1, dtype)
        if balanced and not has_sink:
            d_score.addcmul_(self.weights, d_score.sum(-1, keepdim=True), value=-1)
        if dlse is not None:
            of_lse = self.all_weights * dlse
            d_score += of_lse if self.dead is None else of_lse.masked_fill(self.dead, 0)
        return (d_score[..., :-1], d_score[None, ..., -1:]) if has_sink else (d_score, None)


def allowed_of(values: TileValues, tile: Tile) -> Tensor | None:
    """Where the conditions of ``tile`` hold, broadcasting over it; ``None`` for everywhere."""
    allowed = None
    for condition in tile.conditions:
        holds = values.tensor(condition)
        holds = holds if holds.dtype == torch.bool else holds != 0
        allowed = holds if allowed is None else allowed & holds
    return allowed


def additive_of(values: TileValues, tile: Tile) -> Tensor | None:
    """The bias with −inf where a key is not allowed, broadcasting over the tile; ``None`` for 0."""
    form, allowed = values.form, allowed_of(values, tile)
    if form.bias is None:
        if allowed is None:
            return None
        return torch.zeros(allowed.shape, dtype=values.dtype).masked_fill_(~allowed, float("-inf"))
    bias = values.tensor(form.bias).to(values.dtype)
    return bias if allowed is None else torch.where(allowed, bias, float("-inf"))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    highest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    site = _Site(q, k, captures, ints, seed, program, dropout_p)
    out = empty_bhsd(q, (*q.shape[:3], v.shape[-1]))
    lse = torch.empty(q.shape[:3], dtype=site.dtype)
    todo = deque(site.tiles())
    while todo:
        tile = todo.popleft()
        if tile.is_empty and site.keeps_dead_rows_zero:
            tile.rows_of(out).zero_()
            of_no_key: Tensor | float = float("-inf")
            if site.form.sink is not None:
                of_no_key = site.values(tile).tensor(site.form.sink).to(site.dtype)[..., 0]
            for rows in (lse, highest):
                if rows is not None:
                    tile.rows_of(rows).copy_(torch.as_tensor(of_no_key))
            continue
        w, kv_heads = None, tile.kv_heads(site.group)
        if not tile.is_empty:
            keys = tile.take(k[tile.b0, kv_heads], 1).to(site.dtype)
            w = site.weights(tile, site.stacked(q, tile), keys)
        if w is None:
            todo.extendleft(reversed(site.spread(tile)))
            continue
        if site.dropout is not None:
            _drop(w.weights, site.dropout.keep_bits(tile))
            if w.dead is not None and program.dead_rows in NAN:
                # What dropout makes of NaN is NaN.
                w.weights.masked_fill_(w.dead, float("nan"))
        weights = w.weights.view(keys.shape[0], -1, tile.columns)
        rows_out = torch.bmm(weights, tile.take(v[tile.b0, kv_heads], 1).to(site.dtype))
        if site.dropout is not None:
            rows_out.mul_(site.dropout.scale)
        tile.rows_of(out).copy_(rows_out.view(1, tile.h1 - tile.h0, -1, v.shape[-1]))
        tile.rows_of(lse).copy_(w.lse[None, ..., 0])
        if highest is not None:
            tile.rows_of(highest).copy_(w.highest[None, ..., 0])
    return out, lse


def _accumulator(capture: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape of ``capture``; in float64 where that is small, as it sums over many tiles."""
    return torch.zeros(capture.shape, dtype=torch.float64 if capture.numel() < _TILE_ELEMENTS else dtype)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    capture_grads: Sequence[int],
    dlse: Tensor | None = None,
) -> list[Tensor]:
    site = _Site(q, k, captures, ints, seed, program, dropout_p)
    form = site.form
    scale = 1.0 if form.scale is None else form.scale
    keep_scale = 1.0 if site.dropout is None else site.dropout.scale
    dq, dk, dv = (empty_bhsd(t, t.shape) for t in (q, k, v))
    wanted = {program.captures[i]: _accumulator(captures[i], site.dtype) for i in capture_grads}
    slopes = [
        (x, derivative(form.score, load(f"@{i}", ()))) for i, x in enumerate(form.loads) if x.name in wanted
    ]
    sink_slopes = []
    if form.sink is not None:
        sink_slopes = [
            (x, derivative(form.sink, load(f"@{i}", ())))
            for i, x in enumerate(form.loads)
            if x.name in wanted and contains(form.sink, load(f"@{i}", ()))
        ]
    score_slope = derivative(form.score, S) if form.scale is None else ONE
    for b, of_entry in itertools.groupby(site.tiles(), key=lambda tile: tile.b0):
        k_b, v_b = k[b].to(site.dtype), v[b].to(site.dtype)
        dk_b, dv_b = torch.zeros(k_b.shape, dtype=site.dtype), torch.zeros(v_b.shape, dtype=site.dtype)
        todo = deque(of_entry)
        while todo:
            tile = todo.popleft()
            if tile.is_empty and site.keeps_dead_rows_zero:
                tile.rows_of(dq).zero_()
                continue
            w, kv_heads = None, tile.kv_heads(site.group)
            if not tile.is_empty:
                q_rows, keys = site.stacked(q, tile), tile.take(k_b[kv_heads], 1)
                w = site.weights(tile, q_rows, keys)
            if w is None:
                todo.extendleft(reversed(site.spread(tile)))
                continue
            do_rows, values = site.stacked(do, tile) * keep_scale, tile.take(v_b[kv_heads], 1)
            stacked = (keys.shape[0], -1, tile.columns)
            d_weights = torch.bmm(do_rows, values.mT).view(w.weights.shape)
            bits = None if site.dropout is None else site.dropout.keep_bits(tile)
            if bits is not None:
                _drop(d_weights, bits)
            # Beside what dropout does to a row its rounding is nothing.
            dlse_rows = None if dlse is None else tile.rows_of(dlse)[0, ..., None]
            balanced = site.dropout is None
            d_score, d_sink = w.score_gradient(d_weights, dlse_rows, site.dtype, balanced)
            if w.dead is not None and program.dead_rows not in REACHING:
                d_score.masked_fill_(w.dead, 0)
            if d_sink is not None and w.dead is not None:
                d_sink = d_sink.masked_fill(w.dead, 0)
            for x, slope in sink_slopes:
                assert d_sink is not None
                gradient = torch.where(d_sink == 0, 0, d_sink * w.values.tensor(slope))
                w.values.add_gradient(x, gradient, wanted[x.name])
            if bits is not None:
                _drop(w.weights, bits)
                if w.dead is not None and program.dead_rows in NAN:
                    # What dropout makes of NaN is NaN.
                    w.weights.masked_fill_(w.dead, float("nan"))
            tile.add_to(dv_b[kv_heads], 1, torch.bmm(w.weights.view(stacked).mT, do_rows))
            for x, slope in slopes:
                if slope == ZERO:
                    continue
                gradient = d_score[None]
                if w.dead is not None and program.dead_rows in SCORES_ONLY:
                    gradient = gradient.masked_fill(w.dead, 0)
                if slope != ONE:
                    # A weight of 0 has no part in it, even where the derivative overflows.
                    gradient = torch.where(gradient == 0, 0, gradient * w.values.tensor(slope))
                w.values.add_gradient(x, gradient, wanted[x.name])
            if score_slope != ONE:
                d_score = d_score * w.values.tensor(score_slope)[0]
            d_score = d_score.view(stacked)
            dq_rows = torch.bmm(d_score, keys).mul_(scale)
            tile.rows_of(dq).copy_(dq_rows.view(1, tile.h1 - tile.h0, -1, q.shape[-1]))
            tile.add_to(dk_b[kv_heads], 1, torch.bmm(d_score.mT, q_rows).mul_(scale))
        dk[b], dv[b] = dk_b, dv_b
    return [dq, dk, dv, *(wanted[program.captures[i]].to(captures[i].dtype) for i in capture_grads)]
