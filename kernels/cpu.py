"""The CPU variant: PyTorch's fused kernel on the parts of the scores that exist, BLAS for the rest.

``aten::_scaled_dot_product_flash_attention_for_cpu`` computes ``s * c`` plus an additive mask, and
takes any strides, also those of an expanded mask or key.  A program of that form without dropout is
cut into tiles of rows; each tile runs against the columns it can reach, with a mask of the tile's
size only where the tile needs one (``cpu_score.py``).  Every other program, dropout, and gradients
of captures run in ``cpu_blas.py``.  A sink is put into ``out`` and ``lse`` afterwards, which is all that
the kernel's backward reads; its own gradient follows from them (``sinks.py``).

The kernel takes ``delta = rowsum(P ∘ dP)`` from ``do · out``, so that a rounding of ``out`` stays in every
score gradient of the row, where a softmax's rows of dS add up to 0.  Where values are much alike, that is
most of what is left of ``dP - delta``.  A vector c that is taken from all values changes roundings only:

    out = P (v - c) + c        dS = P ∘ (do (v - c)ᵀ - rowsum(do ∘ (out - c)))

c is the mean of some outputs of the head.  So it is no larger than an output, whatever stands in values that
no row attends to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flashfuse.kernels import cpu_blas, sinks
from flashfuse.kernels.cpu_blas import Dropout, additive_of
from flashfuse.kernels.cpu_reach import Cut, tiles
from flashfuse.kernels.cpu_score import Form, Sizes, Tile, TileValues, form_of
from flashfuse.kernels.expr import KV, Q, compare
from flashfuse.kernels.ops import empty_bhsd
from flashfuse.kernels.spec import AVERAGING, NAN, REACHING, ScoreProgram, differentiable_loads

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_CAUSAL = compare("<=", KV, Q)

_ROWS = 256
"""Rows per call where a mask needs tiles; the kernel's own blocks shrink below 192."""

_SHORT_ROW = 128
"""Keys per row below which the backward of the kernel loses exactness."""

_FEWEST_COLUMNS = 16
"""Below one vector the kernel gives 0, not NaN, for a row of NaN scores."""

_WORTH_A_CALL = 1 << 20
"""Scores that take much longer than the overhead of one call."""

_SAMPLE = 4
"""Rows from which the common part of the outputs is taken, of at least 16 times as many."""


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
    highest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out`` [B, H, Sq, Dv] laid out as [B, Sq, H, Dv], and ``lse`` [B, H, Sq]; see ``dispatch``.

    The fused kernel tells no maximum, so that ``highest`` is filled by ``cpu_blas``.
    """
    if 0 in (*q.shape[:3], k.shape[2]):
        if highest is not None:
            highest.fill_(float("-inf"))
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=_lse_dtype(q))
        return empty_bhsd(q, (*q.shape[:3], v.shape[-1])).zero_(), lse
    if not dropout_p and highest is None and _is_native(form_of(program)):
        site = _Native(q, k, v, captures, ints, program)
        every = list(site.tiles())
        if all(tile.is_empty or tile.columns >= _FEWEST_COLUMNS for tile in every):
            return _native_forward(site, every, q, k, v)
    return cpu_blas.forward(q, k, v, captures, ints, seed, program, dropout_p, highest)


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
    dlse: Tensor | None = None,
) -> list[Tensor]:
    """``[dq, dk, dv, *gradients of captures[i] for i in capture_grads]``; see ``dispatch``."""
    if 0 in (*q.shape[:3], k.shape[2]):
        grads = [empty_bhsd(t, t.shape).zero_() for t in (q, k, v)]
        return grads + [captures[i].new_zeros(captures[i].shape) for i in capture_grads]
    # The fused kernel gives dead rows no weight, so that no gradient of theirs reaches the scores.
    reached = program.dead_rows in REACHING and bool((lse == float("-inf")).any())
    # Other gradients of captures need every score.
    wanted = [program.captures[i] for i in capture_grads]
    of_sink_only = not differentiable_loads(program.score).intersection(wanted)
    of_out_only = of_sink_only and dlse is None
    if of_out_only and not (dropout_p or reached) and _is_native(form_of(program)):
        site = _Native(q, k, v, captures, ints, program)
        every = list(site.tiles())
        # A sink takes a part of each row, so that roundings of out weigh more beside what is left.
        sums_rows = (program.sink is not None and _is_exact(site)) or _has_short_rows(site, every)
        if not sums_rows:
            return _native_backward(site, every, do, q, k, v, out, lse) + site.sink_gradients(
                wanted, do, out, lse
            )
    return cpu_blas.backward(do, q, k, v, captures, ints, seed, program, dropout_p, capture_grads, dlse)


def dropout_mask(seed: Tensor, dropout_p: float, sizes: Sizes) -> Tensor:
    """[B, H, Sq, Skv]: True where a weight is kept."""
    batch, heads, q_len, kv_len = sizes
    dropout = Dropout(seed, dropout_p, sizes)
    entries = (Tile(b, b + 1, 0, heads, 0, q_len, ((0, kv_len),)) for b in range(batch))
    keep = [dropout.keep_bits(entry) != 0 for entry in entries]
    return torch.stack(keep) if keep else torch.ones(sizes, dtype=torch.bool)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _is_native(form: Form) -> bool:
    # Under a causal mask the kernel multiplies -inf by the scale.
    return form.scale is not None and form.scale > 0


# --- the fused kernel ------------------------------------------------------------------------------


class _Native:
    """One call of the form ``s * scale + bias``: its tiles and their masks."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: Sequence[Tensor],
        ints: Sequence[int],
        program: ScoreProgram,
    ) -> None:
        self.program, self.form = program, form_of(program)
        self.captures: Mapping[str, Tensor] = dict(zip(program.captures, captures, strict=True))
        self.ints = tuple(zip(program.ints, ints, strict=True))
        self.sizes: Sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        self.kv_heads = k.shape[1]
        self.group = q.shape[1] // self.kv_heads
        self.q_dtype, self.dtype = q.dtype, _lse_dtype(q)
        # The kernel wants one head size.
        self.head_dim, self.v_dim = max(q.shape[-1], v.shape[-1]), v.shape[-1]

    def tiles(self) -> Iterator[Tile]:
        """Tiles for the kernel, which skips the upper triangle itself where ``causal`` is set."""
        _, heads, q_len, kv_len = self.sizes
        form = self.form
        grouped = heads != self.kv_heads
        loads_by_batch = form.mask_loads and "b" in form.mask_uses
        causal = _CAUSAL if _CAUSAL in form.conditions and q_len == kv_len else None
        uses = form.bias_uses.union(*(form.uses(c) for c in form.conditions if c != causal))
        if "q" in uses:
            by_batch = grouped or loads_by_batch
            yield from self._cut(_ROWS, by_batch)
            return
        # Padding of one entry may leave most columns out, or a mask with nothing to do.
        by_batch = grouped or (loads_by_batch and heads * q_len * kv_len >= _WORTH_A_CALL)
        for tile in self._cut(q_len, by_batch):
            whole = tile.q1 - tile.q0 == q_len and len(tile.runs) == 1
            if not whole or causal not in tile.conditions:
                yield tile
                continue
            if tile.k0 > 0:
                yield replace(tile, q1=tile.k0, runs=())
            rest = tuple(c for c in tile.conditions if c != causal)
            yield replace(tile, q0=tile.k0, conditions=rest, causal=True)

    def _cut(self, rows: int, by_batch: bool) -> Sequence[Tile]:
        cut = Cut(rows, by_batch, self.group)
        return tiles(self.program, self.captures, self.ints, self.sizes, cut, self.dtype)

    def mask(self, tile: Tile) -> Tensor | None:
        """The additive mask of a tile, broadcasting to [b, H, rows, columns]."""
        values = TileValues(self.form, self.captures, self.ints, self.sizes, tile, self.dtype)
        return additive_of(values, tile)

    def by_group(self, x: Tensor, tile: Tile, heads_are_kv: bool) -> Tensor:
        """Under grouped heads [1, H, n, D] → [H_kv, heads per key head, n, D], copying nothing.

        ``x`` has the entries and heads of the tile.
        """
        if self.group == 1:
            return x
        kv_heads = tile.kv_heads(self.group)
        if heads_are_kv:
            heads = (tile.h1 - tile.h0) // (kv_heads.stop - kv_heads.start)
            return x[0].unsqueeze(1).expand(-1, heads, -1, -1)
        return x[0].unflatten(0, (kv_heads.stop - kv_heads.start, -1))

    def columns_of(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's columns of ``x`` [B, H_kv, Skv, D], by group."""
        return self.by_group(tile.take(x[tile.b0 : tile.b1, tile.kv_heads(self.group)], 2), tile, True)

    def mask_by_group(self, mask: Tensor | None, tile: Tile) -> Tensor | None:
        if mask is None:
            return None
        shape = (tile.q1 - tile.q0, tile.columns)
        if self.group == 1:
            return mask.expand(tile.b1 - tile.b0, mask.shape[1], *shape)
        if mask.shape[1] == 1:
            return mask.expand(1, 1, *shape)
        return self.by_group(mask.expand(1, tile.h1 - tile.h0, *shape), tile, False)

    def by_query_head(self, x: Tensor) -> Tensor:
        """[B, H_kv, n, D] → [B, H, n, D]."""
        return x.repeat_interleave(self.group, 1)

    def centre(self, out: Tensor) -> Tensor:
        """The mean of some rows ``out`` [B, H, n, D] by key head, [B, H_kv, 1, D]; 0 where unusable."""
        mean = out.unflatten(1, (self.kv_heads, -1)).mean((2, 3)).unsqueeze(2)
        # Not where it is NaN or infinite, nor where what is left could overflow.
        return torch.where(mean.abs() < torch.finfo(out.dtype).max ** 0.75, mean, 0)

    def sampled_centre(self, every: Sequence[Tile], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """:meth:`centre` of the last few rows of each batch entry.

        It is 0 where most values are, as those of padding: they add up without a rounding, and should.
        """
        out = v.new_zeros(*self.sizes[:2], _SAMPLE, v.shape[-1])
        for tile in {(tile.b0, tile.h0): tile for tile in every if not tile.is_empty}.values():
            conditions = (*tile.conditions, _CAUSAL) if tile.causal else tile.conditions
            q0 = max(tile.q0, tile.q1 - _SAMPLE)
            some = replace(tile, q0=q0, conditions=conditions, causal=False)
            rows = self.attended(some, self.mask(some), q, k, v)[0]
            out[tile.b0 : tile.b1, tile.h0 : tile.h1, : tile.q1 - q0] = rows
        most = torch.count_nonzero(v, (2, 3)) > v.shape[2] * self.v_dim // 2
        return torch.where(most[..., None, None], self.centre(out), 0)

    def attended(
        self, tile: Tile, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the kernel makes of a tile: [b, H, rows, D] and ``lse`` [b, H, rows]."""
        out, lse = _flash(
            self.by_group(tile.rows_of(q), tile, False),
            self.columns_of(k, tile),
            self.columns_of(v, tile),
            is_causal=tile.causal,
            attn_mask=self.mask_by_group(mask, tile),
            scale=self.form.scale,
        )
        lead = (tile.b1 - tile.b0, tile.h1 - tile.h0, tile.q1 - tile.q0)
        return out.reshape(*lead, self.head_dim), lse.reshape(lead)

    def sink(self, like: Tensor) -> Tensor:
        """[B, H, Sq]."""
        return sinks.logits(
            self.program, tuple(self.captures.values()), [n for _, n in self.ints], self.sizes, like
        )

    def sink_gradients(self, wanted: Sequence[str], do: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        if not wanted:
            return []
        lse = lse.double()
        delta = (do.double() * out.double()).sum(-1)
        weight = torch.where(lse == float("-inf"), 0, (self.sink(lse) - lse).exp())
        found = sinks.gradients(
            self.program, tuple(self.captures.values()), [n for _, n in self.ints], self.sizes, weight, delta,
            wanted,
        )  # fmt: skip
        return [found[name].to(self.captures[name].dtype) for name in wanted]

    def padded(self, x: Tensor) -> Tensor:
        missing = self.head_dim - x.shape[-1]
        x = F.pad(x, (0, missing)) if missing else x
        return x if x.stride(-1) == 1 else x.contiguous()


def _native_forward(
    site: _Native, every: Sequence[Tile], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = site.sizes
    v_dim = v.shape[-1]
    out = empty_bhsd(q, (batch, heads, q_len, v_dim))
    lse = torch.empty(batch, heads, q_len, dtype=site.dtype)
    mean = None
    sink = site.sink(lse) if site.form.sink is not None else None
    q, k, v = site.padded(q), site.padded(k), site.padded(v)
    centre, centred = None, v
    if q_len >= 16 * _SAMPLE and _is_exact(site) and not _has_short_rows(site, every):
        centre = site.sampled_centre(every, q, k, v)
        centred, centre = v - centre, site.by_query_head(centre)
    for tile in every:
        rows = (slice(tile.b0, tile.b1), slice(tile.h0, tile.h1), slice(tile.q0, tile.q1))
        dead: Tensor | None
        if tile.is_empty:
            out[rows] = 0
            lse[rows] = float("-inf")
            dead = torch.ones(1, 1, 1, dtype=torch.bool)
        else:
            mask = site.mask(tile)
            tile_out, lse[rows] = site.attended(tile, mask, q, k, centred)
            dead = _dead_rows(mask, tile, lse[rows])
            if centre is not None:
                tile_out += centre[rows[:2]]
            if dead is not None:
                tile_out = tile_out.masked_fill(dead[..., None], 0)
                lse[rows] = lse[rows].masked_fill(dead, float("-inf"))
            out[rows] = tile_out[..., :v_dim]
        if sink is not None:
            out[rows], lse[rows] = sinks.corrected(out[rows], lse[rows], sink[rows])
            dead = None if dead is None else dead & (sink[rows] == float("-inf"))
        if dead is not None and site.program.dead_rows in NAN:
            out[rows] = out[rows].masked_fill(dead[..., None], float("nan"))
        elif dead is not None and site.program.dead_rows in AVERAGING:
            if mean is None:
                mean = v[..., :v_dim].to(site.dtype).mean(2, keepdim=True).to(v.dtype)
                mean = site.by_query_head(mean)
            out[rows] = torch.where(dead[..., None], mean[rows[:2]], out[rows])
    return out, lse


def _dead_rows(mask: Tensor | None, tile: Tile, lse: Tensor) -> Tensor | None:
    """[b?, H?, rows?]: rows whose mask is −inf throughout; ``None`` where no row is.

    The kernel gives them 0 for lse, which other rows rarely have.
    """
    if mask is None or not (lse == 0).any():
        return None
    if not tile.causal:
        dead = mask.amax(-1) == float("-inf")
    else:
        # mask has one row: row i is dead while no column up to i is allowed.
        last = torch.arange(tile.q1 - tile.q0).clamp_(max=mask.shape[-1] - 1)
        dead = (mask.cummax(-1).values[:, :, 0] == float("-inf"))[..., last]
    return dead if dead.any() else None


def _is_exact(site: _Native) -> bool:
    """Whether ``out`` is as exact as what it is computed in."""
    return site.dtype == site.q_dtype


def _has_short_rows(site: _Native, every: Sequence[Tile]) -> bool:
    """True where every row may see few keys, and the dtype shows the difference.

    The kernel takes rowsum(P ∘ dP) from ``out``.  A softmax takes it from dP itself, so that errors
    cancel in a row of few keys; in float32 the kernel is up to three times less exact there.
    """
    if not _is_exact(site):
        return False
    form = site.form
    if any("q" in form.uses(c) for c in form.conditions if c != _CAUSAL):
        return True
    longest = max(min(t.columns, t.q1 - t.q0) if t.causal else t.columns for t in every)
    return longest < _SHORT_ROW


def _native_backward(
    site: _Native,
    every: Sequence[Tile],
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> list[Tensor]:
    batch, heads, q_len, kv_len = site.sizes
    like = (q, k, v)
    dead = lse == float("-inf")
    any_dead = bool(dead.any())
    if any_dead:
        # With lse 0 the weights of a dead row are exp(-inf - 0) = 0, as long as out is finite.
        lse = lse.masked_fill(dead, 0)
        out = out.masked_fill(dead[..., None], 0)
    if _is_exact(site):
        centre = site.centre(out)
        out, v = out - site.by_query_head(centre), v - centre
    rows_of = [site.padded(x) for x in (do, q, out)] + [lse]
    columns_of = [site.padded(x) for x in (k, v)]

    def run(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        do_, q_, out_, lse_ = (site.by_group(tile.rows_of(x), tile, False) for x in rows_of)
        k_, v_ = (site.columns_of(x, tile) for x in columns_of)
        mask, scale = site.mask_by_group(site.mask(tile), tile), site.form.scale
        dq, dk, dv = _flash_backward(
            do_, q_, k_, v_, out_, lse_, 0.0, tile.causal, attn_mask=mask, scale=scale
        )
        if heads != site.kv_heads:
            dq, dk, dv = dq.flatten(0, 1)[None], *(x.sum(1, dtype=site.dtype)[None] for x in (dk, dv))
        return dq, dk, dv

    if every == [replace(every[0], b0=0, b1=batch, h0=0, h1=heads, q0=0, q1=q_len, runs=((0, kv_len),))]:
        dq, dk, dv = run(every[0])
    else:
        dq = empty_bhsd(q, (*q.shape[:3], site.head_dim))
        dk, dv = (empty_bhsd(lse, (*t.shape[:3], site.head_dim)).zero_() for t in (k, v))
        for tile in every:
            rows = (slice(tile.b0, tile.b1), slice(tile.h0, tile.h1), slice(tile.q0, tile.q1))
            if tile.is_empty:
                dq[rows] = 0
                continue
            heads_of = (slice(tile.b0, tile.b1), tile.kv_heads(site.group))
            dq[rows], tile_dk, tile_dv = run(tile)
            tile.add_to(dk[heads_of], 2, tile_dk)
            tile.add_to(dv[heads_of], 2, tile_dv)
    dq, dk, dv = (x[..., : t.shape[-1]] for x, t in zip((dq, dk, dv), like, strict=True))
    if any_dead and site.program.dead_rows in ("nan", *AVERAGING):
        per_key = (do.to(site.dtype) * dead[..., None]).sum(2, keepdim=True) / kv_len
        if site.program.dead_rows == "nan":
            per_key = per_key.masked_fill(dead.any(2)[..., None, None], float("nan"))
        dv = dv + per_key.unflatten(1, (site.kv_heads, -1)).sum(2)
    return [_laid_out(x.to(q.dtype)) for x in (dq, dk, dv)]


def _laid_out(x: Tensor) -> Tensor:
    """``x`` with the memory of [B, S, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
