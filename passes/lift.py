"""A tensor of the graph, read as a scalar expression over its indices.

:meth:`Lift.element` answers "what is ``node[i, j, …]``?" by pulling the indices up through the graph.
Index-only operations rewrite the indices, elementwise operations combine expressions, formulas such
as ``arange`` and ``tril`` become closed forms.  Where nothing more is known the answer is a load
from the tensor itself, so the lift never fails; it only stops early.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.passes import dialect, nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.nodes import Size, same, shape, size_of

Index = tuple[Expr, ...]

MAX_PROGRAM_NODES = 400
"""A score larger than this is better computed by the graph itself."""

_THROUGH = dialect.VIEWS | dialect.CASTS | {"contiguous", "clone", "getitem", "index", "repeat", "repeat_interleave"}


class NotLiftable(Exception):
    """Raised inside the lift where an operation has no scalar meaning; the node becomes a leaf."""


@dataclass(frozen=True)
class Product:
    """A sum over one index of two tensors: ``Σ_r a[..., r, ...] · b[..., r, ...]``.

    ``a_index`` and ``b_index`` are the indices of the operands, with ``summed`` in the place of r.
    """

    node: fx.Node
    a: fx.Node
    a_index: Index
    b: fx.Node
    b_index: Index
    summed: Expr
    length: Size


@dataclass
class Scope:
    """Names of one site: captured tensors and integers, and what symbolic sizes are called."""

    captures: dict[str, fx.Node] = field(default_factory=dict)
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
        visited: every node whose meaning was used, in order of first use.
    """

    scope: Scope
    bounds: dict[str, Size]
    at_product: Callable[[Product], Expr | None] = lambda product: None
    opaque: frozenset[fx.Node] = frozenset()
    visited: dict[fx.Node, Expr] = field(default_factory=dict)
    leaves: dict[fx.Node, None] = field(default_factory=dict)
    stops: dict[fx.Node, str] = field(default_factory=dict)
    _memo: dict[tuple[fx.Node, Index], Expr] = field(default_factory=dict)

    # --- entry --------------------------------------------------------------------------------

    def element(self, node: fx.Node, index: Index) -> Expr:
        """The expression of ``node[index]``."""
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._element(node, index)
            self.visited.setdefault(node, self._memo[key])
        return self._memo[key]

    def _element(self, node: fx.Node, index: Index) -> Expr:
        op = None if node in self.opaque else dialect.read(node)
        rule = _RULES.get(op.name) if op is not None else None
        if op is not None and rule is not None:
            try:
                e = rule(self, node, op, index)
            except NotLiftable as stop:
                self.stops[node] = str(stop)
            else:
                if not self._smaller_as_tensor(op, e, index):
                    return e
        return self._leaf(node, index)

    def _smaller_as_tensor(self, op: Op, e: Expr, index: Index) -> bool:
        """Materialise at the smallest rank: what does not run over both q and kv stays a tensor.

        Closed forms and what only moves indices are looked through all the same.
        """
        if op.name in _THROUGH or E.contains(e, E.S):
            return False
        loads = [n for n in E.walk(e) if n.op == "load"]
        used: set[str] = set().union(*(E.variables(i) for i in index)) if index else set()
        return bool(loads) and (not {"q", "kv"} <= used or len(list(E.walk(e))) > MAX_PROGRAM_NODES)

    def _leaf(self, node: fx.Node, index: Index) -> Expr:
        self.leaves[node] = None
        sizes = shape(node)
        pinned = (const(0) if same(n, 1) else self.simplify(i) for i, n in zip(index, sizes, strict=True))
        return E.load(self._name(node), pinned)

    def _name(self, node: fx.Node) -> str:
        for name, known in self.scope.captures.items():
            if known is node:
                return name
        base = re.sub(r"^l_(kwargs_|args_|self_)?|_$", "", re.sub(r"\W", "_", node.name.lower())) or "x"
        taken = {*E.INDEX_VARS, *E.LENGTHS, *E.UNARY, "s", "min", "max", "where", "mean", "nan", "zero", "none", "inf"}
        name, n = base, 1
        while name in taken or keyword.iskeyword(name) or name in self.scope.captures or name in self.scope.ints:
            name, n = f"{base}_{n}", n + 1
        self.scope.captures[name] = node
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
        low, high = self.interval(E.sub(e.args[0], e.args[1]))
        holds = {"<=": (high, 0), "<": (high, -1), ">=": (0, low), ">": (1, low)}.get(e.op)
        fails = {"<=": (1, low), "<": (0, low), ">=": (high, -1), ">": (high, 0)}.get(e.op)
        if holds and None not in holds and holds[0] <= holds[1]:  # type: ignore[operator]
            return E.TRUE
        if fails and None not in fails and fails[0] <= fails[1]:  # type: ignore[operator]
            return E.FALSE
        return e

    def interval(self, e: Expr) -> tuple[int | None, int | None]:
        """Inclusive bounds of an integral expression; ``None`` = unknown on that side."""
        if e.is_const:
            return int(e.value), int(e.value)
        if e.op == "var":
            bound = self.bounds.get(e.args[0])
            lowest = 0 if bound is not None or e.args[0] in E.LENGTHS or e.args[0] in self.scope.ints else None
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
        if E.is_bool(e):
            return 0, 1
        return None, None


def _as_size(e: Any) -> Size:
    return int(e) if e.is_number else e


# --- index rules ------------------------------------------------------------------------------

_RULES: dict[str, Callable[[Lift, fx.Node, Op, Index], Expr]] = {}


def _rule(*names: str) -> Callable[[Callable[[Lift, fx.Node, Op, Index], Expr]], Any]:
    def register(rule: Callable[[Lift, fx.Node, Op, Index], Expr]) -> Any:
        for name in names:
            _RULES[name] = rule
        return rule

    return register


def _dim(dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        raise NotLiftable(f"a dimension {dim!r}")
    return dim % rank if rank else 0


def source_index(lift: Lift, node: fx.Node, op: Op, index: Index) -> Index | None:
    """The index into ``op.input`` that an index-only operation with one input reads.

    ``None`` where the operation is not index-only.  This one function serves the lift of scores and
    the search for the tensors behind q, k and v.
    """
    name, source = op.name, op.args.get("input")
    if not isinstance(source, fx.Node) or nodes.tensor(source) is None:
        return None
    sizes = shape(source)
    rank = len(sizes)
    if name in ("contiguous", "clone", "alias"):
        return index
    if name in ("view", "reshape", "flatten", "unflatten"):
        return _reshaped(lift, index, shape(node), sizes)
    if name == "unsqueeze":
        dim = _dim(op.args["dim"], rank + 1)
        return index[:dim] + index[dim + 1 :]
    if name == "squeeze":
        dims = op.args.get("dim")
        chosen = range(rank) if dims is None else [_dim(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
        dropped = [d for d in chosen if same(sizes[d], 1)]
        rest = iter(index)
        return tuple(const(0) if d in dropped else next(rest) for d in range(rank))
    if name in ("transpose", "t", "mT", "T"):
        if name == "transpose":
            d0, d1 = _dim(op.args["dim0"], rank), _dim(op.args["dim1"], rank)
        elif rank == 2 or name == "mT":
            d0, d1 = rank - 2, rank - 1
        else:
            return None
        swapped = list(index)
        swapped[d0], swapped[d1] = swapped[d1], swapped[d0]
        return tuple(swapped)
    if name == "permute":
        dims = [_dim(d, rank) for d in op.args["dims"]]
        moved: list[Expr] = [const(0)] * rank
        for position, d in enumerate(dims):
            moved[d] = index[position]
        return tuple(moved)
    if name in ("expand", "expand_as"):
        aligned = index[len(index) - rank :]
        return tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, sizes, strict=True))
    if name == "repeat":
        aligned = index[len(index) - rank :]
        return tuple(
            const(0) if same(n, 1) else lift.simplify(E.mod(i, lift.size(n))) for i, n in zip(aligned, sizes, strict=True)
        )
    if name == "repeat_interleave":
        repeats, dim = op.args.get("repeats"), op.args.get("dim")
        if not isinstance(repeats, int) or dim is None:
            return None
        d = _dim(dim, rank)
        return (*index[:d], lift.simplify(E.floordiv(index[d], const(repeats))), *index[d + 1 :])
    if name in ("slice", "narrow", "select"):
        d = _dim(op.get("dim", 0), rank)
        if name == "select":
            return (*index[:d], _position(lift, op.args["index"], sizes[d]), *index[d:])
        start = _position(lift, op.get("start", 0), sizes[d])
        step = op.get("step", 1) if name == "slice" else 1
        if not isinstance(step, int):
            return None
        return (*index[:d], E.add(start, E.mul(index[d], const(step))), *index[d + 1 :])
    if name == "getitem":
        return _getitem(lift, op.args["index"], index, sizes)
    return None


def _position(lift: Lift, start: Any, size: Size) -> Expr:
    """A slice bound or an index as a position: negative ones count from the end, clamped to the size."""
    if start is None:
        return const(0)
    e = lift.number(start)
    if e.is_const:
        position = int(e.value)
        if position < 0:
            shifted = E.add(lift.size(size), const(position))
            if shifted.is_const:
                return const(max(0, int(shifted.value)))
            raise NotLiftable("a negative slice of a dynamic size")
        return const(min(position, size)) if isinstance(size, int) else e
    if lift.interval(e)[0] is None:
        raise NotLiftable("a slice that may start before 0")
    return e


def _getitem(lift: Lift, item: Any, index: Index, sizes: tuple[Size, ...]) -> Index | None:
    """Basic indexing: ints, slices, ``None`` and ``...``; ``None`` is returned for the rest."""
    items = list(item) if isinstance(item, tuple) else [item]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice)) or _is_symint(i)) or isinstance(i, bool) for i in items):
        return None
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (len(sizes) - used)
    out: list[Expr] = []
    position = 0
    for i in items:
        if i is None:
            position += 1
            continue
        size = sizes[len(out)]
        if isinstance(i, slice):
            if i.step is not None and i.step != 1 and not isinstance(i.step, int):
                return None
            start = _position(lift, i.start, size)
            out.append(E.add(start, E.mul(index[position], const(i.step or 1))))
            position += 1
        else:
            out.append(_position(lift, i, size))
    return tuple(out)


def _is_symint(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(nodes.value(x), (int, torch.SymInt))


def _reshaped(lift: Lift, index: Index, out: Sequence[Size], into: Sequence[Size]) -> Index:
    """The index into shape ``into`` of the element at ``index`` of shape ``out``, same order.

    Both shapes are cut into the shortest runs of equal product, so that a split or a merge of two
    dimensions stays local to them.
    """
    result: list[Expr] = []
    i = j = 0
    while i < len(out) or j < len(into):
        i_end, j_end = i + 1, j + 1
        if i >= len(out) or (j < len(into) and same(into[j], 1) and not same(out[i], 1)):
            result.append(const(0))
            j += 1
            continue
        if j >= len(into) or (same(out[i], 1) and not same(into[j], 1)):
            i += 1
            continue
        while not same(nodes.product(out[i:i_end]), nodes.product(into[j:j_end])):
            a, b = nodes.product(out[i:i_end]), nodes.product(into[j:j_end])
            smaller = _smaller(a, b)
            if smaller is None or (smaller and i_end >= len(out)) or (not smaller and j_end >= len(into)):
                raise NotLiftable(f"a reshape of {tuple(into)} to {tuple(out)}")
            i_end, j_end = (i_end + 1, j_end) if smaller else (i_end, j_end + 1)
        linear = const(0)
        for position in range(i, i_end):
            linear = E.add(E.mul(linear, lift.size(out[position])), index[position])
        digits: list[Expr] = []
        for position in range(j_end - 1, j - 1, -1):
            size = lift.size(into[position])
            digits.append(lift.simplify(linear if position == j else E.mod(linear, size)))
            linear = lift.simplify(E.floordiv(linear, size)) if position > j else linear
        result += digits[::-1]
        i, j = i_end, j_end
    return tuple(result)


def _smaller(a: Size, b: Size) -> bool | None:
    """Whether ``a`` < ``b``, for sizes of which one is a multiple of the other; ``None`` if unclear."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = sympy.fraction(ratio)
    if denominator == 1:
        return False
    if numerator == 1 or (numerator.is_number and not denominator.is_number):
        return True
    return bool(numerator < denominator) if numerator.is_number and denominator.is_number else None


@_rule(
    "contiguous", "clone", "alias", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose",
    "permute", "t", "mT", "T", "expand", "expand_as", "repeat", "repeat_interleave", "slice", "narrow", "select",
)  # fmt: skip
def _index_only(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    moved = source_index(lift, node, op, index)
    if moved is None:
        raise NotLiftable(f"`{op.name}` with these arguments")
    return lift.element(op.input, moved)


@_rule("detach")
def _detach(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    example = nodes.tensor(op.input)
    if example is None or example.requires_grad:
        raise NotLiftable("detach of a tensor that needs a gradient")
    return lift.element(op.input, index)


@_rule("getitem", "index")
def _indexed(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    source = op.input
    if isinstance(source, fx.Node) and isinstance(nodes.value(source), (tuple, list)):
        return _piece(lift, node, source, op.args["index"], index)
    if op.name == "getitem":
        moved = source_index(lift, node, op, index)
        if moved is not None:
            return lift.element(source, moved)
    items = op.args["index"] if op.name == "getitem" else op.args["indices"]
    return _gather(lift, source, items if isinstance(items, (tuple, list)) else (items,), index)


def _gather(lift: Lift, source: fx.Node, items: Sequence[Any], index: Index) -> Expr:
    """``source[i0, i1, …]`` where every item is an integer tensor, broadcast together."""
    sizes = shape(source)
    tensors = [i for i in items if isinstance(i, fx.Node) and isinstance(nodes.value(i), torch.Tensor)]
    if len(tensors) != len(items) or len(items) > len(sizes):
        raise NotLiftable("indexing that mixes tensors and slices")
    if any(nodes.value(t).dtype in (torch.bool, torch.uint8) for t in tensors):
        raise NotLiftable("indexing by a mask")
    rank = len(index) - (len(sizes) - len(items))
    head, tail = index[:rank], index[rank:]
    positions = []
    for t, size in zip(tensors, sizes, strict=False):
        position = lift.simplify(lift.operand(t, head))
        low = lift.interval(position)[0]
        if low is None or low < 0:
            # A negative index would count from the end.
            raise NotLiftable("indexing by positions that are not known to be at least 0")
        positions.append(const(0) if same(size, 1) else position)
    return lift.element(source, (*positions, *tail))


def _piece(lift: Lift, node: fx.Node, pieces: fx.Node, which: Any, index: Index) -> Expr:
    """One result of ``chunk``, ``split`` or ``unbind``."""
    op = dialect.read(pieces)
    example = nodes.value(pieces)
    if op is None or op.name not in ("chunk", "split", "unbind") or not isinstance(which, int):
        raise NotLiftable("an element of a tuple")
    which %= len(example)
    rank = len(shape(op.input))
    d = _dim(op.get("dim", 0), rank)
    if op.name == "unbind":
        return lift.element(op.input, (*index[:d], const(which), *index[d:]))
    start = sum(size_of(piece.shape[d]) for piece in example[:which])
    return lift.element(op.input, (*index[:d], E.add(index[d], lift.size(start)), *index[d + 1 :]))


@_rule("cat")
def _cat(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    tensors = [t for t in op.args["tensors"] if not _is_legacy_empty(t)]
    rank = len(index)
    d = _dim(op.get("dim", 0), rank)
    if len(tensors) == 1:
        return lift.element(tensors[0], index)
    starts: list[Expr] = [const(0)]
    for t in tensors[:-1]:
        starts.append(E.add(starts[-1], lift.size(shape(t)[d])))
    result: Expr | None = None
    for t, start in reversed(list(zip(tensors, starts, strict=True))):
        part = lift.element(t, (*index[:d], E.sub(index[d], start), *index[d + 1 :]))
        if any(n.op == "load" for n in E.walk(part)):
            raise NotLiftable("a concatenation of stored tensors")
        result = part if result is None else E.where(E.compare(">=", index[d], _end(start, lift, t, d)), result, part)
    assert result is not None
    return lift.simplify(result)


def _end(start: Expr, lift: Lift, t: fx.Node, d: int) -> Expr:
    return E.add(start, lift.size(shape(t)[d]))


def _is_legacy_empty(node: fx.Node) -> bool:
    """An empty 1-D tensor, which ``cat`` skips whatever the other ranks are."""
    sizes = shape(node)
    return len(sizes) == 1 and same(sizes[0], 0)


# --- elementwise rules ------------------------------------------------------------------------


@_rule("add", "sub", "rsub", "mul", "div", "floordiv", "mod", "minimum", "maximum", "pow")
def _arithmetic(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    a = lift.operand(op.args["input"], index)
    if op.name == "pow":
        exponent = op.args["exponent"]
        if exponent == 2:
            return E.mul(a, a)
        if exponent == 0.5:
            return E.call("sqrt", a)
        raise NotLiftable(f"a power {exponent!r}")
    b = lift.operand(op.args["other"], index)
    alpha = op.get("alpha", 1)
    if alpha != 1:
        b = E.mul(b, lift.number(alpha))
    if op.name == "div" and op.args.get("rounding_mode") is not None:
        if op.args["rounding_mode"] != "floor" or not (E.is_integral(a) and E.is_integral(b)):
            raise NotLiftable("a rounded division")
        return lift.simplify(E.floordiv(a, b))
    if op.name in ("floordiv", "mod"):
        if not (E.is_integral(a) and E.is_integral(b)):
            raise NotLiftable("an integer division of stored values")
        return lift.simplify((E.floordiv if op.name == "floordiv" else E.mod)(a, b))
    return {
        "add": lambda: E.add(a, b),
        "sub": lambda: E.sub(a, b),
        "rsub": lambda: E.sub(b, a),
        "mul": lambda: E.mul(a, b),
        "div": lambda: E.div(a, b),
        "minimum": lambda: E.minimum(a, b),
        "maximum": lambda: E.maximum(a, b),
    }[op.name]()


@_rule("neg", "exp", "log", "tanh", "sqrt", "rsqrt", "abs", "sigmoid", "reciprocal")
def _unary(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    a = lift.operand(op.input, index)
    if op.name == "neg":
        return E.neg(a)
    if op.name == "reciprocal":
        return E.div(const(1.0), a)
    if op.name == "rsqrt":
        return E.div(const(1.0), E.call("sqrt", a))
    return E.call(op.name, a)


@_rule("clamp")
def _clamp(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    a = lift.operand(op.input, index)
    if op.args.get("min") is not None:
        a = E.maximum(a, lift.operand(op.args["min"], index))
    if op.args.get("max") is not None:
        a = E.minimum(a, lift.operand(op.args["max"], index))
    return a


@_rule("max")
def _max(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    other = op.args.get("dim")
    if isinstance(other, fx.Node) and isinstance(nodes.value(other), torch.Tensor):
        return E.maximum(lift.operand(op.input, index), lift.operand(other, index))
    raise NotLiftable("a maximum over a dimension")


@_rule("le", "lt", "ge", "gt", "eq", "ne")
def _compared(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    a, b = lift.operand(op.args["input"], index), lift.operand(op.args["other"], index)
    return lift.simplify(E.compare(dialect.COMPARISON[op.name], a, b))


@_rule("and", "or", "xor", "not")
def _logical(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    example = nodes.tensor(node)
    if example is None or example.dtype != torch.bool:
        raise NotLiftable("bitwise arithmetic on integers")
    a = E.truth(lift.operand(op.args["input"], index))
    if op.name == "not":
        return E.logical_not(a)
    b = E.truth(lift.operand(op.args["other"], index))
    if op.name == "xor":
        return E.logical_or(E.logical_and(a, E.logical_not(b)), E.logical_and(E.logical_not(a), b))
    return (E.logical_and if op.name == "and" else E.logical_or)(a, b)


@_rule("where")
def _where(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    if "input" not in op.args or "other" not in op.args:
        raise NotLiftable("`where` with one argument")
    condition, a, b = (lift.operand(op.args[name], index) for name in ("condition", "input", "other"))
    return E.where(condition, a, b)


@_rule("masked_fill")
def _masked_fill(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    a, mask, fill = (lift.operand(op.args[name], index) for name in ("input", "mask", "value"))
    return E.where(mask, fill, a)


@_rule("tril", "triu")
def _triangle(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    diagonal = lift.number(op.get("diagonal", 0))
    row, column = index[-2], E.sub(index[-1], diagonal)
    inside = E.compare("<=" if op.name == "tril" else ">=", column, row)
    a = lift.element(op.input, index)
    return E.where(inside, a, E.FALSE if E.is_bool(a) else const(0))


@_rule("to", "to_copy", "type_as", "float", "double", "half", "bfloat16", "bool", "long", "int")
def _cast(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    before, after = nodes.tensor(op.input), nodes.tensor(node)
    if before is None or after is None or before.device != after.device:
        raise NotLiftable("a copy to another device")
    a = lift.element(op.input, index)
    if after.dtype == before.dtype:
        return a
    if after.dtype == torch.bool:
        return E.truth(E.compare("!=", a, const(0)))
    if not after.dtype.is_floating_point and before.dtype.is_floating_point:
        raise NotLiftable("a cast from floating point to integer")
    return _rounded(a, after.dtype) if after.dtype.is_floating_point else a


def _rounded(e: Expr, dtype: torch.dtype) -> Expr:
    """Constants as ``dtype`` holds them: float32's minimum is −inf in bfloat16."""
    if e.is_const and isinstance(e.value, float):
        return const(float(torch.tensor(e.value, dtype=torch.float64).to(dtype)))
    if e.op == "where":
        return E.where(e.args[0], _rounded(e.args[1], dtype), _rounded(e.args[2], dtype))
    return e


# --- formulas ---------------------------------------------------------------------------------


@_rule("arange")
def _arange(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    start, step = lift.number(op.args["start"]), lift.number(op.args["step"])
    return E.add(start, E.mul(index[0], step))


@_rule("full", "zeros", "ones", "new_full", "new_zeros", "new_ones", "full_like", "zeros_like", "ones_like")
def _filled(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    example = nodes.tensor(node)
    if example is None:
        raise NotLiftable("a tensor that is not dense")
    if op.name.startswith(("zeros", "new_zeros")):
        fill = const(0)
    elif op.name.startswith(("ones", "new_ones")):
        fill = const(1)
    else:
        fill = lift.number(op.args["value"])
    if example.dtype == torch.bool:
        return E.truth(fill)
    return fill


@_rule("tensor", "scalar_tensor")
def _literal(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    if index:
        raise NotLiftable("a literal list")
    return lift.number(op.args["data"])


# --- products ---------------------------------------------------------------------------------

SUMMED = E.var("d")


@_rule("matmul", "bmm", "baddbmm", "einsum")
def _product(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    product = contraction(node, op, index)
    if product is None:
        raise NotLiftable(f"a `{op.name}` of this form")
    e = lift.at_product(product)
    if e is None:
        raise NotLiftable("another product")
    if op.name == "baddbmm":
        alpha, beta = lift.number(op.get("alpha", 1)), op.get("beta", 1)
        e = E.mul(e, alpha)
        if beta != 0:
            # beta = 0 ignores the bias, even where it is NaN.
            e = E.add(E.mul(lift.operand(op.args["bias"], index), lift.number(beta)), e)
    return e


def contraction(node: fx.Node, op: Op, index: Index) -> Product | None:
    """``node[index]`` as a sum of products of two tensors, or ``None``."""
    if op.name == "einsum":
        return _einsum(node, op, index)
    a, b = op.args.get("input"), op.args.get("other")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    if nodes.tensor(a) is None or nodes.tensor(b) is None:
        return None
    a_sizes, b_sizes = shape(a), shape(b)
    if len(a_sizes) < 2 or len(b_sizes) < 2:
        return None
    batch, row, column = index[:-2], index[-2], index[-1]

    def lead(sizes: Sequence[Size]) -> Index:
        aligned = batch[len(batch) - (len(sizes) - 2) :] if len(sizes) > 2 else ()
        return tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, sizes, strict=False))

    return Product(
        node, a, (*lead(a_sizes), row, SUMMED), b, (*lead(b_sizes), SUMMED, column), SUMMED, a_sizes[-1]
    )


def _einsum(node: fx.Node, op: Op, index: Index) -> Product | None:
    operands, equation = op.args.get("operands"), op.args.get("equation")
    if not isinstance(equation, str) or operands is None or len(operands) != 2 or "." in equation:
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or any(len(set(t)) != len(t) for t in (*terms, out)):
        return None
    a, b = operands
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or len(out) != len(index):
        return None
    if nodes.tensor(a) is None or nodes.tensor(b) is None:
        return None
    summed = [c for c in dict.fromkeys(terms[0] + terms[1]) if c not in out]
    if len(summed) != 1 or not all(summed[0] in t for t in terms):
        return None
    where = dict(zip(out, index, strict=True)) | {summed[0]: SUMMED}
    sizes = dict(zip(terms[0], shape(a), strict=True))

    def operand_index(term: str, operand: fx.Node) -> Index:
        return tuple(const(0) if same(n, 1) and c in out else where[c] for c, n in zip(term, shape(operand), strict=True))

    return Product(
        node, a, operand_index(terms[0], a), b, operand_index(terms[1], b), SUMMED, sizes[summed[0]]
    )
