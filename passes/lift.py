"""A tensor of the graph, read as a scalar expression over its indices.

:meth:`Lift.element` answers "what is ``node[i, j, …]``?" by pulling the indices up through the graph.
Index-only operations rewrite the indices, elementwise operations combine expressions, formulas such
as ``arange`` and ``tril`` become closed forms.  Where nothing more is known the answer is a load
from the tensor itself, so the lift never fails; it only stops early.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, get_args

import sympy
import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.kernels.spec import DeadRows
from flashfuse.passes import dialect, nodes
from flashfuse.passes.condense import Condensed, Element, condense
from flashfuse.passes.contraction import Product
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index, NotLiftable
from flashfuse.passes.nodes import Size, same, shape, size_of
from flashfuse.passes.rules import RULES, Row
from flashfuse.passes.tables import Capture, Table

MAX_PROGRAM_NODES = 400
"""A score larger than this is better computed by the graph itself."""

_THROUGH = (
    dialect.VIEWS | dialect.CASTS | {"contiguous", "clone", "getitem", "index", "repeat", "repeat_interleave"}
)


@dataclass
class Scope:
    """Names of one site: captured tensors and integers, and what symbolic sizes are called."""

    captures: dict[str, Capture] = field(default_factory=dict)
    ints: dict[str, Any] = field(default_factory=dict)
    sizes: dict[Any, Expr] = field(default_factory=dict)
    """Symbolic sizes that have a name of their own, such as ``Skv``."""


@dataclass
class Lift:
    """Lifts tensors of one graph.

    Attributes:
        bounds: exclusive upper bound of each index variable (all start at 0).
        at_product: called for a product of two tensors; returns its expression or ``None``.
        opaque: nodes that must not be looked through.
        condenses: whether what would be loaded at q and kv is made a table where it can be.
        visited: every node whose meaning was used, in order of first use.
        condensed: what searches for tables came to; the lifts of one graph share it.
    """

    scope: Scope
    bounds: dict[str, Size]
    at_product: Callable[[Product], Expr | None] = lambda product: None
    opaque: frozenset[fx.Node] = frozenset()
    condenses: bool = True
    visited: dict[fx.Node, Expr] = field(default_factory=dict)
    leaves: dict[fx.Node, None] = field(default_factory=dict)
    stops: dict[fx.Node, str] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    """By the name of the load: reductions over the scores that were met."""
    indices: set[Expr] = field(default_factory=set)
    """Every index met on the way."""
    condensed: dict[Hashable, Condensed] = field(default_factory=dict)
    _memo: dict[tuple[fx.Node, Index], Expr] = field(default_factory=dict)

    def copy(self) -> Lift:
        """A lift that knows as much, and tells this one nothing."""
        scope = Scope(dict(self.scope.captures), dict(self.scope.ints), dict(self.scope.sizes))
        return Lift(
            scope, dict(self.bounds), self.at_product, self.opaque, self.condenses, dict(self.visited),
            dict(self.leaves), dict(self.stops), dict(self.rows), set(self.indices),
            self.condensed,
        )  # fmt: skip

    # --- entry --------------------------------------------------------------------------------

    def element(self, node: fx.Node, index: Index) -> Expr:
        """The expression of ``node[index]``."""
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._element(node, index)
            self.visited.setdefault(node, self._memo[key])
        return self._memo[key]

    def _element(self, node: fx.Node, index: Index) -> Expr:
        self.indices.update(index)
        op = None if node in self.opaque else dialect.read(node)
        rule = RULES.get(op.name) if op is not None else None
        if op is not None and rule is not None:
            try:
                e = rule(self, node, op, index)
            except NotLiftable as stop:
                self.stops[node] = str(stop)
            else:
                # What stored positions select is better selected once, for a table, than by every element.
                table = self._table(node, index) if any(map(self._selects, E.walk(e))) else None
                if table is not None or not self._smaller_as_tensor(op, e, index):
                    return e if table is None else table
        return self._leaf(node, index)

    def _selects(self, e: Expr) -> bool:
        """True for a load at a position that is loaded, but for one that a table holds as it is."""
        return E.selects(e) and any(
            any(n.op == "load" for n in E.walk(i))
            and not (i.op == "load" and isinstance(self.scope.captures.get(i.args[0]), Table))
            for i in e.operands
        )

    def _smaller_as_tensor(self, op: Op, e: Expr, index: Index) -> bool:
        """Materialise at the smallest rank: what does not run over both q and kv stays a tensor.

        Closed forms, what only moves indices, and conditions on one stored value are looked through
        all the same.
        """
        if op.name in _THROUGH or E.contains(e, E.S):
            return False
        loads = [n for n in E.walk(e) if n.op == "load"]
        if any(n.args[0] in self.rows for n in loads):
            return False
        chosen = e.args[0] if e.op == "where" and e.args[1].is_const and e.args[2].is_const else e
        if len(loads) == 1 and (chosen in loads or E.is_bool(chosen)):
            return False
        used: set[str] = set().union(*(E.variables(i) for i in index)) if index else set()
        return bool(loads) and (not {"q", "kv"} <= used or len(list(E.walk(e))) > MAX_PROGRAM_NODES)

    def _table(self, node: fx.Node, index: Index) -> Expr | None:
        """``node[index]`` as an element of a table that is smaller than one for each q and kv."""
        found = condense(self, node, index) if self.condenses else None
        return None if found is None else self._loaded(found)

    def _loaded(self, element: Element) -> Expr:
        places = (self._loaded(i) if isinstance(i, Element) else self.simplify(i) for i in element.at)
        return E.load(self._name(element.capture, element.node), places)

    def _leaf(self, node: fx.Node, index: Index) -> Expr:
        table = self._table(node, index)
        if table is not None:
            return table
        self.leaves[node] = None
        sizes = shape(node)
        pinned = [const(0) if same(n, 1) else self.simplify(i) for n, i in zip(sizes, index, strict=True)]
        # A program has no empty index; the rewrite makes such a tensor one of a single element.
        return E.load(self._name(node, node), pinned or [const(0)])

    def row(self, row: Row, index: Index) -> Expr:
        """The element of a reduction over the scores of a row."""
        e = self._leaf(row.node, index)
        self.rows[e.args[0]] = row
        return e

    def _name(self, capture: Capture, node: fx.Node) -> str:
        """The name of a capture, after ``node``."""
        for name, known in self.scope.captures.items():
            if known is capture or (isinstance(known, Table) and known == capture):
                return name
        base = re.sub(r"^l_(kwargs_|args_|self_)?|_$", "", re.sub(r"\W", "_", node.name.lower()))
        base = re.sub(r"^.*modules_|(parameters|buffers)_", "", base) or "x"
        base = base if base.isidentifier() else f"arg_{base}"
        taken = {
            *E.INDEX_VARS,
            *E.LENGTHS,
            *E.UNARY,
            *get_args(DeadRows),
            "s",
            "d",
            "sink",
            "min",
            "max",
            "where",
            "inf",
        }
        name, n = base, 1
        while (
            name in taken or keyword.iskeyword(name) or name in self.scope.captures or name in self.scope.ints
        ):
            name, n = f"{base}_{n}", n + 1
        self.scope.captures[name] = capture
        return name

    # --- values -------------------------------------------------------------------------------

    def operand(self, x: Any, index: Index) -> Expr:
        """An argument of an elementwise operation: a tensor to broadcast, a number or a size."""
        if isinstance(x, fx.Node):
            example = nodes.value(x)
            if isinstance(example, torch.Tensor):
                if nodes.tensor(x) is None or example.is_complex():
                    raise NotLiftable("a tensor that is not dense and real")
                sizes = shape(x)
                aligned = index[len(index) - len(sizes) :]
                return self.element(
                    x, tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, sizes, strict=True))
                )
            return self.number(x)
        return self.number(x)

    def number(self, x: Any) -> Expr:
        """A literal, or an integer of the graph."""
        if isinstance(x, fx.Node):
            example = nodes.constant(x)
            if isinstance(example, (bool, int, float)):
                return const(example)
            if isinstance(example, torch.SymInt):
                return self.size(size_of(example))
            raise NotLiftable(f"the value of `{x.name}` is not known")
        if isinstance(x, torch.SymInt):
            return self.size(size_of(x))
        if isinstance(x, (bool, int, float)):
            return const(x)
        raise NotLiftable(f"an argument {x!r}")

    def size(self, size: Size) -> Expr:
        """A size as an expression; symbolic ones get names."""
        if isinstance(size, int):
            return const(size)
        if size in self.scope.sizes:
            return self.scope.sizes[size]
        if isinstance(size, sympy.Add):
            return E.add(*(self.size(_as_size(a)) for a in size.args))
        if isinstance(size, sympy.Mul):
            total = const(1)
            for a in size.args:
                total = E.mul(total, self.size(_as_size(a)))
            return total
        if not isinstance(size, sympy.Symbol):
            raise NotLiftable(f"a size {size} that is not a sum of products")
        name = str(size)
        self.scope.ints.setdefault(name, size)
        return E.var(name)

    def simplify(self, e: Expr) -> Expr:
        """``e`` with ``i // n`` and ``i % n`` removed where the range of ``i`` decides them."""

        def decide(node: Expr) -> Expr | None:
            if node.op in ("//", "%") and node.args[1].is_const:
                a, n = self.simplify(node.args[0]), node.args[1].value
                low, high = self.interval(a)
                if low is not None and high is not None and low >= 0 and high < n:
                    return const(0) if node.op == "//" else a
                return E.build(node.op, (a, node.args[1]))
            if node.op in E.COMPARISONS and E.is_integral(node.args[0]) and E.is_integral(node.args[1]):
                return self._decided(E.build(node.op, tuple(self.simplify(a) for a in node.args)))
            return None

        return E.substitute(e, decide)

    def _decided(self, e: Expr) -> Expr:
        if e.op not in E.COMPARISONS or E.is_bool(e.args[0]) or E.is_bool(e.args[1]):
            return e
        difference = E.sub(e.args[0], e.args[1])
        low, high = self.interval(difference)
        if high is None:
            high = self.interval(self._at_most(difference))[1]
        holds = {"<=": (high, 0), "<": (high, -1), ">=": (0, low), ">": (1, low)}.get(e.op)
        fails = {"<=": (1, low), "<": (0, low), ">=": (high, -1), ">": (high, 0)}.get(e.op)
        if holds and None not in holds and holds[0] <= holds[1]:  # type: ignore[operator]
            return E.TRUE
        if fails and None not in fails and fails[0] <= fails[1]:  # type: ignore[operator]
            return E.FALSE
        return e

    def _at_most(self, e: Expr) -> Expr:
        """A sum that is nowhere below ``e``: variables at their largest value, where that is a symbol."""

        def largest(term: Expr) -> Expr:
            variable, factor = term.args if term.op == "*" else (term, E.ONE)
            bound = self.bounds.get(variable.args[0]) if variable.op == "var" else None
            if bound is None or isinstance(bound, int) or not factor.is_const or factor.value < 0:
                return term
            return E.mul(E.sub(self.size(bound), E.ONE), factor)

        return E.add(*map(largest, e.operands)) if e.op == "+" else largest(e)

    def interval(self, e: Expr) -> tuple[int | None, int | None]:
        """Inclusive bounds of an integral expression; ``None`` = unknown on that side."""
        if e.is_const:
            return int(e.value), int(e.value)
        if e.op == "var":
            bound = self.bounds.get(e.args[0])
            lowest = (
                0 if bound is not None or e.args[0] in E.LENGTHS or e.args[0] in self.scope.ints else None
            )
            return lowest, bound - 1 if isinstance(bound, int) else None
        if e.op == "+":
            lows, highs = zip(*(self.interval(a) for a in e.operands), strict=True)
            return (
                None if None in lows else sum(lows),
                None if None in highs else sum(highs),
            )
        if e.op == "*" and e.args[1].is_const and isinstance(e.args[1].value, int):
            low, high = self.interval(e.args[0])
            c = e.args[1].value
            scaled = (None if low is None else low * c, None if high is None else high * c)
            return scaled if c >= 0 else (scaled[1], scaled[0])
        if e.op in ("//", "%") and e.args[1].is_const and e.args[1].value > 0:
            low, high = self.interval(e.args[0])
            n = e.args[1].value
            if e.op == "//":
                return (None if low is None else low // n, None if high is None else high // n)
            return 0, n - 1
        if e.op in ("min", "max"):
            (l0, h0), (l1, h1) = self.interval(e.args[0]), self.interval(e.args[1])
            pick = min if e.op == "min" else max
            return (
                None if l0 is None or l1 is None else pick(l0, l1),
                None if h0 is None or h1 is None else pick(h0, h1),
            )
        if e.op == "abs":
            low, high = self.interval(e.args[0])
            least = max(low or 0, -(high or 0), 0) if low is not None and high is not None else 0
            return least, None if low is None or high is None else max(-low, high)
        if E.is_bool(e):
            return 0, 1
        return None, None


def _as_size(e: Any) -> Size:
    return int(e) if e.is_number else e
