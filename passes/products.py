"""The products of query rows and key rows behind a score, and how several are read as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, B, Expr, H, Q, S
from flashfuse.passes.contraction import Product
from flashfuse.passes.indices import Index
from flashfuse.passes.lift import Lift
from flashfuse.passes.nodes import Size, same
from flashfuse.passes.operands import Operand, origin

MAX_HEAD_DIM = 256
"""The longest rows that the Triton kernels take."""


@dataclass(frozen=True)
class Rows:
    """One product ``Σ_d q[b, h, q, d] · k[b, h, kv, d]``."""

    q: Operand
    k: Operand
    length: Size


@dataclass(frozen=True)
class Reading:
    """A score over ``s``, the sum of ``products``, as ``lift`` read it."""

    lift: Lift
    score: Expr
    products: tuple[Rows, ...]


def readings(lift: Lift, scores: fx.Node, index: Index) -> Iterator[Reading]:
    """``scores[index]`` over its products, the preferred reading first.

    .. math::
        \\sum_n q_n \\cdot k_n = [q_0 | q_1 | …] \\cdot [k_0 | k_1 | …]

    Where several products are only added up, with the same factors, they are one product of rows laid side
    by side.  Otherwise the first is the score and the others are tensors that the graph makes.
    """
    several = _Reader(lift.copy(), several=True)
    score = several.lift.element(scores, index)
    if len(several.products) > 1 and _worth_joining(several.products):
        joined = _joined(several.plain(score), several.leaves)
        if joined is not None:
            visited = {n: several.joined(e) for n, e in several.lift.visited.items()}
            several.lift.visited = visited
            yield Reading(several.lift, joined, tuple(several.products))
    one = several
    if len(several.products) > 1:
        one = _Reader(lift, several=False)
        score = lift.element(scores, index)
    yield Reading(one.lift, score, tuple(one.products))


def _worth_joining(products: list[Rows]) -> bool:
    """Not where the kernels take the single rows and refuse the joined ones."""
    lengths = [p.length for p in products if isinstance(p.length, int)]
    total = sum(lengths)
    fits = total <= MAX_HEAD_DIM or lengths[0] > MAX_HEAD_DIM
    return len(lengths) == len(products) and fits and (total % 8 == 0 or lengths[0] % 8 != 0)


@dataclass
class _Reader:
    """Gives the first product the name ``s``; where there may be ``several``, the others ``s·leaf``.

    In that form each is seen to depend on the scores while it is lifted.
    """

    lift: Lift
    several: bool
    products: list[Rows] = field(default_factory=list)
    leaves: list[Expr] = field(default_factory=list)
    _known: dict[tuple[Operand, Operand], Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lift.at_product = self.at_product

    def at_product(self, product: Product) -> Expr | None:
        a, b = Operand(product.a, product.a_index), Operand(product.b, product.b_index)
        if reads(a, KV) or reads(b, Q):
            a, b = b, a
        one_row, one_key = (same(self.lift.bounds[name], 1) for name in ("q", "kv"))
        if not (reads(a, Q) or one_row) or not (reads(b, KV) or one_key) or reads(a, KV) or reads(b, Q):
            return None
        # Products of pieces of q or k, put together again, are one product.
        whole = (origin(a, self.lift), origin(b, self.lift))
        if whole not in self._known:
            if self.products and not self.several:
                return None
            name = S
            if self.products:
                self.leaves.append(E.load(f"product {len(self.products)}", (B, H, Q, KV)))
                name = E.mul(S, self.leaves[-1])
            self._known[whole] = name
            self.products.append(Rows(a, b, product.length))
        return self._known[whole]

    def plain(self, e: Expr) -> Expr:
        """``e`` with each product a leaf of its own."""
        names = {E.mul(S, leaf): leaf for leaf in self.leaves}
        return E.substitute(e, names.get)

    def joined(self, e: Expr) -> Expr:
        """``e`` with every product called ``s``."""
        names = {E.mul(S, leaf): S for leaf in self.leaves}
        return E.substitute(e, names.get)


def reads(operand: Operand, variable: Expr) -> bool:
    return any(E.contains(e, variable) for e in operand.index)


def _joined(e: Expr, leaves: list[Expr]) -> Expr | None:
    """``e`` with each sum ``f·s + f·leaf + …`` over all leaves as ``f·s``; ``None`` where a leaf remains."""
    result = _sums(e, [S, *leaves])
    return None if any(E.contains(result, leaf) for leaf in leaves) else result


def _sums(e: Expr, leaves: list[Expr]) -> Expr:
    if e in leaves or not any(E.contains(e, leaf) for leaf in leaves[1:]):
        return e
    if e.op != "+":
        return E.build(e.op, tuple(_sums(a, leaves) if isinstance(a, Expr) else a for a in e.args))
    terms = [t if t in leaves else _sums(t, leaves) for t in _terms(e)]
    factors: dict[Expr, list[Expr]] = {}
    for term in terms:
        inside = [leaf for leaf in leaves if E.contains(term, leaf)]
        if len(inside) == 1 and _is_multiple(term, inside[0]):
            factors.setdefault(_with(term, inside[0], S), []).append(inside[0])
    complete = {f for f, inside in factors.items() if sorted(map(str, inside)) == sorted(map(str, leaves))}
    kept: list[Expr] = []
    for term in terms:
        form = next((_with(term, leaf, S) for leaf in leaves if E.contains(term, leaf)), term)
        if form not in complete:
            kept.append(term)
        elif form not in kept:
            kept.append(form)
    return E.add(*kept)


def _with(e: Expr, old: Expr, new: Expr) -> Expr:
    return e if old == new else E.substitute(e, {old: new}.get)


def _terms(e: Expr) -> Iterator[Expr]:
    for operand in e.operands:
        if operand.op == "+":
            yield from _terms(operand)
        else:
            yield operand


def _is_multiple(e: Expr, leaf: Expr) -> bool:
    """Whether ``e`` is ``leaf`` times something without it."""
    if e == leaf:
        return True
    if e.op not in ("*", "/"):
        return False
    a, b = e.args
    if E.contains(b, leaf):
        return e.op == "*" and not E.contains(a, leaf) and _is_multiple(b, leaf)
    return _is_multiple(a, leaf)
