"""A plain model of the blockwise kernels, over field elements.

What ``kernels/forward.py``, ``kernels/backward.py`` and the CPU variant have in common, without layout,
precision or parallelism: a map of empty, full and partial blocks, a running maximum with rescaling,
weights recomputed in the backward from the row statistics, delta, gradients summed over groups and
broadcast axes, rows without a key.  With R the dropout keep-mask over 1 − p:

    over blocks of keys:   l ← l·e^(m − m') + Σ e^(x − m')   acc ← acc·e^(m − m') + (e^(x − m') ∘ R) v
    P = e^(x − m) / l       delta = do · out       dP = (do vᵀ) ∘ R
    dX = P ∘ (dP − delta)   dS = dX · d score / d s      dq = dS k   dk = dSᵀ q   dv = (P ∘ R)ᵀ do

The running maximum is a random number at the level of the highest score: nothing may depend on it.
FlashAttention (Dao et al. 2022, algorithms 1, 2, 4; Dao 2023).

Shapes: q dq [B, H, Sq, D], k dk [B, H_kv, Skv, D], v dv [B, H_kv, Skv, Dv], out do [B, H, Sq, Dv],
m l delta [B, H, Sq, 1], keep [B, H, Sq, Skv], states [B or 1, H or 1, blocks of queries, blocks of keys].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels import expr as E
from flashfuse.kernels.block_map import EMPTY, FULL
from flashfuse.kernels.derivative import derivative
from flashfuse.kernels.expr import Expr, S
from flashfuse.kernels.spec import AVERAGING, NAN, REACHING, SCORES_ONLY, ScoreProgram
from flashfuse.proof.program import evaluate, truth
from flashfuse.proof.value import Draw, Value

Block = slice


@dataclass
class Tiled:
    """One site: inputs, program, and the sizes of blocks.

    Attributes:
        captures, ints: in the order of ``program.captures`` and ``program.ints``.
        states: which blocks are empty, partial or full; ``None`` where there is no mask.
        blocks: rows and columns of a block.
        dtype: in which the kernels compute scores.
    """

    q: Value
    k: Value
    v: Value
    captures: Sequence[Value | Tensor]
    ints: Sequence[int]
    program: ScoreProgram
    blocks: tuple[int, int]
    states: Tensor | None = None
    dropout_p: float = 0.0
    keep: Tensor | None = None
    dtype: torch.dtype = torch.float32

    # --- what both directions need --------------------------------------------------------------

    @property
    def draw(self) -> Draw:
        return self.q.draw

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, Sq, Skv."""
        return (*self.q.shape[:3], self.k.shape[2])

    @functools.cached_property
    def k_of_heads(self) -> Value:
        return self.k.map(self.repeated)

    @functools.cached_property
    def v_of_heads(self) -> Value:
        return self.v.map(self.repeated)

    def repeated(self, t: Tensor) -> Tensor:
        """Key and value heads for every query head: head h reads h // group."""
        return t.repeat_interleave(self.q.shape[1] // t.shape[1], 1)

    def of_key_heads(self, x: Value) -> Value:
        """Gradients of the query heads of a group, summed."""
        return x.map(lambda t: t.unflatten(1, (self.k.shape[1], -1))).sum((2,))

    def tiles(self, length: int, block: int) -> Iterator[Block]:
        return (slice(i, min(i + block, length)) for i in range(0, length, block))

    def environment(self, rows: Block, columns: Block) -> dict[str, Any]:
        b, h, q_len, kv_len = self.sizes
        axes = (range(b), range(h), range(q_len)[rows], range(kv_len)[columns])
        env: dict[str, Any] = {"Sq": q_len, "Skv": kv_len}
        for axis, (name, values) in enumerate(zip(E.INDEX_VARS, axes, strict=True)):
            env[name] = torch.tensor(list(values)).view([-1 if d == axis else 1 for d in range(4)])
        env |= dict(zip(self.program.captures, self.captures, strict=True))
        return env | dict(zip(self.program.ints, self.ints, strict=True))

    def products(self, rows: Block, columns: Block) -> Value:
        """q kᵀ of a tile."""
        k = self.k_of_heads.map(lambda t: t[:, :, columns].transpose(-1, -2))
        return self.q.map(lambda t: t[:, :, rows]) @ k

    def evaluated(self, e: Expr, env: dict[str, Any]) -> Value:
        found = self.draw.value(evaluate(e, env, self.draw, self.dtype))
        shape = torch.broadcast_shapes(found.shape, env["s"].shape)
        return found.map(lambda t: t.expand(shape))

    def allowed(self, rows: Block, columns: Block) -> Tensor | None:
        """Where a tile attends, as the block map has it; ``None`` where no block of it is visited."""
        b, h, _, _ = self.sizes
        shape = (b, h, rows.stop - rows.start, columns.stop - columns.start)
        if self.program.mask is None:
            return torch.ones(shape, dtype=torch.bool)
        if self.states is None:
            return self.mask(rows, columns).expand(shape)
        state = self.states[:, :, rows.start // self.blocks[0], columns.start // self.blocks[1], None, None]
        if bool((state == EMPTY).all()):
            return None
        full = state == FULL
        partial = full if bool(full.all()) else full | self.mask(rows, columns)
        return (partial & (state != EMPTY)).expand(shape)

    def masked(self, x: Value, allowed: Tensor) -> Value:
        return x if bool(allowed.all()) else x.where(allowed, -math.inf)

    def sink(self, rows: Block) -> Value:
        """The logit [B, H, rows, 1] that only the sum sees."""
        assert self.program.sink is not None
        found = evaluate(self.program.sink, self.environment(rows, slice(0, 1)), self.draw, self.dtype)
        return self.draw.value(found).map(
            lambda t: t.expand(*self.sizes[:2], rows.stop - rows.start, 1).clone()
        )

    def mask(self, rows: Block, columns: Block) -> Tensor:
        assert self.program.mask is not None
        return truth(evaluate(self.program.mask, self.environment(rows, columns), self.draw, self.dtype))

    def kept(self, x: Value, rows: Block, columns: Block) -> Value:
        """x ∘ R."""
        if not self.dropout_p:
            return x
        assert self.keep is not None
        return self.drop_scaled(x.where(self.keep[:, :, rows, columns], 0))

    def drop_scaled(self, x: Value) -> Value:
        return x / self.draw.value(1 - self.dropout_p)

    # --- forward --------------------------------------------------------------------------------

    def forward(self) -> tuple[Value, Value, Value]:
        """(out, m, l); l is 0 in a row without a key, nor a sink."""
        parts = [self.forward_rows(rows) for rows in self.tiles(self.sizes[2], self.blocks[0])]
        out, m, l = (_concatenated(x) for x in zip(*parts, strict=True))
        return self.dead_rows_out(out, l), m, l

    def forward_rows(self, rows: Block) -> tuple[Value, Value, Value]:
        b, h, _, kv_len = self.sizes
        lead = (b, h, rows.stop - rows.start)
        m, l = self.start(lead, rows)
        acc = self.zeros((*lead, self.v.shape[-1]))
        for columns in self.tiles(kv_len, self.blocks[1]):
            allowed = self.allowed(rows, columns)
            if allowed is None:
                continue
            env = self.environment(rows, columns) | {"s": self.products(rows, columns)}
            x = self.masked(self.evaluated(self.program.score, env), allowed)
            top = self.highest(m, x)
            weights, rescale = self.weights(x, top), self.weights(m, top)
            v = self.v_of_heads.map(lambda t, columns=columns: t[:, :, columns])
            l, acc = self.accumulated(l, acc, rescale, weights, self.kept(weights, rows, columns), v)
            m = top
        used = l.where(l.p != 0, 1)
        return acc / used, m, l

    def accumulated(
        self, l: Value, acc: Value, rescale: Value, weights: Value, kept: Value, v: Value
    ) -> tuple[Value, Value]:
        """l and acc with one more tile."""
        return l * rescale + weights.sum((-1,), True), acc * rescale + kept @ v

    def start(self, lead: tuple[int, ...], rows: Block) -> tuple[Value, Value]:
        """m and l before the first key: −∞ and 0, or the sink's."""
        zero = self.zeros((*lead, 1))
        if self.program.sink is None:
            return zero.where(torch.zeros((), dtype=torch.bool), -math.inf), zero
        sink = self.sink(rows)
        absent = _is_absent(sink)
        return sink, zero.where(absent, 1)

    def zeros(self, sizes: Sequence[int]) -> Value:
        zero = torch.zeros(tuple(sizes), dtype=torch.int64)
        return Value(self.draw, zero, zero)

    def highest(self, m: Value, x: Value) -> Value:
        """A new maximum: any number, at the highest level met."""
        fresh = torch.randint(1, self.draw.q, (2, *m.shape), generator=self.draw.others)
        level = None
        if m.level is not None and x.level is not None:
            level = torch.maximum(m.level, x.level.amax(-1, keepdim=True))
        return Value(self.draw, fresh[0], fresh[1], level)

    def weights(self, x: Value, m: Value) -> Value:
        """e^(x − m); while a row has seen no key, 0 stands for its maximum."""
        if m.level is not None:
            m = m.where(m.level != -math.inf, 0)
        return (x - m).rounded(self.dtype).exp()

    def log_sum_exp(self, m: Value, l: Value) -> Value:
        """lse [B, H, Sq] = m + ln l; −∞ in a row without a key."""
        total = (Value(self.draw, m.p, m.q).exp() * l).log()
        level = torch.zeros(l.shape).double() if m.level is None else m.level.expand(l.shape)
        total.level = torch.where(l.p == 0, -math.inf, level)
        return _squeezed(total)

    def largest(self) -> Value:
        """The largest score [B, H, Sq] of each row, tile by tile."""
        parts = [self.largest_of_rows(rows) for rows in self.tiles(self.sizes[2], self.blocks[0])]
        return _squeezed(_concatenated(parts))

    def largest_of_rows(self, rows: Block) -> Value:
        zero = self.zeros((*self.sizes[:2], rows.stop - rows.start, 1))
        top = zero.where(torch.zeros((), dtype=torch.bool), -math.inf)
        if self.program.sink is not None:
            top = self.sink(rows).largest(-1, True)
        for columns in self.tiles(self.sizes[3], self.blocks[1]):
            allowed = self.allowed(rows, columns)
            if allowed is not None:
                env = self.environment(rows, columns) | {"s": self.products(rows, columns)}
                x = self.masked(self.evaluated(self.program.score, env), allowed).rounded(self.dtype)
                top = _larger(top, x.largest(-1, True))
        return top

    def dead_rows_out(self, out: Value, l: Value) -> Value:
        dead = l.p == 0
        if not bool(dead.any()):
            return out
        everything = (slice(0, self.sizes[2]), slice(0, self.sizes[3]))
        if self.program.dead_rows in AVERAGING:
            return (self.kept(self.uniform_weights(), *everything) @ self.v_of_heads).where(dead, out)
        return out.where(~dead, math.nan if self.program.dead_rows in NAN else 0)

    def uniform_weights(self) -> Value:
        b, h, q_len, kv_len = self.sizes
        return (self.zeros((b, h, q_len, kv_len)) + 1) / kv_len

    # --- backward -------------------------------------------------------------------------------

    def backward(
        self, do: Value, out: Value, m: Value, l: Value, dlse: Value | None = None
    ) -> list[Value | None]:
        """[dq, dk, dv, a gradient for each capture (``None`` for integers)]; ``dlse`` [B, H, Sq]."""
        dead = l.p == 0
        delta = self.delta(do, out)
        if delta.level is not None:
            # A row that the mode made NaN has weights of 0, which must still give 0.
            delta = delta.where(~dead, 0)
        if dlse is not None:
            delta = delta - dlse.map(lambda t: t[..., None]).where(~dead, 0)
        rows = [*self.tiles(self.sizes[2], self.blocks[0])]
        columns = [*self.tiles(self.sizes[3], self.blocks[1])]
        dq, dk, dv = (self.zeros(x.shape) for x in (self.q, self.k, self.v))
        dcaptures = {n: self.zeros(c.shape) for n, c in self.float_captures.items()}
        parts = [(r, c, False) for r in rows for c in columns]
        if self.program.dead_rows in (*AVERAGING, *REACHING) and bool(dead.any()):
            parts.append((slice(0, self.sizes[2]), slice(0, self.sizes[3]), True))
        for r, c, uniform in parts:
            found = self.backward_tile(r, c, do, delta, m, l, dead, uniform)
            if found is None:
                continue
            ds, dx, weights, env = found
            scatter = functools.partial(_placed, self.draw)
            dq = dq + scatter(dq, r, ds @ self.k_of_heads.map(lambda t, c=c: t[:, :, c]))
            q = self.q.map(lambda t, r=r: t[:, :, r])
            dk = dk + scatter(dk, c, self.of_key_heads(_transposed(ds) @ q))
            do_rows = do.map(lambda t, r=r: t[:, :, r])
            dv = dv + scatter(dv, c, self.of_key_heads(_transposed(self.kept(weights, r, c)) @ do_rows))
            if not (uniform and self.program.dead_rows in SCORES_ONLY):
                self.add_capture_gradients(dcaptures, dx, env)
        if self.program.dead_rows in NAN and bool(dead.any()):
            any_dead = self.of_key_heads(self.draw.value(dead.long()).sum((2,), True)).p != 0
            dv = dv.where(~any_dead, math.nan)
        if self.program.sink is not None:
            self.add_sink_gradients(dcaptures, delta, m, l, dead)
        return [dq, dk, dv, *(dcaptures.get(name) for name in self.program.captures)]

    def delta(self, do: Value, out: Value) -> Value:
        return (do * out).sum((-1,), True)

    def backward_tile(
        self, r: Block, c: Block, do: Value, delta: Value, m: Value, l: Value, dead: Tensor, uniform: bool
    ) -> tuple[Value, Value, Value, dict[str, Any]] | None:
        """(dS, dX, P, what the program saw) of a tile; ``uniform``: of dead rows, which attend alike."""
        allowed = torch.ones((), dtype=torch.bool) if uniform else self.allowed(r, c)
        if allowed is None:
            return None
        env = self.environment(r, c) | {"s": self.products(r, c)}
        x = self.evaluated(self.program.score, env)
        row = lambda v: v.map(lambda t: t[:, :, r])  # noqa: E731
        if uniform:
            weights = self.uniform_weights().where(dead, 0)
        else:
            normal = row(l).where(~dead[:, :, r], 1)
            weights = (self.weights(self.masked(x, allowed), row(m)) / normal).where(~dead[:, :, r], 0)
        v = self.v_of_heads.map(lambda t: t[:, :, c].transpose(-1, -2))
        dp = self.kept(row(do) @ v, r, c)
        dx = weights * (dp - row(delta))
        if uniform and self.program.dead_rows == "mean":
            dx = dx * 0
        elif uniform and self.program.dead_rows in NAN:
            dx = dx.where(~dead.expand(dx.shape), math.nan)
        ds = (dx * self.evaluated(derivative(self.program.score, S), env)).where(allowed, 0)
        return ds, dx, weights, env

    @property
    def float_captures(self) -> dict[str, Value]:
        named = zip(self.program.captures, self.captures, strict=True)
        return {n: c for n, c in named if isinstance(c, Value)}

    def add_capture_gradients(self, totals: dict[str, Value], dx: Value, env: dict[str, Any]) -> None:
        """d capture += Σ dX · d score / d load, at the place that was loaded."""
        for load in {n for n in E.walk(self.program.score) if n.op == "load" and n.args[0] in totals}:
            self.scatter(totals, load, dx * self.evaluated(derivative(self.program.score, load), env), env)

    def scatter(self, totals: dict[str, Value], load: Expr, grad: Value, env: dict[str, Any]) -> None:
        """``grad`` of every use of ``load``, added where it was loaded."""
        name = load.args[0]
        places = [torch.as_tensor(evaluate(i, env, self.draw, self.dtype)) for i in load.operands]
        at = torch.broadcast_tensors(*places, grad.p)[:-1]
        total = totals[name]
        added = total.p.index_put(at, grad.p, accumulate=True) % self.draw.p
        level = total.level
        if grad.level is not None:
            level = torch.zeros(total.shape).double() if level is None else level
            level = level.index_put(at, grad.level.expand(grad.shape), accumulate=True)
        totals[name] = Value(self.draw, added, level=level)

    def add_sink_gradients(
        self, totals: dict[str, Value], delta: Value, m: Value, l: Value, dead: Tensor
    ) -> None:
        """d capture −= Σ P_sink · delta · d sink / d load."""
        assert self.program.sink is not None
        rows = slice(0, self.sizes[2])
        env = self.environment(rows, slice(0, 1))
        weight = (self.weights(self.sink(rows), m) / l.where(~dead, 1)).where(~dead, 0)
        for load in {n for n in E.walk(self.program.sink) if n.op == "load" and n.args[0] in totals}:
            slope = self.draw.value(evaluate(derivative(self.program.sink, load), env, self.draw, self.dtype))
            self.scatter(totals, load, -(weight * delta * slope), env)


def _is_absent(sink: Value) -> Tensor:
    """Where a sink is −∞, which is none."""
    return torch.zeros((), dtype=torch.bool) if sink.level is None else sink.level == -math.inf


def _squeezed(x: Value) -> Value:
    """Without the last dimension, of size 1."""
    q, level, factor = (None if t is None else t.squeeze(-1) for t in (x.q, x.level, x.factor))
    return Value(x.draw, x.p.squeeze(-1), q, level, factor=factor)


def _larger(a: Value, b: Value) -> Value:
    """Two parts of a row, of ``Value.largest``."""
    assert a.level is not None and b.level is not None
    level = torch.maximum(a.level, b.level)
    p = torch.where(a.level == level, a.p, 0) + torch.where(b.level == level, b.p, 0)
    p = torch.where(level == -math.inf, 0, p % a.draw.p)
    return Value(a.draw, p, level=level)


def _transposed(x: Value) -> Value:
    return x.map(lambda t: t.transpose(-1, -2))


def _concatenated(parts: Sequence[Value]) -> Value:
    q = None if any(x.q is None for x in parts) else torch.cat([x.q for x in parts], 2)  # type: ignore[misc]
    levels = [torch.zeros(x.shape).double() if x.level is None else x.level.expand(x.shape) for x in parts]
    return Value(parts[0].draw, torch.cat([x.p for x in parts], 2), q, torch.cat(levels, 2))


def _placed(draw: Draw, like: Value, rows: Block, x: Value) -> Value:
    """``x`` as rows of a tensor shaped like another, 0 elsewhere."""

    def place(t: Tensor) -> Tensor:
        whole = t.new_zeros(like.shape)
        whole[:, :, rows] = t
        return whole

    return x.map(place)


def weights_by_definition(site: Tiled) -> Value:
    """P [B, H, Sq, Skv], all at once: the softmax over the keys that the mask allows."""
    everything = (slice(0, site.sizes[2]), slice(0, site.sizes[3]))
    env = site.environment(*everything) | {"s": site.products(*everything)}
    x = site.evaluated(site.program.score, env)
    if site.program.mask is not None:
        x = x.where(site.mask(*everything), -math.inf)
    if site.program.sink is not None:
        x = _with_sink(x, site.sink(everything[0]))
    weights = x.softmax(-1, dead_rows_are_zero=True)
    if site.program.sink is not None:
        weights = weights.map(lambda t: t[..., :-1])
    level = torch.zeros(()) if x.level is None else x.level.expand(x.shape)
    dead = (level == -math.inf).expand(x.shape).all(-1, keepdim=True)
    if site.program.dead_rows in AVERAGING:
        return site.uniform_weights().where(dead, weights)
    return weights.where(~dead, math.nan) if site.program.dead_rows in NAN else weights


def _with_sink(x: Value, column: Value) -> Value:
    assert x.q is not None and column.q is not None
    level = None
    if x.level is not None or column.level is not None:
        parts = [torch.zeros(v.shape).double() if v.level is None else v.level for v in (x, column)]
        level = torch.cat([t.expand(v.shape) for t, v in zip(parts, (x, column), strict=True)], -1)
    return Value(x.draw, torch.cat([x.p, column.p], -1), torch.cat([x.q, column.q], -1), level)
