"""The softmax in any spelling, and the weights that come from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import const
from flashfuse.passes import dialect, nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import NotLiftable, source_index
from flashfuse.passes.lift import Lift, Scope
from flashfuse.passes.nodes import same, shape


@dataclass(frozen=True)
class Softmax:
    """What is normalised, and along which dimension.

    ``sink``: the logit of a term that is added to the sum: a number or a tensor that has one element
    for each row.

    ``shifted``: the exponential is taken of differences to the largest score, so that a row of equal
    finite minima has equal weights.  ``exp(x) / sum(exp(x))`` gives NaN there, ``exp(x - logsumexp(x))``
    weights of 1.
    """

    output: fx.Node
    input: fx.Node
    dim: int
    parts: tuple[fx.Node, ...]
    zero_dead_rows: bool = False
    shifted: bool = True
    sink: fx.Node | float | None = None


def read_softmax(node: fx.Node) -> Softmax | None:
    """The softmax whose result is ``node``."""
    op = dialect.read(node)
    if op is None:
        return None
    if op.name in ("softmax", "safe_softmax"):
        dim = op.args.get("dim")
        example = nodes.tensor(op.input)
        if example is None or not isinstance(dim, int) or not example.ndim:
            return None
        dim %= example.ndim
        if op.name == "safe_softmax":
            # Its rows of −inf are 0; with their maximum subtracted they are NaN.
            return Softmax(node, op.input, dim, (node,), zero_dead_rows=True)
        x, shifting = _without_shift(op.input, dim)
        return Softmax(node, x, dim, (node, *shifting))
    if op.name == "where":
        return _with_zero_dead_rows(node, op)
    if op.name == "exp":
        return _exponential_of_log(node, op)
    return _decomposed(node, op)


def _with_zero_dead_rows(node: fx.Node, op: Op) -> Softmax | None:
    """``where(all(x == -inf), 0, softmax(x))``: what the inference dialect makes of ``_safe_softmax``."""
    weights = op.args.get("other")
    plain = read_softmax(weights) if isinstance(weights, fx.Node) else None
    if plain is None or plain.zero_dead_rows or not is_zero(op.args.get("input")):
        return None
    parts: list[fx.Node] = []
    condition, dead = op.args.get("condition"), True
    while isinstance(condition, fx.Node):
        step = dialect.read(condition)
        parts.append(condition)
        if step is None:
            return None
        if step.name == "not":
            dead = not dead
        elif step.name == ("all" if dead else "any"):
            rows = single_dim(step, len(shape(plain.input)))
            if rows != plain.dim or not step.get("keepdim", False):
                return None
        elif step.name == ("eq" if dead else "ne"):
            if step.input is not plain.input or step.args["other"] != -math.inf:
                return None
            zeros = [n for n in (op.args["input"],) if isinstance(n, fx.Node)]
            return Softmax(node, plain.input, plain.dim, (node, *plain.parts, *parts, *zeros), True)
        else:
            return None
        condition = step.input
    return None


def is_zero(x: Any) -> bool:
    if not isinstance(x, fx.Node):
        return x == 0
    if nodes.tensor(x) is None:
        return False
    # What does not depend on where it is asked is the same everywhere.
    e = Lift(Scope(), {}).element(x, tuple(E.var(f"o{d}") for d in range(len(shape(x)))))
    return e.is_const and e.value == 0


def _exponential_of_log(node: fx.Node, op: Op) -> Softmax | None:
    """``exp(log_softmax(x))`` and ``exp(x - logsumexp(x))``."""
    logs = dialect.read(op.input) if isinstance(op.input, fx.Node) else None
    if logs is None or not isinstance(logs.input, fx.Node) or nodes.tensor(logs.input) is None:
        return None
    x = logs.input
    if logs.name == "log_softmax" and isinstance(logs.args.get("dim"), int):
        dim = logs.args["dim"] % len(shape(x))
        x, shifting = _without_shift(x, dim)
        return Softmax(node, x, dim, (node, op.input, *shifting))
    if logs.name == "sub" and logs.get("alpha", 1) == 1:
        total = _row_reduction(logs.args["other"], ("logsumexp",), x)
        if total is not None:
            return Softmax(node, x, total[0], (node, op.input, *total[1]), shifted=False)
    return None


def _decomposed(node: fx.Node, op: Op) -> Softmax | None:
    """``exp(x - max(x)) / sum(exp(x - max(x)))``, with or without the maximum."""
    if op.name != "div" or op.args.get("rounding_mode") is not None:
        return None
    numerator = op.args["input"]
    exponential = dialect.read(numerator) if isinstance(numerator, fx.Node) else None
    if exponential is None or exponential.name != "exp" or not isinstance(exponential.input, fx.Node):
        return None
    total = _row_reduction(op.args["other"], ("sum",), numerator)
    if total is None:
        return _with_a_term(node, op.args["other"], numerator, exponential.input)
    dim, summing = total
    parts = (node, *summing, numerator)
    # Below the maximum of all rows, those of one row can all vanish.
    x, shifting = _without_shift(exponential.input, dim, by_row=True)
    return Softmax(node, x, dim, (*parts, *shifting), shifted=bool(shifting))


def _without_shift(x: fx.Node, dim: int, by_row: bool = False) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What is normalised before its maximum was subtracted, and the nodes that do so.

    A softmax does not change, nor do its gradients, where something constant along ``dim`` is subtracted.
    Only a maximum over ``dim``, or over more, is known to leave −∞ and finite minima what they are.
    """
    passed: list[fx.Node] = []
    casts: list[fx.Node] = []
    node = x
    while True:
        op = dialect.read(node)
        if op is None or op.mutates or not isinstance(op.args.get("input"), fx.Node):
            return x, tuple(passed)
        above = op.input
        if op.name == "sub" and op.get("alpha", 1) == 1 and nodes.tensor(above) is not None:
            peak = _reduction(op.args["other"], ("amax", "max"), above)
            if peak is None or dim not in peak[0] or shape(above) != shape(node):
                return x, tuple(passed)
            # Minus the maximum of another row, the finite minimum of float16 is −∞.
            if len(peak[0]) > 1 and (by_row or nodes.value(node).dtype == torch.float16):
                return x, tuple(passed)
            passed += [*casts, node, *peak[1]]
            x, casts = above, []
        elif op.name in dialect.CASTS and nodes.value(node).dtype.is_floating_point:
            casts.append(node)
        else:
            return x, tuple(passed)
        node = above


def _with_a_term(node: fx.Node, total: Any, numerator: fx.Node, x: fx.Node) -> Softmax | None:
    """``exp(x) / (sum(exp(x)) + exp(sink))``, where ``exp(sink)`` may be a number."""
    add = dialect.read(total) if isinstance(total, fx.Node) else None
    if add is None or add.name != "add" or add.mutates or add.get("alpha", 1) != 1:
        return None
    for summed, term in ((add.input, add.args["other"]), (add.args["other"], add.input)):
        found = _row_reduction(summed, ("sum",), numerator)
        if found is None:
            continue
        dim, summing = found
        value = nodes.constant(term)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not 0 < value < math.inf:
                return None
            parts = (node, total, *summing, numerator)
            return Softmax(node, x, dim, parts, shifted=False, sink=math.log(value))
        exponential = dialect.read(term) if isinstance(term, fx.Node) else None
        if exponential is None or exponential.name != "exp" or nodes.tensor(term) is None:
            return None
        sizes, rank = shape(term), len(shape(x))
        at = dim - rank + len(sizes)
        if exponential.mutates or (at >= 0 and not same(sizes[at], 1)) or len(sizes) > rank:
            return None
        parts = (node, total, *summing, numerator, term)
        return Softmax(node, x, dim, parts, shifted=False, sink=exponential.input)
    return None


def _row_reduction(node: Any, names: tuple[str, ...], x: Any) -> tuple[int, tuple[fx.Node, ...]] | None:
    """The dimension and the nodes, where ``node`` is a reduction of ``x`` broadcast back over its rows."""
    found = _reduction(node, names, x)
    return (found[0][0], found[1]) if found is not None and len(found[0]) == 1 else None


def _reduction(
    node: Any, names: tuple[str, ...], x: Any
) -> tuple[tuple[int, ...], tuple[fx.Node, ...]] | None:
    """The dimensions and the nodes, where ``node`` is a reduction of ``x`` that each element of x meets."""
    if not isinstance(node, fx.Node) or not isinstance(x, fx.Node) or nodes.tensor(x) is None:
        return None
    if nodes.tensor(node) is None or len(shape(node)) > len(shape(x)):
        return None
    sizes = shape(x)
    lift = Lift(Scope(), {f"o{i}": n for i, n in enumerate(sizes)})
    marks = [E.var(f"o{i}") for i in range(len(sizes))]
    aligned = marks[len(marks) - len(shape(node)) :]
    index = tuple(const(0) if same(n, 1) else m for n, m in zip(shape(node), aligned, strict=True))
    through: list[fx.Node] = []
    while isinstance(node, fx.Node):
        op = dialect.read(node)
        if op is None or op.mutates:
            return None
        through.append(node)
        if op.name in names:
            dims = _dims(op, len(sizes))
            if op.input is not x or dims is None:
                return None
            wanted = [const(0) if d in dims or same(n, 1) else marks[d] for d, n in enumerate(sizes)]
            left = range(len(sizes)) if op.get("keepdim", False) else sorted({*range(len(sizes))} - {*dims})
            return (dims, tuple(through)) if index == tuple(wanted[d] for d in left) else None
        if op.name == "getitem" and op.args["index"] == 0 and nodes.tensor(op.input) is None:
            node = op.input
        elif op.name == "detach" and "sum" not in names and "logsumexp" not in names:
            # The gradient through the maximum cancels; the one through the sum does not.
            node = op.input
        else:
            try:
                moved = source_index(lift, node, op, index)
            except NotLiftable:
                return None
            if moved is None:
                return None
            node, index = op.input, moved
    return None


def single_dim(op: Op, rank: int) -> int | None:
    """The one dimension that a reduction runs over, ``None`` where it does not name one."""
    dims = _dims(op, rank)
    return dims[0] if dims is not None and len(dims) == 1 and op.args.get("dim") is not None else None


def _dims(op: Op, rank: int) -> tuple[int, ...] | None:
    """The dimensions that a reduction runs over: all where none are named."""
    dims = op.args.get("dim")
    if dims is None or dims in ((), []):
        return tuple(range(rank))
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if any(not isinstance(d, int) or isinstance(d, bool) for d in dims):
        return None
    return tuple(d % rank for d in dims)
