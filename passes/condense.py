"""Tensors at their smallest rank: what depends on q and kv only by way of ``kv - q`` becomes a table.

T5's bias is an embedding of bucketed distances, [Sq, Skv, H] in the graph.  Its buckets take a
logarithm and a cast to integers, which are not worth a place in a kernel, and need none: every element
is a function of ``kv - q`` and ``h``.  :func:`condense` finds such *generators* (sums and differences
of digits of q and kv, each of which takes every value of a range) and repeats the user's own
operations, in the same order and dtypes, on one element for each value of the generators:

    bias[q, kv, h] = table[h, kv - q + Sq - 1]        table: [H, Sq + Skv - 1]

Nothing is derived anew, so the elements are the same bits; only the closed forms that the lift itself
found (``arange(Skv) - arange(Sq)[:, None]`` is ``kv - q``) are replaced by an ``arange``.  Gradients reach
the weights by autograd, at the rank of the table.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import B, Expr, H, const
from flashfuse.passes import dialect, nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index, NotLiftable, dimension, source_index
from flashfuse.passes.nodes import Size, same, shape
from flashfuse.passes.operands import digit
from flashfuse.passes.tables import Call, Length, Table

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift

MAX_STEPS = 300
"""Operations of a table; no model comes near."""

_JOINT = {"q", "kv"}


@dataclass(frozen=True)
class Form:
    """Integers or a constant that the lift knows by formula, in the dtype of ``node``."""

    node: fx.Node
    value: Expr


@dataclass(frozen=True)
class Stored:
    """``node`` at these positions: expressions, or integers computed by other steps."""

    node: fx.Node
    at: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """The operation of ``node`` once more, with ``args`` and ``kwargs`` that hold other steps."""

    node: fx.Node
    target: Any
    args: Any
    kwargs: Any


Tree = Union[Form, Stored, Step]


class NotCondensable(Exception):
    """Inside the search: the tensor stays as the graph builds it."""


@dataclass(frozen=True)
class Condensed:
    """What the search for a table came to: the table and its index, and what was read on the way."""

    found: tuple[Table, Index] | None
    visited: dict[fx.Node, Expr]
    stored: dict[fx.Node, None]
    ints: dict[str, Any]


def condense(lift: Lift, node: fx.Node, index: Index) -> tuple[Table, Index] | None:
    """A table that holds ``node[index]``, and where; ``None`` where the graph's own tensor is as small.

    Layers that read one mask or bias at the same indices share one search.
    """
    used = set().union(*(E.variables(i) for i in index)) if index else set()
    if not used >= _JOINT or node.op in ("placeholder", "get_attr") or node in lift.opaque:
        return None
    # All that the search depends on, but for the graph, which `lift.condensed` belongs to.
    scope = lift.scope
    named = (frozenset(x.items()) for x in (lift.bounds, scope.sizes, scope.ints))
    key = (node, index, lift.opaque, *named)
    if key not in lift.condensed:
        lift.condensed[key] = searched(lift, node, index)
    known = lift.condensed[key]
    scope.ints.update(known.ints)
    if known.found is not None:
        lift.visited.update((n, e) for n, e in known.visited.items() if n not in lift.visited)
        lift.leaves.update(known.stored)
    return known.found


def searched(lift: Lift, node: fx.Node, index: Index) -> Condensed:
    """The search itself, by a lift that tells ``lift`` nothing."""
    scope = dataclasses.replace(lift.scope, captures={}, ints=dict(lift.scope.ints))
    probe = dataclasses.replace(
        lift, scope=scope, condenses=False, visited={}, leaves={},
        stops={}, rows={}, indices=set(), at_product=lambda product: None, _memo={},
    )  # fmt: skip
    reader = _Reader(probe)
    found = None
    try:
        tree = reader.tree(node, index)
        if not isinstance(tree, (Form, Stored)) or _computed(tree):
            axes = _Axes.of(tuple(reader.expressions), probe)
            table = _Writer(axes, probe, nodes.value(node).device).table(tree, node)
            found = table, axes.index()
    except (NotCondensable, NotLiftable):
        pass
    return Condensed(found, probe.visited, reader.stored, probe.scope.ints)


def _computed(tree: Form | Stored) -> bool:
    return isinstance(tree, Stored) and any(not isinstance(i, Expr) for i in tree.at)


# --- reading ------------------------------------------------------------------------------------

_SAME_EVERYWHERE = (
    dialect.ARITHMETIC
    | dialect.COMPARISON.keys()
    | {
        "neg", "exp", "log", "tanh", "sqrt", "rsqrt", "abs", "sigmoid", "reciprocal", "clamp", "clamp_min",
        "clamp_max", "and", "or", "xor", "not", "where", "masked_fill", "max", "min", "floor", "ceil",
        "round", "trunc", "sign", "log2", "log10", "log1p", "exp2", "expm1", "square", "relu", "detach",
        "erf", "sin", "cos",
    }
)  # fmt: skip
"""Elementwise operations, whatever their arguments."""


@dataclass
class _Reader:
    """Takes a tensor apart into the user's operations, down to closed forms and stored tensors."""

    lift: Lift
    expressions: dict[Expr, None] = field(default_factory=dict)
    """Everything that says which element is meant."""
    stored: dict[fx.Node, None] = field(default_factory=dict)
    steps: int = 0
    _memo: dict[tuple[fx.Node, Index], Tree] = field(default_factory=dict)

    def tree(self, node: fx.Node, index: Index) -> Tree:
        key = (node, index)
        if key not in self._memo:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise NotCondensable("too many operations")
            self._memo[key] = self._tree(node, index)
        return self._memo[key]

    def _tree(self, node: fx.Node, index: Index) -> Tree:
        example = nodes.tensor(node)
        if example is None or example.is_complex():
            raise NotCondensable("a tensor that is not dense and real")
        e = self.lift.element(node, index)
        if not any(n.op == "load" for n in E.walk(e)) and (E.is_integral(e) or e.is_const):
            return Form(node, self.seen(e))
        op = None if node in self.lift.opaque else dialect.read(node)
        if op is not None and not index and op.name not in _SAME_EVERYWHERE | dialect.CASTS:
            op = None
        if op is not None and node.op != "call_module":
            try:
                found = self._read(node, op, index)
            except NotLiftable:
                found = None
            if found is not None:
                return found
        return self.at(node, index)

    def seen(self, e: Expr) -> Expr:
        e = self.lift.simplify(e)
        self.expressions[e] = None
        return e

    def at(self, node: fx.Node, index: Sequence[Any]) -> Stored:
        self.stored[node] = None
        self.lift.visited.setdefault(node, const(0))
        return Stored(node, tuple(self.seen(i) if isinstance(i, Expr) else i for i in index))

    def _read(self, node: fx.Node, op: Op, index: Index) -> Tree | None:
        if op.name in dialect.CASTS:
            before, after = nodes.tensor(op.input), nodes.tensor(node)
            if before is None or after is None or before.device != after.device:
                return None
            inner = self.tree(op.input, index)
            return inner if before.dtype == after.dtype else Step(node, "to", (inner, after.dtype), {})
        if op.name == "dropout" and (op.get("training", True) is False or op.get("p", 0.5) == 0):
            return self.tree(op.input, index)
        if op.name == "embedding":
            return self.at(op.args["weight"], (self.tree(op.input, index[:-1]), index[-1]))
        if op.name in ("gather", "index_select") and shape(op.input):
            d = dimension(op.args["dim"], len(shape(op.input)))
            place = index[d : d + 1] if op.name == "index_select" else index
            return self.at(op.input, (*index[:d], self.tree(op.args["index"], place), *index[d + 1 :]))
        if op.name in _SAME_EVERYWHERE:
            return self._repeated(node, op, index)
        if op.name in ("getitem", "index"):
            found = self._gathered(node, op, index)
            if found is not None:
                return found
        moved = source_index(self.lift, node, op, index)
        return None if moved is None else self.tree(op.input, moved)

    def _repeated(self, node: fx.Node, op: Op, index: Index) -> Tree | None:
        """The same operation on the elements of the inputs that make this one."""
        if op.name in ("max", "min") and nodes.tensor(op.args.get("dim")) is None:
            return None
        if op.name == "where" and "other" not in op.args:
            return None
        target = functional(node) if op.mutates else node.target
        if target is None or node.kwargs.get("out") is not None:
            return None

        def argument(x: fx.Node) -> Any:
            if nodes.tensor(x) is None:
                return _number(self.lift, x)
            sizes = shape(x)
            aligned = index[len(index) - len(sizes) :]
            place = tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, sizes, strict=True))
            return self.tree(x, place)

        args, kwargs = (_replaced(x, argument) for x in (node.args, node.kwargs))
        kwargs = {name: x for name, x in kwargs.items() if name not in ("inplace", "memory_format")}
        step = Step(node, target, args, kwargs)
        dtype = nodes.value(node).dtype
        return Step(node, "to", (step, dtype), {}) if op.mutates else step

    def _gathered(self, node: fx.Node, op: Op, index: Index) -> Tree | None:
        """``source[i0, i1, …]`` by integer tensors that are computed."""
        source, items = op.input, op.args["index"] if op.name == "getitem" else op.args["indices"]
        items = items if isinstance(items, (tuple, list)) else (items,)
        if nodes.tensor(source) is None:
            return None
        tensors = [i for i in items if isinstance(i, fx.Node) and nodes.tensor(i) is not None]
        integral = all(nodes.value(t).dtype in (torch.int32, torch.int64) for t in tensors)
        if not tensors or len(tensors) != len(items) or not integral:
            return None
        sizes = shape(source)
        rank = len(index) - (len(sizes) - len(items))
        head, tail = index[:rank], index[rank:]
        places = []
        for t in tensors:
            own = shape(t)
            aligned = head[len(head) - len(own) :]
            places.append(
                self.tree(t, tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, own, strict=True)))
            )
        return self.at(source, (*places, *tail))


def functional(node: fx.Node) -> Any:
    """What computes the value that an in-place operation writes, or ``None``."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, target._opname.removesuffix("_"), None)
        return getattr(packet, target._overloadname, None) if target.namespace == "aten" else None
    if getattr(target, "__module__", "") == "_operator":
        return getattr(operator, name[1:], None) if name.startswith("i") else None
    if isinstance(target, str):
        return name[:-1] if name.endswith("_") else None
    return getattr(torch, name[:-1], None) if name.endswith("_") else None


def _number(lift: Lift, x: fx.Node) -> Any:
    e = lift.number(x)
    if e.is_const:
        return e.value
    size = nodes.value(x)
    if not isinstance(size, torch.SymInt):
        raise NotCondensable("a number that is not known")
    return Length(nodes.size_of(size))


def _replaced(x: Any, replace: Callable[[fx.Node], Any]) -> Any:
    if isinstance(x, fx.Node):
        return replace(x)
    if isinstance(x, (tuple, list)):
        return tuple(_replaced(item, replace) for item in x)
    if isinstance(x, dict):
        return {name: _replaced(item, replace) for name, item in x.items()}
    return x


# --- generators ---------------------------------------------------------------------------------

Generator = tuple[tuple[Expr, int], ...]
"""A sum of digits of q and kv, each with the factor 1 or −1; the first factor is 1."""


def _is_digit(atom: Expr) -> bool:
    found = digit(atom)
    return found is not None and found.variable.args[0] in _JOINT


def _grouped(e: Expr) -> tuple[dict[Generator, int], list[tuple[Expr, int]]]:
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


def _is_sum(e: Expr) -> bool:
    return E.is_integral(e) and not E.is_bool(e) and (e.op in ("+", "var") or _is_digit(e) or _is_multiple(e))


def _is_multiple(e: Expr) -> bool:
    return e.op == "*" and e.args[1].is_const


def _compares_sums(e: Expr) -> bool:
    return e.op in E.COMPARISONS and all(E.is_integral(a) and not E.is_bool(a) for a in e.operands)


@dataclass
class _Axes:
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
    def of(cls, expressions: Sequence[Expr], lift: Lift) -> _Axes:
        found: dict[Generator, None] = {}
        used: set[str] = set()
        for e in expressions:
            used |= E.variables(e)
            _collect(e, found)
        known = {*_JOINT, "b", "h", *E.LENGTHS, *lift.scope.ints}
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
    if not E.variables(e) & _JOINT:
        return
    if _compares_sums(e):
        e = E.sub(*e.operands)
    if _is_sum(e):
        groups, rest = _grouped(e)
        found.update(dict.fromkeys(groups))
        for atom, _ in rest:
            _collect(atom, found)
        return
    for operand in e.operands:
        _collect(operand, found)


def _independent(digits: Sequence[Expr], lift: Lift) -> bool:
    """Whether the digits take all combinations of their values."""
    for name in _JOINT:
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


# --- writing ------------------------------------------------------------------------------------

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
class _Writer:
    """Writes a tree as a recipe whose every tensor has the rank of the table, with sizes of 1."""

    axes: _Axes
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
            if not E.variables(n) & _JOINT:
                return n
            if _compares_sums(n):
                return E.build(n.op, (E.substitute(E.sub(*n.operands), swap), const(0)))
            if not _is_sum(n):
                return None
            groups, rest = _grouped(n)
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
