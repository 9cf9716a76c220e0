"""What the search for a table found, written as calls that make the table.

A tree holds the user's own operations on one element.  :class:`Writer` repeats them on tensors of the
table's rank, of one element for each value of the axes that matter to it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import B, Expr, H, const
from flashfuse.passes import nodes
from flashfuse.passes.axes import JOINT, Axes, NotCondensable, compares_sums, grouped, is_sum
from flashfuse.passes.tables import Call, Length, Table

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift


@dataclass(frozen=True)
class Form:
    """Integers or a constant that the lift knows by formula, in the dtype of ``node``."""

    node: fx.Node
    value: Expr


@dataclass(frozen=True)
class Stored:
    """``node`` at these positions: expressions, or integers computed by other steps.

    ``wraps``: computed ones may be negative, and count from the end then.
    """

    node: fx.Node
    at: tuple[Any, ...]
    wraps: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """The operation of ``node`` once more, with ``args`` and ``kwargs`` that hold other steps."""

    node: fx.Node
    target: Any
    args: Any
    kwargs: Any


Tree = Union[Form, Stored, Step]


_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
    "abs": torch.abs,
    "min": torch.minimum,
    "max": torch.maximum,
    "where": torch.where,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
}


@dataclass
class Writer:
    """Writes a tree as a recipe whose every tensor has the rank of the table, with sizes of 1."""

    axes: Axes
    lift: Lift
    device: torch.device
    _memo: dict[int, Any] = field(default_factory=dict)
    _known: dict[Expr, Any] = field(default_factory=dict)

    def table(self, tree: Tree, node: fx.Node) -> Table:
        sizes = tuple(n if isinstance(n, int) else Length(n) for n in self.axes.sizes)
        recipe = Call("expand", self.call(tree), sizes)
        return Table(recipe, self.axes.sizes, nodes.value(node).dtype, self.device)

    @property
    def rank(self) -> int:
        return len(self.axes.sizes)

    def call(self, tree: Tree) -> Any:
        if id(tree) not in self._memo:
            self._memo[id(tree)] = self._call(tree)
        return self._memo[id(tree)]

    def _call(self, tree: Tree) -> Any:
        if isinstance(tree, Form):
            own = nodes.value(tree.node)
            # A number must stay one without dimensions: what has some may promote to another dtype.
            return self.form(tree.value, own.dtype, (1,) * (self.rank if own.ndim else 0))
        if isinstance(tree, Stored):
            if not tree.at:
                return tree.node
            if nodes.value(tree.node).device != self.device:
                raise NotCondensable("a tensor on another device")
            return Call(operator.getitem, tree.node, tuple(self.position(i) for i in tree.at))
        own = nodes.value(tree.node)
        if own.ndim and own.device != self.device:
            raise NotCondensable("an operation on another device")
        return Call(tree.target, *self.given(tree.args), **self.given(tree.kwargs))

    def given(self, x: Any) -> Any:
        if isinstance(x, (Form, Stored, Step)):
            return self.call(x)
        if isinstance(x, tuple):
            return tuple(map(self.given, x))
        return {name: self.given(item) for name, item in x.items()} if isinstance(x, dict) else x

    def position(self, i: Any) -> Any:
        return self.form(i, torch.int64) if isinstance(i, Expr) else self.call(i)

    def form(self, e: Expr, dtype: torch.dtype, sizes: tuple[int, ...] | None = None) -> Call:
        """A closed form as a tensor; a constant one has ``sizes``, by default those of any element."""
        found = self.value(self.over_axes(e))
        if not isinstance(found, Call):
            sizes = (1,) * self.rank if sizes is None else sizes
            return Call(torch.full, sizes, found, dtype=dtype, device=self.device)
        own = torch.bool if E.is_bool(e) else torch.int64
        return found if own == dtype else Call("to", found, dtype)

    def over_axes(self, e: Expr) -> Expr:
        """``e`` over the axes of the table, as variables ``u0``, ``u1``, …"""

        def swap(n: Expr) -> Expr | None:
            if not E.variables(n) & JOINT:
                return n
            if compares_sums(n):
                return E.build(n.op, (E.substitute(E.sub(*n.operands), swap), const(0)))
            if not is_sum(n):
                return None
            groups, rest = grouped(n)
            parts = []
            for generator, factor in groups.items():
                place = self.axes.axis(generator)
                start = self.axes.starts[place - len(self.axes.plain)]
                parts.append(E.mul(E.add(E.var(f"u{place}"), self.lift.size(start)), const(factor)))
            parts += [E.mul(E.substitute(atom, swap), const(c)) for atom, c in rest]
            return E.add(*parts)

        return E.substitute(e, swap)

    def value(self, e: Expr) -> Any:
        if e not in self._known:
            self._known[e] = self._value(e)
        return self._known[e]

    def _value(self, e: Expr) -> Any:
        if e.is_const:
            return e.value
        if e.op == "var":
            return self.variable(e)
        values = [self.value(a) for a in e.operands]
        tensors = [isinstance(v, Call) for v in values]
        if e.op not in _OPERATORS:
            raise NotCondensable(f"`{e.op}` of positions")
        if not any(tensors):
            sizes = [v.size if isinstance(v, Length) else v for v in values]
            if e.op not in ("+", "*"):
                raise NotCondensable("a function of sizes")
            return Length(sum(sizes) if e.op == "+" else nodes.product(sizes))
        if e.op in ("min", "max") and not all(tensors):
            of_tensor, number = values if tensors[0] else values[::-1]
            of_tensor = self.integer(of_tensor, e.args[0] if tensors[0] else e.args[1])
            return Call(torch.clamp, of_tensor, **{{"min": "max", "max": "min"}[e.op]: number})
        if e.op in ("and", "or", "not"):
            values = [v if t else self.full(v, torch.bool) for v, t in zip(values, tensors, strict=True)]
        if e.op in ("+", "*", "//", "%", "min", "max", "abs"):
            # PyTorch adds booleans as "or"; here they are 0 and 1.
            values = [self.integer(v, a) for v, a in zip(values, e.operands, strict=True)]
        if e.op == "where" and not E.is_bool(e):
            values = [values[0], *(self.integer(v, a) for v, a in zip(values[1:], e.args[1:], strict=True))]
        if e.op in ("and", "or", "not"):
            values = [self.condition(v, a) for v, a in zip(values, e.operands, strict=True)]
        if e.op == "where":
            values[0] = self.condition(values[0], e.args[0])
        total = values[0]
        if e.op in ("+", "and", "or"):
            for v in values[1:]:
                total = Call(_OPERATORS[e.op], total, v)
            return total
        return Call(_OPERATORS[e.op], *values)

    def full(self, v: Any, dtype: torch.dtype) -> Call:
        return Call(torch.full, (1,) * self.rank, v, dtype=dtype, device=self.device)

    def integer(self, v: Any, e: Expr) -> Any:
        return Call("to", v, torch.int64) if E.is_bool(e) and isinstance(v, Call) else v

    def condition(self, v: Any, e: Expr) -> Any:
        if not isinstance(v, Call):
            return self.full(bool(v), torch.bool)
        return v if E.is_bool(e) else Call(operator.ne, v, 0)

    def variable(self, e: Expr) -> Any:
        name = e.args[0]
        if e in (B, H) and e not in self.axes.plain:
            return 0
        if e in (B, H):
            place = self.axes.plain.index(e)
        elif name.startswith("u") and name[1:].isdigit() and name not in self.lift.scope.ints:
            place = int(name[1:])
        else:
            sizes = {v: s for s, v in self.lift.scope.sizes.items()}
            if e in sizes or name in self.lift.scope.ints:
                return Length(sizes[e] if e in sizes else self.lift.scope.ints[name])
            bound = {"Sq": "q", "Skv": "kv"}[name]
            return self.lift.bounds[bound]
        size = self.axes.sizes[place]
        ramp = Call(torch.arange, size if isinstance(size, int) else Length(size), device=self.device)
        shape_ = tuple(-1 if axis == place else 1 for axis in range(self.rank))
        return ramp if self.rank == 1 else Call("view", ramp, shape_)
