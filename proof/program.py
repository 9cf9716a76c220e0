"""Score programs over field elements: the meaning of the text that the rewritten graph carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr
from flashfuse.proof.value import Draw, Value

_REAL: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "min": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "max": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
}
_OF_SCORES: dict[str, Callable[[Value, Value], Value]] = {
    "+": Value.__add__,
    "*": Value.__mul__,
    "/": Value.__truediv__,
    "min": Value.minimum,
    "max": Value.maximum,
}
_COMPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "<=": lambda sign: sign <= 0,
    "<": lambda sign: sign < 0,
    ">=": lambda sign: sign >= 0,
    ">": lambda sign: sign > 0,
    "==": lambda sign: sign == 0,
    "!=": lambda sign: sign != 0,
}


def evaluate(e: Expr, env: Mapping[str, Any], draw: Draw, dtype: torch.dtype) -> Any:
    """The value of ``e``: a :class:`Value` where scores or captured reals are in it, else real numbers.

    ``env`` gives ``s``, the index variables (int64, broadcasting), lengths, integers and captures.
    Levels are rounded to ``dtype``, in which the kernel computes scores.
    """
    memo: dict[Expr, Any] = {}

    def visit(node: Expr) -> Any:
        if node not in memo:
            found = compute(node)
            memo[node] = found.rounded(dtype) if isinstance(found, Value) else found
        return memo[node]

    def compute(node: Expr) -> Any:
        if node.op == "const":
            return node.value
        if node.op == "var":
            return env[node.args[0]]
        values = [visit(a) for a in node.operands]
        if node.op == "load":
            return _load(env[node.args[0]], values)
        if node.op in ("and", "or", "not"):
            return _logical(node.op, [truth(v) for v in values])
        if node.op == "where":
            condition, a, b = truth(values[0]), values[1], values[2]
            if isinstance(a, Value) or isinstance(b, Value):
                return draw.value(a).where(condition, draw.value(b))
            return torch.where(condition, torch.as_tensor(a), torch.as_tensor(b))
        if not any(isinstance(v, Value) for v in values):
            return _of_reals(node.op, [v.long() if _is_bool(v) else v for v in values])
        values = [draw.value(v) for v in values]
        if node.op in E.COMPARISONS:
            return _COMPARED[node.op]((values[0] - values[1]).sign())
        if node.op in E.UNARY:
            return _function(node.op, values[0])
        total = values[0]
        for v in values[1:]:
            total = _OF_SCORES[node.op](total, v)
        return total

    return visit(e)


def truth(v: Any) -> Tensor:
    """A condition: not zero."""
    if isinstance(v, Value):
        return v.p != 0
    return torch.as_tensor(v) != 0


def _is_bool(v: Any) -> bool:
    return isinstance(v, Tensor) and v.dtype == torch.bool


def _load(source: Value | Tensor, indices: list[Any]) -> Any:
    at = tuple(torch.as_tensor(i) for i in indices)
    return source.map(lambda t: t[at]) if isinstance(source, Value) else source[at]


def _logical(op: str, conditions: list[Tensor]) -> Tensor:
    if op == "not":
        return ~conditions[0]
    result = conditions[0]
    for c in conditions[1:]:
        result = result & c if op == "and" else result | c
    return result


def _of_reals(op: str, values: list[Any]) -> Any:
    if op in E.COMPARISONS:
        return E.COMPARISONS[op](values[0], values[1])
    if op in E.UNARY:
        x = torch.as_tensor(values[0])
        # A distance stays an index.
        return getattr(torch, op)(x if op == "abs" else x.double())
    total = values[0]
    for v in values[1:]:
        total = _REAL[op](total, v)
    return total


def _function(op: str, x: Value) -> Value:
    if op == "exp":
        return x.exp()
    if op == "log":
        return x.log()
    if op == "abs":
        return x * x.draw.value(x.sign())
    return x.draw.apply(op, x)
