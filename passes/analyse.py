"""From the lifted score of a site to its program: score, mask, and what dead rows give.

Models write masks as numbers: ``where(allowed, 0, finfo.min)`` added to the scores, ``-inf`` filled
in.  :func:`program` takes such constants out of the score and says which rule the original follows
for rows that have no key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, SKV, SQ, Expr, Q, S, const
from flashfuse.kernels.spec import AttentionShape, DeadRows, Reason, ScoreProgram
from flashfuse.passes.lift import Lift

FINITE_MASK = -1e9
"""A finite constant this low is taken as a mask: its weight is 0 unless scores span 10⁹."""


@dataclass(frozen=True)
class Masked:
    """``score`` where ``allowed``, else one of ``fills``; ``terms`` counts masks that were added up."""

    score: Expr
    allowed: Expr
    fills: frozenset[float] = frozenset()
    terms: int = 0


def _is_mask_value(e: Expr, lowest: float) -> bool:
    return e.is_const and not isinstance(e.value, bool) and (e.value <= FINITE_MASK or e.value <= lowest)


def split(e: Expr, lowest: float) -> Masked:
    """``e`` as a score and a condition; ``lowest`` is the finite minimum of the score's dtype."""
    if e.op == "where":
        condition, a, b = e.args
        if _is_mask_value(b, lowest) or _is_mask_value(a, lowest):
            kept, fill, allowed = (a, b, condition) if _is_mask_value(b, lowest) else (b, a, E.logical_not(condition))
            if _is_mask_value(kept, lowest):
                return Masked(kept, E.TRUE)
            inner = split(kept, lowest)
            terms = inner.terms + 1
            # where() over an already masked score replaces, it does not add: rows stay uniform.
            fills = inner.fills | {float(fill.value)}
            return Masked(inner.score, E.logical_and(inner.allowed, allowed), fills, terms if len(fills) > 1 else 1)
        left, right = split(a, lowest), split(b, lowest)
        if left.terms == 0 and right.terms == 0:
            return Masked(e, E.TRUE)
        if left.fills == right.fills or not left.fills or not right.fills:
            allowed = E.logical_or(
                E.logical_and(condition, left.allowed), E.logical_and(E.logical_not(condition), right.allowed)
            )
            return Masked(
                E.where(condition, left.score, right.score), allowed, left.fills | right.fills, max(left.terms, right.terms)
            )
        return Masked(e, E.TRUE)
    if e.op == "+":
        parts = [split(a, lowest) for a in e.operands]
        return Masked(
            E.add(*(p.score for p in parts)),
            E.logical_and(*(p.allowed for p in parts)),
            frozenset().union(*(p.fills for p in parts)),
            sum(p.terms for p in parts),
        )
    if e.op == "*" and e.args[1].is_const and e.args[1].value > 0:
        inner = split(e.args[0], lowest)
        scaled = frozenset(f * e.args[1].value for f in inner.fills)
        if inner.terms and all(f <= FINITE_MASK or f <= lowest for f in scaled):
            return Masked(E.mul(inner.score, e.args[1]), inner.allowed, scaled, inner.terms)
        return Masked(e, E.TRUE)
    if e.op == "max" and any(_is_mask_value(a, lowest) for a in e.args):
        # A floor at the finite minimum: −inf fills become that minimum, the rest is above it.
        floor, a = (e.args[1], e.args[0]) if _is_mask_value(e.args[1], lowest) else (e.args[0], e.args[1])
        inner = split(a, lowest)
        if inner.terms:
            return Masked(inner.score, inner.allowed, frozenset({max(float(floor.value), f) for f in inner.fills}), 1)
    return Masked(e, E.TRUE)


def program(score: Expr, dtype: torch.dtype, lift: Lift, shape: AttentionShape, from_sdpa: bool) -> ScoreProgram | Reason:
    """The program of a lifted score; ``dtype`` is that of the tensor handed to the softmax."""
    lowest = torch.finfo(dtype).min
    masked = split(score, lowest)
    clean = lift.simplify(masked.score)
    allowed = lift.simplify(masked.allowed)
    if not E.contains(clean, S):
        return Reason("no_score", "the softmax input does not depend on the product of q and k where it is not masked")
    if any(n.is_const and isinstance(n.value, float) and not math.isfinite(n.value) for n in E.walk(clean)):
        return Reason("mask_form", f"an infinite constant that could not be separated from the score: {clean}")
    if E.contains(allowed, S):
        return Reason("mask_on_score", f"the mask depends on the score itself: {allowed}", hint="use a mask of indices")
    if allowed == E.FALSE:
        return Reason("all_masked", "no key is ever allowed")
    mask = None if allowed == E.TRUE else allowed
    may_be_infinite = any(n.op == "load" for n in E.walk(clean))
    dead: DeadRows = "zero" if from_sdpa else "nan"
    if mask is None or _every_row_has_a_key(mask, lift, shape):
        # A captured float mask can still hold −inf in a whole row.
        return ScoreProgram(clean, mask, dead if may_be_infinite else "none")
    if masked.fills != {-math.inf}:
        if masked.terms > 1 or len(masked.fills) > 1:
            return Reason(
                "dead_rows_unclear",
                "several finite masks are added up, so the weights of a fully masked row depend on their overlap",
                hint="combine the conditions before turning them into numbers",
            )
        dead = "mean"
    return ScoreProgram(clean, mask, dead)


def _every_row_has_a_key(mask: Expr, lift: Lift, shape: AttentionShape) -> bool:
    """Proved by a witness: key 0, the row's own position, or that position aligned to the end."""
    from flashfuse.passes.nodes import same

    square = same(shape.q_len, shape.kv_len)
    witnesses = [const(0)]
    if square or (isinstance(shape.q_len, int) and isinstance(shape.kv_len, int) and shape.q_len <= shape.kv_len):
        witnesses += [Q, E.add(Q, SKV, E.neg(SQ))]
    for witness in witnesses:
        placed = E.substitute(mask, lambda n, w=witness: w if n == KV else None)  # type: ignore[misc]
        if isinstance(shape.q_len, int) and isinstance(shape.kv_len, int):
            lengths = {SQ: const(shape.q_len), SKV: const(shape.kv_len)}
            placed = E.substitute(placed, lengths.get)
        elif square:
            placed = E.substitute(placed, {SKV: SQ}.get)
        if lift.simplify(placed) == E.TRUE:
            return True
    return False
