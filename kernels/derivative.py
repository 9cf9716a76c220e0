"""Symbolic differentiation of score expressions: expression in, simplified expression out."""

from __future__ import annotations

import functools
from collections.abc import Callable

from flashfuse.kernels.expr import (
    COMPARISONS,
    ONE,
    ZERO,
    Expr,
    add,
    compare,
    const,
    contains,
    div,
    floordiv,
    logical_and,
    mul,
    neg,
    sub,
    where,
)

_OF_UNARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    # f'(x) from (x, f(x))
    "exp": lambda x, f: f,
    "log": lambda x, f: div(ONE, x),
    "tanh": lambda x, f: sub(ONE, mul(f, f)),
    "sqrt": lambda x, f: div(const(0.5), f),
    "abs": lambda x, f: where(compare(">", x, ZERO), ONE, where(compare("<", x, ZERO), const(-1), ZERO)),
    "sigmoid": lambda x, f: mul(f, sub(ONE, f)),
}


@functools.lru_cache(maxsize=1024)
def derivative(e: Expr, leaf: Expr) -> Expr:
    """``d e / d leaf``, where ``leaf`` is a variable or a load taken as one variable.

    Indices, conditions and the quotient of ``//`` count as constant.  At a tie of ``min`` or
    ``max`` each side receives half, as in PyTorch.
    """
    memo: dict[Expr, Expr] = {}

    def d(node: Expr) -> Expr:
        if node not in memo:
            memo[node] = rule(node) if contains(node, leaf) else ZERO
        return memo[node]

    def times(factor: Expr, inner: Expr) -> Expr:
        # A zero derivative stays zero whatever it is multiplied by: the term is absent.
        return ZERO if inner == ZERO else mul(factor, inner)

    def rule(node: Expr) -> Expr:
        op, args = node.op, node.args
        if node == leaf:
            return ONE
        if op == "load" or op in COMPARISONS or op in ("and", "or", "not", "//"):
            return ZERO
        if op == "+":
            return add(*(d(a) for a in args))
        if op == "where":
            return where(args[0], d(args[1]), d(args[2]))
        if op in _OF_UNARY:
            return times(_OF_UNARY[op](args[0], node), d(args[0]))
        a, b = args
        da, db = d(a), d(b)
        if op == "*":
            return add(times(b, da), times(a, db))
        if op == "/":
            return add(ZERO if da == ZERO else div(da, b), neg(times(div(node, b), db)))
        if op == "%":
            return add(da, neg(times(floordiv(a, b), db)))
        if op in ("min", "max"):
            first = compare("<" if op == "min" else ">", a, b)
            tie = logical_and(compare("<=", a, b), compare(">=", a, b))
            return where(first, da, where(tie, mul(add(da, db), const(0.5)), db))
        raise AssertionError(f"no derivative rule for {op}")

    return d(e)
