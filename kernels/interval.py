"""Interval arithmetic on conditions: what a mask can be over a block of queries and keys.

:func:`bounds` turns a condition over ``q`` and ``kv`` into two conditions over the block's corners
``q0 ≤ q ≤ q1`` and ``kv0 ≤ kv ≤ kv1``: one that implies that *every* element is allowed, one that is
implied by *some* element being allowed.  Both are conservative: a block is never taken for empty
or full when it is not.

What depends on ``q`` and ``kv`` by blocks only, such as ``keep[q // 128, kv // 128]``, has one value or a
few in each block of the map.  Those are looked at instead, and the answer is exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from flashfuse.kernels.expr import (
    COMPARISONS,
    FALSE,
    KV,
    ONE,
    TRUE,
    ZERO,
    Expr,
    Q,
    add,
    call,
    collected,
    compare,
    const,
    floordiv,
    is_integral,
    logical_and,
    logical_not,
    logical_or,
    maximum,
    minimum,
    mod,
    mul,
    sub,
    substitute,
    truth,
    var,
    variables,
    walk,
    where,
)
from flashfuse.kernels.printer import kind_of

Bound = tuple["Expr | None", "Expr | None"]
"""Least and greatest value; ``None`` is unbounded."""

_MONOTONE = ("exp", "tanh", "sigmoid")
_WIDEN = 2.0**-18
_NOT_ROUNDED = ("const", "var", "load", "min", "max", "where", "abs")

Blocks = tuple[int, int]
"""Sizes of a block of the map, in queries and in keys."""

BLOCKS: Blocks = (128, 128)
MOST_SAMPLES = 64
"""Elements of a block that are looked at for a condition."""


@dataclass(frozen=True)
class BlockBounds:
    """``full`` implies that a whole block is allowed, ``some`` is implied by any allowed element.

    Both are over ``b h q0 q1 kv0 kv1``, the lengths, integers, loads at those and, for the i-th of
    ``ranges``, the variables ``lo{i}`` and ``hi{i}``: its least and greatest value over the block.
    """

    full: Expr
    some: Expr
    ranges: tuple[Expr, ...]


def needs_elements(mask: Expr, blocks: Blocks = BLOCKS) -> bool:
    """True where a load depends on both q and kv, so that every element must be looked at.

    Not where it has few values in a block.
    """
    return any(
        _loads_both(node) and sample_count(node, blocks) > MOST_SAMPLES
        for node in walk(mask)
        if node.op == "load"
    )


@functools.lru_cache(maxsize=1 << 14)
def step(e: Expr, name: str) -> int:
    """A number n such that ``e`` depends on the variable ``name`` through ``name // n`` only; 0: not at all.

    The largest that is seen by form: ``(q + 64) // 128`` changes at 64, 192, …, so that its step is 64.
    """
    if e.op == "var":
        return int(e.args[0] == name)
    if e.op == "//" and is_integral(e) and e.args[1].is_const and e.args[1].value > 0:
        terms = collected(e.args[0])
        shift = terms.pop(None, 0)
        if terms == {var(name): 1}:
            return math.gcd(int(e.args[1].value), int(shift))
    return math.gcd(*(step(a, name) for a in e.operands))


def sample_count(e: Expr, blocks: Blocks) -> int:
    """How many elements of a block say what ``e`` is everywhere in it."""
    return math.prod(len(points) for points in _points(e, blocks))


def _points(e: Expr, blocks: Blocks) -> list[list[Expr]]:
    """Queries and keys of a block such that their pairs take every value that ``e`` has there."""
    found = []
    for name, block in zip(("q", "kv"), blocks, strict=True):
        first, last = var(f"{name}0"), var(f"{name}1")
        stride = math.gcd(step(e, name), block)
        found.append([first, *(minimum(add(first, const(i)), last) for i in range(stride, block, stride))])
    return found


def _loads_both(load: Expr) -> bool:
    return {"q", "kv"} <= variables(load)


def bounds(mask: Expr, kinds: Mapping[str, str], blocks: Blocks = BLOCKS) -> BlockBounds:
    """The two block conditions of ``mask``; ``kinds`` as for ``printer.kind_of``.

    Blocks start at multiples of their sizes.
    """
    return _bounds(mask, tuple(sorted(kinds.items())), blocks)


@functools.lru_cache(maxsize=1024)
def _bounds(mask: Expr, kinds: tuple[tuple[str, str], ...], blocks: Blocks) -> BlockBounds:
    visitor = _Bounds(dict(kinds), blocks)
    full, some = visitor.condition(truth(mask))
    return BlockBounds(full, some, tuple(visitor.ranges))


class _Bounds:
    def __init__(self, kinds: Mapping[str, str], blocks: Blocks) -> None:
        self.kinds, self.blocks = kinds, blocks
        self.ranges: dict[Expr, int] = {}
        self._conditions: dict[Expr, tuple[Expr, Expr]] = {}
        self._values: dict[Expr, Bound] = {}

    def condition(self, e: Expr) -> tuple[Expr, Expr]:
        """(certainly true, possibly true)."""
        if e not in self._conditions:
            seen = self.samples(e)
            found = (logical_and(*seen), logical_or(*seen)) if seen else self._condition(e)
            self._conditions[e] = found
        return self._conditions[e]

    def samples(self, e: Expr) -> list[Expr]:
        """``e`` at a few elements, which has no other value in the block; empty where they are too many."""
        if sample_count(e, self.blocks) > MOST_SAMPLES:
            return []
        if any(n.op not in _NOT_ROUNDED and kind_of(n, self.kinds) == "float" for n in walk(e)):
            # Each element may be rounded in another way.
            return []
        queries, keys = _points(e, self.blocks)
        return [substitute(e, {Q: q, KV: kv}.get) for q in queries for kv in keys]

    def _condition(self, e: Expr) -> tuple[Expr, Expr]:
        op, args = e.op, e.args
        if e.is_const:
            return truth(e), truth(e)
        if op in ("and", "or"):
            parts = [self.condition(a) for a in args]
            join = logical_and if op == "and" else logical_or
            return join(*(p[0] for p in parts)), join(*(p[1] for p in parts))
        if op == "not":
            certain, possible = self.condition(args[0])
            return logical_not(possible), logical_not(certain)
        if op == "where" and kind_of(e, self.kinds) == "bool":
            (c0, c1), (a0, a1), (b0, b1) = (self.condition(truth(a)) for a in args)
            certain = logical_or(logical_and(c0, a0), logical_and(logical_not(c1), b0), logical_and(a0, b0))
            return certain, logical_or(logical_and(c1, a1), logical_and(logical_not(c0), b1))
        if op in COMPARISONS:
            return self._compare(op, self.value(args[0]), self.value(args[1]))
        # A number in a boolean place: "is not zero".
        return self._compare("!=", self.value(e), (ZERO, ZERO))

    def _compare(self, op: str, a: Bound, b: Bound) -> tuple[Expr, Expr]:
        if op in (">", ">="):
            return self._compare({">": "<", ">=": "<="}[op], b, a)
        if op == "!=":
            certain, possible = self._compare("==", a, b)
            return logical_not(possible), logical_not(certain)
        if op == "==":
            overlap = logical_and(_known("<=", a[0], b[1], TRUE), _known("<=", b[0], a[1], TRUE))
            same = logical_and(_known("<=", a[1], b[0], FALSE), _known("<=", b[1], a[0], FALSE))
            return same, overlap
        return _known(op, a[1], b[0], FALSE), _known(op, a[0], b[1], TRUE)

    def value(self, e: Expr) -> Bound:
        if e not in self._values:
            bound = self._value(e)
            if e.op not in _NOT_ROUNDED and variables(e) & {"q", "kv"} and kind_of(e, self.kinds) == "float":
                # Cancellation: a sum is as inexact as its largest term.
                terms = [self.value(a) for a in e.operands] if e.op == "+" else [bound]
                bound = _widened(bound, terms)
            self._values[e] = bound
        return self._values[e]

    def _value(self, e: Expr) -> Bound:
        op, args = e.op, e.args
        names = variables(e)
        if op == "load" and _loads_both(e):
            # NaN has no place between a least and a greatest value.
            return _corners(self.samples(e)) if self.kinds[args[0]] != "float" else (None, None)
        if op == "load" and names & {"q", "kv"}:
            i = self.ranges.setdefault(e, len(self.ranges))
            return var(f"lo{i}"), var(f"hi{i}")
        if not names & {"q", "kv"}:
            return e, e
        if op == "var":
            return var(f"{args[0]}0"), var(f"{args[0]}1")
        if kind_of(e, self.kinds) == "bool":
            certain, possible = self.condition(e)
            return where(certain, ONE, ZERO), where(possible, ONE, ZERO)
        if op == "where":
            certain, possible = self.condition(truth(args[0]))
            a, b = self.value(args[1]), self.value(args[2])
            low = _both(lambda x, y: where(certain, x, where(possible, minimum(x, y), y)), a[0], b[0])
            return low, _both(lambda x, y: where(certain, x, where(possible, maximum(x, y), y)), a[1], b[1])
        operands = [self.value(a) for a in args]
        if op == "+":
            return _sum([o[0] for o in operands]), _sum([o[1] for o in operands])
        (low, high), *rest = operands
        if op == "min":
            return _both(minimum, low, rest[0][0]), _either(minimum, high, rest[0][1])
        if op == "max":
            return _either(maximum, low, rest[0][0]), _both(maximum, high, rest[0][1])
        if low is None or high is None or any(x is None for o in rest for x in o):
            return None, None
        if op in _MONOTONE:
            return call(op, low), call(op, high)
        if op == "abs":
            inside = where(
                compare(">=", low, ZERO), low, where(compare("<=", high, ZERO), mul(high, const(-1)), ZERO)
            )
            return inside, maximum(call("abs", low), call("abs", high))
        if op == "*":
            return _corners([mul(x, y) for x in (low, high) for y in rest[0]])  # type: ignore[arg-type]
        if op in ("//", "%") and rest[0][0] == rest[0][1] and kind_of(e, self.kinds) == "int":
            divisor = rest[0][0]
            assert divisor is not None
            first, last = floordiv(low, divisor), floordiv(high, divisor)
            if op == "//":
                return _corners([first, last])
            # Within one multiple of the divisor the remainder grows with the dividend.
            same = compare("==", first, last)
            least, greatest = minimum(ZERO, add(divisor, ONE)), maximum(ZERO, sub(divisor, ONE))
            return where(same, mod(low, divisor), least), where(same, mod(high, divisor), greatest)
        return None, None


def _known(op: str, a: Expr | None, b: Expr | None, otherwise: Expr) -> Expr:
    return otherwise if a is None or b is None else compare(op, a, b)


def _both(f, a: Expr | None, b: Expr | None) -> Expr | None:  # type: ignore[no-untyped-def]
    return None if a is None or b is None else f(a, b)


def _either(f, a: Expr | None, b: Expr | None) -> Expr | None:  # type: ignore[no-untyped-def]
    return f(a, b) if a is not None and b is not None else (b if a is None else a)


def _sum(parts: list[Expr | None]) -> Expr | None:
    known = [p for p in parts if p is not None]
    return add(*known) if len(known) == len(parts) else None


def _corners(values: list[Expr]) -> Bound:
    low = high = values[0]
    for v in values[1:]:
        low, high = minimum(low, v), maximum(high, v)
    return low, high


def _widened(bound: Bound, terms: list[Bound]) -> Bound:
    """Room for the rounding of float32, which may differ between this and the kernel's order."""
    low, high = bound
    if low is None or high is None:
        return None, None
    magnitude = add(*(maximum(call("abs", x), call("abs", y)) for x, y in terms))  # type: ignore[arg-type]
    slack = mul(magnitude, const(_WIDEN))
    return sub(low, slack), add(high, slack)
