"""Tensors that are known by formula: positions, constants, and sums and differences of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.passes import nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index, NotLiftable, dimension
from flashfuse.passes.nodes import same, shape

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift


def _arange(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    start, step = lift.number(op.args["start"]), lift.number(op.args["step"])
    return E.add(start, E.mul(index[0], step))


def _filled(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    example = nodes.tensor(node)
    if example is None:
        raise NotLiftable("a tensor that is not dense")
    if op.name.startswith(("zeros", "new_zeros")):
        fill = const(0)
    elif op.name.startswith(("ones", "new_ones")):
        fill = const(1)
    else:
        fill = lift.number(op.args["value"])
    if example.dtype == torch.bool:
        return E.truth(fill)
    return fill


def _identity(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    on = E.compare("==", index[0], index[1])
    example = nodes.tensor(node)
    return on if example is not None and example.dtype == torch.bool else E.where(on, const(1), const(0))


def _difference(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    """``diff(x, prepend=p)`` of closed forms: Transformers looks for packed sequences with it."""
    d = dimension(op.get("dim", -1), len(index))
    prepend = op.args.get("prepend")
    if op.get("n", 1) != 1 or op.args.get("append") is not None:
        raise NotLiftable("a difference of this form")

    def at(x: fx.Node, position: Expr) -> Expr:
        e = lift.element(x, (*index[:d], position, *index[d + 1 :]))
        if any(n.op == "load" for n in E.walk(e)):
            raise NotLiftable("a difference of stored values")
        return e

    here = index[d] if prepend is not None else E.add(index[d], const(1))
    step = E.sub(at(op.input, here), at(op.input, E.sub(here, const(1))))
    if prepend is None:
        return step
    if not same(shape(prepend)[d], 1):
        raise NotLiftable("a difference with more than one value before it")
    first = E.sub(at(op.input, const(0)), at(prepend, const(0)))
    return E.where(E.compare("==", index[d], const(0)), first, step)


def _running_sum(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    """The running sum of a constant."""
    d = dimension(op.args["dim"], len(index))
    e = lift.element(op.input, (*index[:d], E.var("i"), *index[d + 1 :]))
    if not e.is_const:
        raise NotLiftable("a running sum")
    return E.mul(E.add(index[d], const(1)), const(e.value + 0))


def _literal(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    if index:
        raise NotLiftable("a literal list")
    return lift.number(op.args["data"])


FORMULAS: dict[str, Callable[[Lift, fx.Node, Op, Index], Expr]] = {
    "arange": _arange,
    **dict.fromkeys(
        (
            "full",
            "zeros",
            "ones",
            "new_full",
            "new_zeros",
            "new_ones",
            "full_like",
            "zeros_like",
            "ones_like",
        ),
        _filled,
    ),
    "eye": _identity,
    "diff": _difference,
    "cumsum": _running_sum,
    "tensor": _literal,
    "scalar_tensor": _literal,
}
"""By the operation; they are rules like those of ``rules.py``."""
