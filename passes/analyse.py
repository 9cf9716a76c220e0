"""From the lifted score of a site to its program: score, mask, and what dead rows give.

Models write masks as numbers: ``where(allowed, 0, finfo.min)`` added to the scores, ``-inf`` filled
in.  :func:`program` takes such constants out of the score and says which rule the original follows
for rows that have no key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, SKV, SQ, Expr, Q, S, const
from flashfuse.kernels.spec import NAN, AttentionShape, DeadRows, Reason, ScoreProgram
from flashfuse.passes.lift import Lift
from flashfuse.passes.tables import dtype_of

if TYPE_CHECKING:
    from flashfuse.passes.sinks import Sink

SCORE = S.args[0]

FINITE_MASK = -1e9
"""A finite constant this low is taken as a mask: its weight is 0 unless scores span 10⁹."""


@dataclass(frozen=True)
class Masked:
    """``score`` where ``allowed``, else one of ``fills``.

    Attributes:
        added: how many masks were added up.
        blocked: the score and the loads that a fill replaces, so that no gradient reaches them there.
        open: those that a gradient does reach at some place where the mask is false.
    """

    score: Expr
    allowed: Expr = E.TRUE
    fills: frozenset[float] = frozenset()
    added: int = 0
    blocked: frozenset[str] = frozenset()
    open: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Removal:
    """Weights that are set to 0 after the softmax.

    Attributes:
        kept: where they are not; ``None``: those that are NaN.
        by_factor: they are multiplied by 0, so that NaN stays NaN.
    """

    kept: Expr | None
    by_factor: bool


def implied(mask: Expr | None, kept: Expr) -> bool:
    """Whether ``kept`` holds wherever ``mask`` does."""
    return (mask is not None and _conditions(kept) <= _conditions(mask)) or kept == E.TRUE


def _conditions(e: Expr) -> frozenset[Any]:
    """What must hold for ``e`` to hold, in no order."""
    return frozenset(map(_unordered, e.operands if e.op == "and" else (e,)))


def _unordered(e: Expr) -> Any:
    return (e.op, frozenset(map(_unordered, e.operands))) if e.op in ("and", "or") else e


def _is_mask_value(e: Expr, lowest: float) -> bool:
    return e.is_const and not isinstance(e.value, bool) and (e.value <= FINITE_MASK or e.value <= lowest)


def _inputs(e: Expr) -> frozenset[str]:
    """The score ``s`` and the captures in ``e``: what a gradient can flow to."""
    return frozenset(n.args[0] for n in E.walk(e) if n == S or n.op == "load")


def split(e: Expr, lowest: float) -> Masked:
    """``e`` as a score and a condition; ``lowest`` is the finite minimum of the score's dtype."""
    if e.op == "where":
        condition, a, b = e.args
        return _split_where(condition, a, b, lowest) or Masked(e)
    if e.op == "+":
        parts = [split(a, lowest) for a in e.operands]
        # What one summand forbids, the others do not know of.
        beside = (_inputs(p.score) for p in parts if any(q.added for q in parts if q is not p))
        return Masked(
            E.add(*(p.score for p in parts)),
            E.logical_and(*(p.allowed for p in parts)),
            frozenset().union(*(p.fills for p in parts)),
            sum(p.added for p in parts),
            frozenset().union(*(p.blocked for p in parts)),
            frozenset().union(*(p.open for p in parts), *beside),
        )
    if e.op == "*" and e.args[1].is_const and e.args[1].value > 0:
        inner = split(e.args[0], lowest)
        fills = frozenset(f * e.args[1].value for f in inner.fills)
        if all(f <= FINITE_MASK or f <= lowest for f in fills):
            return dataclasses.replace(inner, score=E.mul(inner.score, e.args[1]), fills=fills)
    if e.op == "max" and any(_is_mask_value(a, lowest) for a in e.args):
        # A floor at the finite minimum: −inf fills become that minimum, the rest is above it.
        floor, a = (e.args[1], e.args[0]) if _is_mask_value(e.args[1], lowest) else (e.args[0], e.args[1])
        inner = split(a, lowest)
        if inner.added:
            fills = frozenset(max(float(floor.value), f) for f in inner.fills)
            still_open = frozenset() if inner.fills == {-math.inf} else inner.open
            return dataclasses.replace(
                inner, fills=fills, added=1, blocked=_inputs(inner.score), open=still_open
            )
    return Masked(e)


def _split_where(condition: Expr, a: Expr, b: Expr, lowest: float) -> Masked | None:
    if _is_mask_value(a, lowest) and not _is_mask_value(b, lowest):
        condition, a, b = E.logical_not(condition), b, a
    left = split(a, lowest)
    if _is_mask_value(b, lowest):
        # A fill over an already masked score replaces it, it does not add up.
        fills = left.fills | {float(b.value)}
        allowed = E.logical_and(left.allowed, condition)
        blocked = left.blocked | _inputs(left.score)
        return Masked(left.score, allowed, fills, max(left.added, 1), blocked, left.open)
    right = split(b, lowest)
    if not left.added and not right.added:
        return None
    allowed = E.logical_or(
        E.logical_and(condition, left.allowed), E.logical_and(E.logical_not(condition), right.allowed)
    )
    score = E.where(condition, left.score, right.score)
    return Masked(
        score,
        allowed,
        left.fills | right.fills,
        max(left.added, right.added),
        left.blocked | right.blocked,
        left.open | right.open,
    )


def program(
    score: Expr,
    dtype: torch.dtype,
    lift: Lift,
    shape: AttentionShape,
    safe: bool,
    sink: Sink | None = None,
    removals: Sequence[Removal] = (),
) -> ScoreProgram | Reason:
    """The program of a lifted score, and of a sink beside it.

    Args:
        dtype: that of the tensor handed to the softmax.
        safe: the softmax gives 0 for rows of −inf (SDPA), not NaN.
        removals: what becomes of the weights, in this order.
    """
    masked = split(score, torch.finfo(dtype).min)
    clean = lift.simplify(masked.score)
    allowed = lift.simplify(masked.allowed)
    if not E.contains(clean, S):
        return Reason(
            "no_score", "the softmax input does not depend on the product of q and k where it is not masked"
        )
    if any(n.is_const and isinstance(n.value, float) and not math.isfinite(n.value) for n in E.walk(clean)):
        return Reason(
            "mask_form", f"an infinite constant that could not be separated from the score: {clean}"
        )
    if E.contains(allowed, S):
        return Reason(
            "mask_on_score", f"the mask depends on the score itself: {allowed}", hint="use a mask of indices"
        )
    if allowed == E.FALSE:
        return Reason("all_masked", "no key is ever allowed")
    mask = None if allowed == E.TRUE else allowed
    infinite: DeadRows = "zero" if safe else "nan"
    # A captured float mask can hold −inf in a whole row.
    loads = any(n.op == "load" for n in E.walk(clean))
    has_keys = mask is None or _every_row_has_a_key(mask, lift, shape)
    dead: DeadRows | Reason
    if sink is not None and sink.may_be_nan and (loads or (-math.inf in masked.fills and not has_keys)):
        return Reason(
            "dead_rows_unclear",
            "the scores are shifted by their own maximum, without the sink, so a row of −inf is NaN",
            hint="take the maximum over the scores and the sink",
        )
    if sink is not None and sink.logit.is_const:
        # Such a sink has the weight that no key has.
        dead = "none"
    elif has_keys:
        dead = infinite if loads else "none"
    elif masked.fills == {-math.inf} and safe:
        dead = "zero"
    else:
        dead = _dead_rows(masked, clean, _receivers(clean, lift), sink)
    logit = None if sink is None else sink.logit
    finite = -math.inf not in masked.fills
    dead, mixed = _dead_rows_after(dead, removals, None if has_keys else mask, finite)
    if isinstance(dead, Reason) and mixed:
        return dead
    if isinstance(dead, Reason):
        return _with_minima_as_numbers(score, dtype, masked, lift, logit) or dead
    return ScoreProgram(clean, mask, dead, logit)


def _dead_rows_after(
    dead: DeadRows | Reason, removals: Sequence[Removal], mask: Expr | None, finite: bool
) -> tuple[DeadRows | Reason, bool]:
    """The rule for rows without a key once weights are set to 0 after the softmax; whether they mix rules.

    Where ``mask`` allows a key, the weights that are removed are those that it forbids, and 0 anyway.

    Args:
        mask: ``None`` where it leaves each row a key.
        finite: what the mask forbids is a finite minimum, so no weight and no gradient is NaN.
    """
    if dead in ("nan_s", "nan_all") and any(not r.by_factor for r in removals):
        # 0 in the output, and NaN in the gradients all the same.
        return _NAN_OF_GRADIENTS, True
    if dead == "nan" and any(r.kept is None for r in removals):
        return "zero", False
    if dead in ("none", "zero") or mask is None or (isinstance(dead, Reason) and not finite):
        return dead, False
    # NaN is not removed by a factor of 0.
    kept = E.logical_and(
        *(r.kept for r in removals if r.kept is not None and not (r.by_factor and dead in NAN))
    )
    if kept == E.TRUE or not implied(mask, kept):
        return dead, False
    if implied(kept, mask):
        return "zero", False
    message = (
        f"after the softmax weights are kept only where `{kept}`: of a row in which the mask `{mask}` allows "
        "no key, some are 0 and some are not"
    )
    hint = "remove them by the same condition as the scores"
    return Reason("dead_rows_unclear", message, hint=hint), True


def _with_minima_as_numbers(
    score: Expr, dtype: torch.dtype, masked: Masked, lift: Lift, sink: Expr | None
) -> ScoreProgram | None:
    """The program whose score holds the finite minima as they are, and no mask; ``None`` where it differs.

    Where it is not clear what a fully masked row gives, the original's own arithmetic says it.  It costs
    sparsity.  float16 rounds what is added to its minimum, the kernels do not.
    """
    if dtype == torch.float16 or -math.inf in masked.fills:
        return None
    return ScoreProgram(lift.simplify(score), None, "nan", sink)


def _receivers(score: Expr, lift: Lift) -> frozenset[str]:
    """The score and the captures in it that may need a gradient."""

    captures = lift.scope.captures
    return frozenset(n for n in _inputs(score) if n == SCORE or dtype_of(captures[n]).is_floating_point)


_NAN_OF_GRADIENTS = Reason(
    "dead_rows_unclear",
    "−inf is added, or a tensor is added to it, so the gradient of a fully masked row is NaN in parts",
    hint="fill the scores with −inf after the last addition",
)


def _dead_rows(
    masked: Masked, score: Expr, receivers: frozenset[str], sink: Sink | None
) -> DeadRows | Reason:
    """The rule for rows in which every score became −inf or a finite minimum."""
    blocked, reached = receivers & masked.blocked, receivers & masked.open
    if masked.fills == {-math.inf}:
        if not reached:
            return "nan"
        # A condition lets no NaN through where it is false, and the rules know of none.
        choices = [n for n in E.walk(score) if n.op in ("where", "min", "max")]
        if sink is None and not blocked & reached and not any(_inputs(n) & reached for n in choices):
            if reached == receivers:
                return "nan_all" if len(reached) > 1 else "nan_s"
            if reached == {SCORE}:
                return "nan_s"
        return _NAN_OF_GRADIENTS
    if masked.added > 1 or len(masked.fills) > 1:
        return Reason(
            "dead_rows_unclear",
            "several masks are added up, so the weights of a fully masked row depend on their overlap",
            hint="combine the conditions before turning them into numbers",
        )
    if not blocked & reached:
        if not reached:
            return "mean"
        if not blocked:
            return "uniform"
        if reached == {SCORE}:
            return "uniform_s"
    return Reason(
        "dead_rows_unclear",
        "a tensor is added after the scores were masked, so the weights of a fully masked row depend on it",
        hint="mask after the last addition",
    )


def _every_row_has_a_key(mask: Expr, lift: Lift, shape: AttentionShape) -> bool:
    """Proved by a witness: key 0, the row's own position, or that position aligned to the end."""
    from flashfuse.passes.nodes import same

    square = same(shape.q_len, shape.kv_len)
    witnesses = [const(0)]
    if square or (
        isinstance(shape.q_len, int) and isinstance(shape.kv_len, int) and shape.q_len <= shape.kv_len
    ):
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
