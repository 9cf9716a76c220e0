"""The dimensions of a table: which sums of positions its elements depend on.

A generator is a sum of digits of q and kv with factors of 1 and −1, such as ``kv - q`` or, of a grid of
patches, ``kv // 14 - q // 14``.  A table has one dimension for each generator that the positions in an
expression are made of, and one each for ``b`` and ``h`` where these matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import B, Expr, H, const
from flashfuse.passes import nodes
from flashfuse.passes.indices import Index
from flashfuse.passes.nodes import Size, same
from flashfuse.passes.operands import digit

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift

JOINT = {"q", "kv"}


class NotCondensable(Exception):
    """Inside the search: the tensor stays as the graph builds it."""


Generator = tuple[tuple[Expr, int], ...]
"""A sum of digits of q and kv, each with the factor 1 or −1; the first factor is 1."""


def _is_digit(atom: Expr) -> bool:
    found = digit(atom)
    return found is not None and found.variable.args[0] in JOINT


def grouped(e: Expr) -> tuple[dict[Generator, int], list[tuple[Expr, int]]]:
    """An integral sum as multiples of generators, and the other terms."""
    by_size: dict[int, list[tuple[Expr, int]]] = {}
    rest: list[tuple[Expr, int]] = []
    for atom, c in E.collected(e).items():
        if atom is not None and _is_digit(atom):
            by_size.setdefault(abs(int(c)), []).append((atom, 1 if c > 0 else -1))
        else:
            rest.append((const(1) if atom is None else atom, int(c)))
    groups: dict[Generator, int] = {}
    for size, found in by_size.items():
        found.sort(key=lambda part: str(part[0]))
        sign = found[0][1]
        groups[tuple((atom, s * sign) for atom, s in found)] = size * sign
    return groups, rest


def is_sum(e: Expr) -> bool:
    return E.is_integral(e) and not E.is_bool(e) and (e.op in ("+", "var") or _is_digit(e) or _is_multiple(e))


def _is_multiple(e: Expr) -> bool:
    return e.op == "*" and e.args[1].is_const


def compares_sums(e: Expr) -> bool:
    return e.op in E.COMPARISONS and all(E.is_integral(a) and not E.is_bool(a) for a in e.operands)


@dataclass
class Axes:
    """The dimensions of a table: ``b`` and ``h`` where they matter, then one for each generator.

    Attributes:
        starts: least value of each generator.
    """

    plain: tuple[Expr, ...]
    generators: tuple[Generator, ...]
    starts: tuple[Size, ...]
    sizes: tuple[Size, ...]
    lift: Lift

    @classmethod
    def of(cls, expressions: Sequence[Expr], lift: Lift) -> Axes:
        found: dict[Generator, None] = {}
        used: set[str] = set()
        for e in expressions:
            used |= E.variables(e)
            _collect(e, found)
        known = {*JOINT, "b", "h", *E.LENGTHS, *lift.scope.ints}
        if not used <= known:
            raise NotCondensable("an index of something else")
        digits = [atom for g in found for atom, _ in g]
        # Every combination of values must occur, or the table would hold elements that nobody computed.
        if not found or len(set(digits)) != len(digits) or not _independent(digits, lift):
            raise NotCondensable("positions that depend on each other")
        plain = tuple(v for v in (B, H) if v.args[0] in used and not same(lift.bounds[v.args[0]], 1))
        ranges = [_range(g, lift) for g in found]
        sizes = tuple(high - low + 1 for low, high in ranges)
        total, every = nodes.product(sizes), lift.bounds["q"] * lift.bounds["kv"]
        if isinstance(total, int) and isinstance(every, int):
            smaller = total < every
        else:
            smaller = len(sizes) == 1 and len(digits) == 2
        if not smaller:
            raise NotCondensable("as many elements as queries times keys")
        lengths = tuple(lift.bounds[v.args[0]] for v in plain)
        return cls(plain, tuple(found), tuple(low for low, _ in ranges), (*lengths, *sizes), lift)

    def index(self) -> Index:
        """Where the table holds the element at ``b h q kv``."""
        places = [
            E.sub(E.add(*(E.mul(atom, const(s)) for atom, s in g)), self.lift.size(start))
            for g, start in zip(self.generators, self.starts, strict=True)
        ]
        return (*self.plain, *places)

    def axis(self, generator: Generator) -> int:
        return len(self.plain) + self.generators.index(generator)


def _collect(e: Expr, found: dict[Generator, None]) -> None:
    if not E.variables(e) & JOINT:
        return
    if compares_sums(e):
        e = E.sub(*e.operands)
    if is_sum(e):
        groups, rest = grouped(e)
        found.update(dict.fromkeys(groups))
        for atom, _ in rest:
            _collect(atom, found)
        return
    for operand in e.operands:
        _collect(operand, found)


def _independent(digits: Sequence[Expr], lift: Lift) -> bool:
    """Whether the digits take all combinations of their values."""
    for name in JOINT:
        own = [d for d in map(digit, digits) if d is not None and d.variable.args[0] == name]
        bound = lift.bounds[name]
        if len(own) < 2 and all(d.divisor == 1 and d.modulus is None for d in own):
            continue
        radix: Any = 1
        for d in sorted(own, key=lambda d: d.divisor):
            last = d.modulus is None
            if d.divisor != radix or not isinstance(bound, int) or bound % d.divisor:
                return False
            radix = bound if last else radix * (d.modulus or 1)
        if bound % radix:
            return False
    return True


def _range(generator: Generator, lift: Lift) -> tuple[Size, Size]:
    low: Size = 0
    high: Size = 0
    for atom, sign in generator:
        last: Size | None = lift.bounds[atom.args[0]] - 1 if atom.op == "var" else lift.interval(atom)[1]
        if last is None:
            raise NotCondensable("a digit of unknown range")
        low, high = (low, high + last) if sign > 0 else (low - last, high)
    return low, high
