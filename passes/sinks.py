"""What a softmax sums beside the scores, and what all that it normalises is shifted by.

A sink is a logit that takes part in the sum of a row and in nothing else: one more column of what is
normalised, cut off before the product with v, or a term added to the sum of exponentials.

    P_ij = exp(x_ij − c_i) / (exp(t_i − c_i) + Σ_j exp(x_ij − c_i))  does not depend on c,

so a row's own maximum may be taken off, and its gradient cancels, as long as it is taken off everywhere
in the row.  That is what :func:`without_shift` looks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, Expr, S, const
from flashfuse.kernels.spec import Reason
from flashfuse.passes.analyse import FINITE_MASK
from flashfuse.passes.lift import Lift
from flashfuse.passes.nodes import Size, same


@dataclass(frozen=True)
class Sink:
    """The logit of a row beside its scores.

    ``may_be_nan``: in a row whose scores are all −∞ the original takes ∞ from ∞, whatever the sink is.
    """

    logit: Expr
    may_be_nan: bool = False


def cut_column(position: Expr, length: Size, total: Size, lift: Lift) -> Expr | None:
    """The index of the one column that a slice of ``total`` columns to ``length`` leaves out.

    Args:
        position: where column ``kv`` of the slice lies.
    """
    start = E.sub(position, KV) if E.contains(position, KV) or not same(length, 1) else position
    if same(total, length + 1):
        if start == const(0):
            return lift.size(length)
        if start == const(1):
            return const(0)
    return None


def without_shift(
    score: Expr, sink: Expr | None, total: Size | None, lift: Lift
) -> tuple[Expr, Sink | None] | Reason:
    """Score and sink without the shift that they share.

    Args:
        total: the length of what is normalised, where the sink is a column of it.
    """
    score, shifts = _split_shift(score, lift)
    if any(_is_row(n, lift) for n in E.walk(score)):
        return Reason("score_path", "what is normalised depends on a reduction over the scores themselves")
    if sink is None:
        return score, None
    sink, beside = _split_shift(lift.simplify(sink), lift)
    if E.contains(sink, KV) or any(_is_of_scores(n, lift) for n in E.walk(sink)):
        return Reason("weights_path", "what is cut off before the product with v depends on the scores")
    if shifts != beside:
        return Reason("sink", "the scores are shifted by something that the sink is not shifted by")
    if sink.is_const and sink.value == -math.inf:
        # No weight at all: an ordinary softmax.
        return score, None
    if any(n.is_const and not isinstance(n.value, bool) and n.value <= FINITE_MASK for n in E.walk(sink)):
        return Reason("sink", f"the sink is masked itself: {sink}")
    if sink.is_const:
        sink = const(float(sink.value))
    unsafe = any(not _is_finite(shift, sink, total, lift) for shift in shifts)
    return score, Sink(sink, unsafe)


def _is_row(e: Expr, lift: Lift) -> bool:
    return e.op == "load" and e.args[0] in lift.rows


def _is_of_scores(e: Expr, lift: Lift) -> bool:
    if e.op != "load":
        return e == S
    node = lift.scope.captures.get(e.args[0])
    known = lift.visited.get(node) if isinstance(node, fx.Node) else None
    return _is_row(e, lift) or (known is not None and E.contains(known, S))


def _split_shift(e: Expr, lift: Lift) -> tuple[Expr, frozenset[Expr]]:
    """``e`` as a rest minus shifts that are alike at every key, where it is not masked."""
    if e.op == "+":
        rest: list[Expr] = []
        found: frozenset[Expr] = frozenset()
        for term in e.operands:
            kept, shifts = _split_shift(term, lift)
            if shifts & found:
                # Twice the maximum may overflow where the maximum does not.
                return e, frozenset()
            found |= shifts
            rest.append(kept)
        return (E.add(*rest), found) if found else (e, found)
    if e.op == "*" and e.args[1] == const(-1) and _is_shift(e.args[0], lift):
        return const(0), frozenset((e.args[0],))
    if e.op == "*" and e.args[1].is_const and 0 < e.args[1].value < math.inf:
        # CogView's ``(x / a - max(x / a)) * a``: the same shift, and as much of it in every term.
        kept, shifts = _split_shift(e.args[0], lift)
        return E.mul(kept, e.args[1]), frozenset(E.mul(shift, e.args[1]) for shift in shifts)
    if e.op == "where":
        condition, *branches = e.args
        split = [(b, None) if _masks(b) else _split_shift(b, lift) for b in branches]
        shifts_of = {shifts for _, shifts in split if shifts is not None}
        if len(shifts_of) == 1 and (shifts := shifts_of.pop()):
            return E.where(condition, split[0][0], split[1][0]), shifts
    return e, frozenset()


def _masks(e: Expr) -> bool:
    return e.is_const and not isinstance(e.value, bool) and e.value <= FINITE_MASK


def _is_shift(e: Expr, lift: Lift) -> bool:
    """A maximum of a row's scores, or the larger or smaller of one and something that no key changes."""
    if E.contains(e, KV) or E.contains(e, S):
        return False
    if e.op in ("min", "max"):
        return any(_is_shift(a, lift) for a in e.args)
    return _is_row(e, lift)


def _is_finite(shift: Expr, sink: Expr, total: Size | None, lift: Lift) -> bool:
    """Whether a shift is finite in a row whose scores are all −∞, if the sink is."""
    if shift.op == "load":
        row = lift.rows.get(shift.args[0])
        return row is not None and total is not None and same(row.length, total)
    if shift.op == "max":
        return any(a == sink or (a.is_const and a.value > -math.inf) for a in shift.args) or any(
            _is_finite(a, sink, total, lift) for a in shift.args
        )
    return False


def reductions(lift: Lift) -> dict[fx.Node, None]:
    """Nodes that a row's maximum is made by: they belong to the site where it cancels."""
    return dict.fromkeys(n for row in lift.rows.values() for n in (*row.through, row.node))
