"""Tensors at their smallest rank: what depends on q and kv only by way of ``kv - q`` becomes a table.

T5's bias is an embedding of bucketed distances, [Sq, Skv, H] in the graph.  Its buckets take a
logarithm and a cast to integers, which are not worth a place in a kernel, and need none: every element
is a function of ``kv - q`` and ``h``.  :func:`condense` finds such *generators* (sums and differences
of digits of q and kv, each of which takes every value of a range) and repeats the user's own
operations, in the same order and dtypes, on one element for each value of the generators:

    bias[q, kv, h] = table[h, kv - q + Sq - 1]        table: [H, Sq + Skv - 1]

Where what is left is an embedding, only the positions in it are a table, and the weights are read there:

    bias[q, kv, h] = weight[buckets[kv - q + Sq - 1], h]        buckets: [Sq + Skv - 1]

Nothing is derived anew, so the elements are the same bits; only the closed forms that the lift itself
found (``arange(Skv) - arange(Sq)[:, None]`` is ``kv - q``) are replaced by an ``arange``.  Gradients reach
the weights by autograd, at the rank of the table, or from the kernels.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.passes import dialect, nodes
from flashfuse.passes.axes import JOINT, Axes, NotCondensable
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index, NotLiftable, dimension, source_index
from flashfuse.passes.nodes import same, shape
from flashfuse.passes.recipes import Form, Step, Stored, Tree, Writer
from flashfuse.passes.tables import Call, Capture, Length, Table

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift

MAX_STEPS = 300
"""Operations of a table; no model comes near."""


@dataclass(frozen=True)
class Element:
    """``capture[at]``, where a position is an expression or an element itself; ``node`` names the capture."""

    capture: Capture
    at: tuple[Union[Expr, Element], ...]
    node: fx.Node


@dataclass(frozen=True)
class Condensed:
    """What the search for a table came to: the element of it, and what was read on the way."""

    found: Element | None
    visited: dict[fx.Node, Expr]
    stored: dict[fx.Node, None]
    ints: dict[str, Any]


def condense(lift: Lift, node: fx.Node, index: Index) -> Element | None:
    """The element of a table that is ``node[index]``; ``None`` where the graph's own tensor is as small.

    Layers that read one mask or bias at the same indices share one search.
    """
    used = set().union(*(E.variables(i) for i in index)) if index else set()
    if not used >= JOINT or node.op in ("placeholder", "get_attr") or node in lift.opaque:
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
        found = _looked_up(tree, probe)
        if found is None and (not isinstance(tree, (Form, Stored)) or _computed(tree)):
            found = _element_of_table(tree, node, tuple(reader.expressions), probe)
    except (NotCondensable, NotLiftable):
        pass
    return Condensed(found, probe.visited, reader.stored, probe.scope.ints)


def _computed(tree: Form | Stored) -> bool:
    return isinstance(tree, Stored) and any(not isinstance(i, Expr) for i in tree.at)


def _element_of_table(tree: Tree, node: fx.Node, positions: Sequence[Expr], lift: Lift) -> Element:
    axes = Axes.of(positions, lift)
    # Where the user computes it: another device may round differently.
    device = nodes.value(tree.node).device
    return Element(Writer(axes, lift, device).table(tree, node), axes.index(), node)


def _looked_up(tree: Tree, lift: Lift) -> Element | None:
    """A stored tensor at a position that a table holds, if ``tree`` is that."""
    if not isinstance(tree, Stored) or tree.wraps:
        return None
    computed = [i for i in tree.at if isinstance(i, Step)]
    if len(computed) != 1 or sum(isinstance(i, Expr) for i in tree.at) != len(tree.at) - 1:
        return None
    place = computed[0]
    try:
        element = _element_of_table(place, place.node, tuple(dict.fromkeys(_positions(place, set()))), lift)
    except NotCondensable:
        return None
    table = element.capture
    if isinstance(table, Table) and table.dtype == torch.int64:
        narrow = Table(Call("to", table.recipe, torch.int32), table.shape, torch.int32, table.device)
        element = dataclasses.replace(element, capture=narrow)
    return Element(tree.node, tuple(element if i is place else i for i in tree.at), tree.node)


def _positions(x: Any, seen: set[int]) -> Iterator[Expr]:
    """Everything that says which element of a tree is meant, which has parts in common."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Form):
        yield x.value
    elif isinstance(x, Expr):
        yield x
    else:
        parts = x.at if isinstance(x, Stored) else (x.args, x.kwargs) if isinstance(x, Step) else x
        for part in parts.values() if isinstance(parts, dict) else parts:
            if isinstance(part, (Form, Stored, Step, Expr, tuple, list, dict)):
                yield from _positions(part, seen)


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

    def at(self, node: fx.Node, index: Sequence[Any], wraps: bool = False) -> Stored:
        self.stored[node] = None
        self.lift.visited.setdefault(node, const(0))
        return Stored(node, tuple(self.seen(i) if isinstance(i, Expr) else i for i in index), wraps)

    def _read(self, node: fx.Node, op: Op, index: Index) -> Tree | None:
        if op.name in dialect.CASTS:
            before, after = nodes.tensor(op.input), nodes.tensor(node)
            if before is None or after is None:
                return None
            inner = self.tree(op.input, index)
            if before.device != after.device and (before.device.type != "cpu" or isinstance(inner, Stored)):
                return None
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
        return self.at(source, (*places, *tail), wraps=True)


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
