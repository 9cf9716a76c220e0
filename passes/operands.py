"""The tensors behind q, k and v: the earliest of which a site's operand is a plain view."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, B, Expr, H, Q, const
from flashfuse.passes import dialect, nodes
from flashfuse.passes.contraction import SUMMED
from flashfuse.passes.indices import Index, NotLiftable, source_index
from flashfuse.passes.nodes import Size, same, shape
from flashfuse.passes.rules import piece

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph and the index at which the site reads it, over ``b h q|kv d``."""

    node: fx.Node
    index: Index


@dataclass(frozen=True)
class Digit:
    """``variable // divisor % modulus``: one of the dimensions that an index variable is spread over."""

    variable: Expr
    divisor: int = 1
    modulus: int | None = None


def digit(e: Expr) -> Digit | None:
    """``e`` as a digit of an index variable, or ``None``."""
    modulus = None
    if e.op == "%" and e.args[1].is_const:
        e, modulus = e.args[0], int(e.args[1].value)
    divisor = 1
    if e.op == "//" and e.args[1].is_const:
        e, divisor = e.args[0], int(e.args[1].value)
    return Digit(e, divisor, modulus) if e.op == "var" else None


def folded_heads_of(e: Expr) -> int | None:
    """``heads`` where ``e`` is ``b·heads + h``."""
    for part in e.operands if e.op == "+" else ():
        if part.op == "*" and part.args[0] == B and part.args[1].is_const and e == E.add(part, H):
            return int(part.args[1].value)
    return None


def is_view(operand: Operand, lift: Lift) -> bool:
    """Whether the operand is all of its tensor, in another order and with heads shared.

    Each dimension has size 1, or is ``b·heads + h``, or is a digit of a variable, and the digits of
    a variable make up all of it; only heads may lack low digits (``h // group``).
    """
    digits: dict[Expr, list[tuple[Digit, Size]]] = {}
    for e, n in zip(operand.index, shape(operand.node), strict=True):
        if e == const(0):
            if not same(n, 1):
                return False
        elif folded_heads_of(e) is not None:
            if {B, H} & digits.keys() or not same(n, lift.bounds["b"] * lift.bounds["h"]):
                return False
            digits |= {B: [], H: []}
        else:
            found = digit(e)
            if found is None or digits.get(found.variable) == []:
                return False
            digits.setdefault(found.variable, []).append((found, n))
    return all(_complete(variable, found, lift) for variable, found in digits.items() if found)


def _complete(variable: Expr, digits: list[tuple[Digit, Size]], lift: Lift) -> bool:
    ordered = sorted(digits, key=lambda d: -d[0].divisor)
    lowest = ordered[-1][0].divisor
    if (len(digits) > 1 and variable not in (B, H)) or (lowest != 1 and variable != H):
        return False
    radix: Size = lowest
    for found, n in reversed(ordered):
        if found.divisor != radix:
            return False
        radix = radix * n
        if found.modulus is not None and not same(found.modulus, n):
            return False
    return same(radix, lift.bounds[variable.args[0]])


def copies(operand: Operand) -> int:
    """How many runs of digits have strides that do not merge into one dimension."""
    example = nodes.tensor(operand.node)
    assert example is not None
    runs: dict[Expr, list[tuple[int, Size, int]]] = {}
    for e, n, stride in zip(operand.index, shape(operand.node), example.stride(), strict=True):
        found = digit(e)
        if found is not None:
            runs.setdefault(found.variable, []).append((found.divisor, n, stride))
    count = 0
    for run in runs.values():
        run.sort(key=lambda r: -r[0])
        count += sum(1 for high, low in itertools.pairwise(run) if not same(high[2], low[2] * low[1]))
    return count


def source(operand: Operand, length: Size, lift: Lift) -> Operand | None:
    """The earliest tensor of which ``operand`` is a plain view; ``None`` where it is not one itself.

    Args:
        length: of the index ``d``: the head dimension for q and k, that of the output for v.
    """
    lift.bounds["d"] = length
    # Batch and heads may be broadcast inside the kernels, rows and columns may not.
    own = [e for e in (Q, KV, SUMMED) if _runs_over(operand.index, e) and not same(lift.bounds[e.args[0]], 1)]
    best = operand if is_view(operand, lift) else None
    node, index = operand.node, operand.index
    while True:
        lift.indices.update(index)
        parent = _above(Operand(node, index), lift)
        if parent is None:
            break
        node, index = parent.node, parent.index
        if not all(_runs_over(index, e) for e in own):
            break
        if is_view(Operand(node, index), lift):
            best = Operand(node, index)
    return best


def origin(operand: Operand, lift: Lift) -> Operand:
    """The earliest tensor whose elements ``operand`` reads, not all of them nor as a view perhaps.

    Two operands of one origin are the same function of the indices.
    """
    while True:
        parent = _above(operand, lift)
        if parent is None:
            return operand
        operand = parent


def _above(operand: Operand, lift: Lift) -> Operand | None:
    """The same elements in the tensor that ``operand.node`` takes them from; ``None`` where it made them."""
    node, index = operand.node, operand.index
    op = None if node in lift.opaque else dialect.read(node)
    if op is None or op.mutates or op.name == "detach":
        return None
    parent = op.args.get("input")
    try:
        if op.name == "cat":
            tensors = [t for t in op.args["tensors"] if len(shape(t)) != 1]
            moved = index if len(tensors) == 1 else None
            parent = tensors[0] if tensors else None
        elif isinstance(parent, fx.Node) and isinstance(nodes.value(parent), (tuple, list)):
            if op.name != "getitem" or parent in lift.opaque:
                return None
            parent, moved = piece(lift, parent, op.args["index"], index)
        else:
            moved = source_index(lift, node, op, index)
    except NotLiftable:
        return None
    if moved is None or not isinstance(parent, fx.Node):
        return None
    return Operand(parent, tuple(lift.simplify(e) for e in moved))


def _runs_over(index: Index, variable: Expr) -> bool:
    return any(E.contains(e, variable) for e in index)
