"""Smaller sizes under which a site keeps its structure.

A proof needs no 4096 keys.  Every number of a site that is a size or a position is replaced by a
smaller one, the same everywhere: in the shapes of its inputs, the literals of the user's nodes, those
of the emitted ones, and the index arithmetic of the program.  What must stay true is read off the
graph: products (a reshape), sums (a concatenation), order, and small differences; 0 to 7 stay as they
are.  That the shrunk nodes still run, and to the expected shape, is checked by running them.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.kernels.ops import OPERATORS
from flashfuse.kernels.spec import AttentionShape, ScoreProgram
from flashfuse.passes import dialect, nodes
from flashfuse.passes.nodes import Size

MAX_ROWS = 4096
"""Tables with more rows are made smaller like any other tensor."""
KEPT = 8
"""Numbers below stay; they are often not sizes but axes, steps or counts."""
NEAR = 7
"""Differences up to this are kept exactly."""
GAP = 3
"""What larger differences become."""

_VALUES = (
    dialect.ARITHMETIC
    | dialect.COMPARISON.keys()
    | {"where", "masked_fill", "clamp", "clamp_min", "clamp_max"}
)
"""Operations whose numbers are positions only where their tensors are integers."""
_FILLS = {"full", "new_full", "full_like", "tensor", "scalar_tensor", "fill"}
_AS_IT_IS = dialect.CASTS | dialect.VIEWS
"""Operations whose results have the values of their input."""


@dataclass
class Shrink:
    """A mapping of sizes and positions.

    Attributes:
        small: what batch, heads and head dimensions become; they only occur in shapes.
        products, sums: number → the numbers that it is made of.
        positions: all other numbers, in order.
        symbols: symbolic size → what was drawn for it.
        kept: numbers that cannot change.
        as_traced: symbolic sizes are equal, or in order, as in the trace.
        twice: what both the images of a batch and the windows of an image count, or 0.  Of two such sizes in
            one shape the first is that of the images, which becomes 2.
    """

    small: dict[int, int]
    products: dict[int, tuple[int, ...]]
    sums: dict[int, tuple[int, ...]]
    positions: tuple[int, ...]
    symbols: dict[sympy.Symbol, int]
    kept: set[int] = field(default_factory=set)
    as_traced: bool = False
    twice: int = 0
    _known: dict[int, int] = field(default_factory=dict)
    _ops: dict[fx.Node, dialect.Op | None] = field(default_factory=dict)

    def op(self, node: fx.Node) -> dialect.Op | None:
        """What a node computes; every draw asks again."""
        if node not in self._ops:
            self._ops[node] = dialect.read(node)
        return self._ops[node]

    def __call__(self, size: Any) -> int:
        """What ``size`` (an integer, a symbolic size or an expression of sizes) becomes."""
        size = nodes.size_of(size) if isinstance(size, torch.SymInt) else size
        if isinstance(size, sympy.Expr):
            if size.is_Integer:
                return self(int(size))
            if size in self.symbols:
                return self.symbols[size]
            return int(size.func(*(self(a) for a in size.args)))
        if size < 0:
            return -self(-size)
        if size < KEPT or size in self.kept:
            return size
        if size not in self._known:
            self._known[size] = self._new(size)
        return self._known[size]

    def _new(self, n: int) -> int:
        if n in self.small:
            return self.small[n]
        if n in self.products:
            return math.prod(self.shape(self.products[n]))
        if n in self.sums:
            return sum(map(self, self.sums[n]))
        below = max((m for m in (*self.positions, *self.kept) if KEPT <= m < n), default=KEPT - 1)
        base = below if below < KEPT else self(below)
        return base + (n - below if n - below <= NEAR else GAP)

    def shape(self, sizes: Sequence[Size]) -> tuple[int, ...]:
        """What the sizes of one shape become."""
        return tuple(map(self, self._told_apart(sizes, sizes)))

    def _told_apart(self, numbers: Sequence[Any], shape: Sequence[Size]) -> Sequence[Any]:
        """``numbers``, which may be the sizes of ``shape``, with 2 for the images where it has both."""
        equal = [i for i, n in enumerate(shape) if self.twice and n == self.twice]
        if len(equal) < 2 or len(numbers) != len(shape) or numbers[equal[0]] != self.twice:
            return numbers
        return [2 if i == equal[0] else n for i, n in enumerate(numbers)]

    def literals(self, node: fx.Node, value: Any) -> Any:
        """The arguments of ``node``, by place or by name, with sizes and positions replaced."""
        op = self.op(node)
        name = op.name if op is not None else ""
        if name in _VALUES and not _is_integral(node):
            return value
        keeps = name in _FILLS and not self.is_position(node)
        if keeps and name in ("tensor", "scalar_tensor"):
            return value
        if isinstance(value, dict):
            return {key: x if keeps and type(x) is int else self._mapped(x) for key, x in value.items()}
        if self.twice and nodes.tensor(node) is not None:
            # Sizes of the result come one by one, or as one argument.
            sizes = nodes.shape(node)
            apart = [self._told_apart(x, sizes) if isinstance(x, (list, tuple)) else x for x in value[1:]]
            value = (*value[:1], *self._told_apart(apart, sizes))
        return tuple(x if keeps and type(x) is int else self._mapped(x) for x in value)

    def is_position(self, node: fx.Node) -> bool:
        """Whether a tensor of integers, however laid out, only meets integers."""
        return _is_integral(node) and all(map(self._meets_integers, node.users))

    def _meets_integers(self, user: fx.Node) -> bool:
        op = self.op(user)
        name = op.name if op is not None else ""
        return self.is_position(user) if name in _AS_IT_IS else name in _VALUES and _is_integral(user)

    def _mapped(self, x: Any) -> Any:
        if type(x) is int:
            return self(x)
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._mapped, x))
        if isinstance(x, slice):
            return slice(*map(self._mapped, (x.start, x.stop, x.step)))
        return x

    def program(self, program: ScoreProgram) -> ScoreProgram:
        """The same program over the smaller indices."""
        mask = None if program.mask is None else self._indices(program.mask)
        sink = None if program.sink is None else self._indices(program.sink)
        return ScoreProgram(self._indices(program.score), mask, program.dead_rows, sink)

    def _indices(self, e: Expr, inside: bool = False, selects: bool = False) -> Expr:
        """``e`` with the constants of its index arithmetic replaced; ``selects``: it is part of an index."""
        if e.is_const:
            return const(self(e.value)) if inside and type(e.value) is int else e
        if not e.operands:
            return e
        integral = E.is_integral(e) and not E.is_bool(e) and bool(E.variables(e))
        compares = e.op in E.COMPARISONS and all(E.is_integral(a) and not E.is_bool(a) for a in e.operands)
        selects = selects or e.op == "load"
        inside = selects or compares or (integral and e.op != "where")
        args = (self._indices(a, inside, selects) if isinstance(a, Expr) else a for a in e.args)
        return Expr(e.op, *args)


def _is_integral(node: fx.Node) -> bool:
    tensors = [t for t in map(nodes.tensor, (node, *node.all_input_nodes)) if t is not None]
    return not any(t.is_floating_point() for t in tensors)


Symbols = Literal["lengths", "any", "hints"]
"""How symbolic sizes are drawn: all different, those of q and k the longer ones; all different in any order;
or related as they were when the graph was traced, equal ones equal."""


def shrink(
    shape: AttentionShape,
    site: Sequence[fx.Node],
    seed: int,
    symbols: Symbols = "lengths",
    tells_apart: bool = False,
) -> Shrink:
    """A mapping for a site, given all nodes of original and replacement; ``seed`` draws symbolic sizes.

    ``tells_apart``: where a batch has as many images as each has windows, those by the order of sizes.
    """
    products, sums = dict(_products(shape, site)), dict(_sums(site))
    hints = _hints(site) if symbols == "hints" else {}
    numbers = {n for node in site for n in _numbers(node)}
    lengths = {n for n in (shape.q_len, shape.kv_len, *hints.values()) if isinstance(n, int)}
    # Rows of a table are counted by arithmetic, of which products and sums are not seen here.
    rows = {n for n in _rows(site) if KEPT <= n <= MAX_ROWS}
    fixed = lengths | rows | _counted(shape, site)
    small = {n: m for n, m in _small(shape, site, products, fixed).items() if n not in fixed}
    rest = sorted(n for n in numbers | lengths if n >= KEPT and n not in small and n not in products)
    for n in rest:
        found = _as_sum(n, rest) if n not in sums else None
        if found is not None:
            sums[n] = found
    positions = tuple(n for n in rest if n not in sums)
    most = max(rows - lengths, default=0)
    kept = {n for n in numbers if KEPT <= n <= most and n not in small}
    parts = products.get(shape.batch, ()) if tells_apart else ()
    twice = next((n for n in parts if parts.count(n) > 1 and n >= KEPT and n not in small), 0)
    while True:
        made = Shrink(small, products, sums, positions, {}, kept, symbols == "hints", twice)
        if symbols == "hints":
            made.symbols.update({symbol: made(n) for symbol, n in hints.items()})
        else:
            made.symbols.update(_drawn(shape, site, seed, symbols))
        totals = [(n, parts, math.prod(made.shape(parts))) for n, parts in products.items()]
        totals += [(n, parts, sum(map(made, parts))) for n, parts in sums.items()]
        broken = set[int]().union(*({n, *parts} for n, parts, total in totals if made(n) != total))
        if not broken:
            return made
        if broken <= kept:
            # All that can be kept is: what counts both is no size of images here.
            twice = 0
        kept |= broken
        kept |= {m for m in positions if any(0 < n - m <= NEAR for n in kept)}


def _small(
    shape: AttentionShape,
    site: Sequence[fx.Node],
    products: Mapping[int, tuple[int, ...]],
    fixed: Container[int],
) -> dict[int, int]:
    """Batch, heads and head dimensions become 2 or 3, unless the graph computes with sizes.

    Of a batch of windows the images do, or whatever of the product can.
    """
    batch = (n for n in products.get(shape.batch, (shape.batch,)) if n not in fixed and n not in products)
    wanted = [(next(batch, 0), 2), (shape.num_kv_heads, 3)]
    if isinstance(shape.num_q_heads, int) and isinstance(shape.num_kv_heads, int):
        wanted.append((shape.gqa_group, 3))
    if not any(isinstance(nodes.value(n), int) for n in site):
        wanted += [(shape.head_dim, 3), (shape.v_head_dim, 3 if shape.head_dim == shape.v_head_dim else 2)]
    return {n: m for n, m in reversed(wanted) if isinstance(n, int) and n >= KEPT}


def _counted(shape: AttentionShape, site: Sequence[fx.Node]) -> set[int]:
    """Integers that the site computes with, other than as sizes of tensors.

    A range of the batch only says which entry is meant.
    """
    found: set[int] = set()
    for node in site:
        op = dialect.read(node)
        if op is not None and (op.name in _VALUES | _FILLS or op.name == "arange") and _is_integral(node):
            numbers = _integers((node.args, node.kwargs))
            found.update(n for n in numbers if n >= KEPT and (op.name != "arange" or n != shape.batch))
        if node.target in OPERATORS:
            found.update(_places(ScoreProgram.parse(str(node.args[7]))))
    return found


def _places(program: ScoreProgram) -> Iterator[int]:
    """The integers in indices of loads."""
    for e in (program.score, program.mask):
        for n in E.walk(e) if e is not None else ():
            if n.op == "load":
                yield from (abs(int(c.value)) for i in n.operands for c in E.walk(i) if c.is_const)


def _rows(site: Sequence[fx.Node]) -> Iterator[int]:
    """Sizes of dimensions that are indexed by integer tensors, other than by ranges."""
    for node in site:
        op = dialect.read(node)
        if op is None or op.name not in ("embedding", "getitem", "index", "gather", "index_select", "take"):
            continue
        source = op.args.get("weight", op.args.get("input"))
        if isinstance(source, fx.Node) and nodes.tensor(source) is not None:
            sizes = nodes.shape(source)
            for d, index in _indexed(op, len(sizes)):
                if isinstance(sizes[d], int) and not _is_range(index):
                    yield sizes[d]


def _indexed(op: dialect.Op, rank: int) -> Iterator[tuple[int, fx.Node]]:
    """The dimensions of a tensor of ``rank`` that integer tensors index, as far as that is known."""
    if op.name == "embedding":
        yield 0, op.input
        return
    items = op.args.get("indices", op.args.get("index"))
    items = items if isinstance(items, (tuple, list)) else (items,)
    tensors = [(d, item) for d, item in enumerate(items) if nodes.tensor(item) is not None]
    if "dim" in op.args:
        yield from ((op.args["dim"], index) for _, index in tensors)
    elif op.name == "take" or any(item is None or item is ... for item in items):
        yield from ((d, index) for _, index in tensors for d in range(rank))
    else:
        yield from tensors


def _is_range(index: fx.Node) -> bool:
    """Whether ``index`` is an ``arange`` in any layout; it shrinks with what it indexes."""
    op = dialect.read(index)
    if op is None or op.name not in dialect.VIEWS | {"getitem"}:
        return op is not None and op.name == "arange"
    return isinstance(op.input, fx.Node) and _is_range(op.input)


def _drawn(
    shape: AttentionShape, site: Sequence[fx.Node], seed: int, symbols: Symbols
) -> dict[sympy.Symbol, int]:
    """Random values for symbolic sizes, all different; longer ones for the lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [s for s in (shape.q_len, shape.kv_len) if isinstance(s, sympy.Expr)]
    found = _symbols(site)
    drawn: dict[sympy.Symbol, int] = {}
    for symbol in found:
        long = any(symbol in s.free_symbols for s in lengths)
        among = range(9, 13) if long else range(2, 6)
        if symbols == "any":
            among = range(9, 12 + 2 * len(found))
        choice = [n for n in among if n not in drawn.values()]
        drawn[symbol] = choice[int(torch.randint(len(choice), (), generator=generator))] if choice else 7
    return drawn


def _symbols(site: Sequence[fx.Node]) -> dict[sympy.Symbol, torch.SymInt]:
    """The symbols of the sizes of a site, each with a size that it is in."""
    found: dict[sympy.Symbol, torch.SymInt] = {}
    for node in site:
        example = nodes.value(node)
        sizes = example.shape if nodes.tensor(node) is not None else (example,)
        for size in sizes:
            expression = nodes.size_of(size) if isinstance(size, torch.SymInt) else 0
            if isinstance(expression, sympy.Expr):
                for symbol in sorted(expression.free_symbols, key=str):
                    found.setdefault(symbol, size)
    return found


def _hints(site: Sequence[fx.Node]) -> dict[sympy.Symbol, int]:
    """The symbolic sizes of a site as they were when the graph was traced, where that is known."""
    known = ((symbol, size.node.shape_env.backed_var_to_val) for symbol, size in _symbols(site).items())
    return {symbol: int(values[symbol]) for symbol, values in known if symbol in values}


def _number(node: fx.Node) -> Any:
    example = nodes.value(node)
    return nodes.size_of(example) if isinstance(example, (int, torch.SymInt)) else 0


def _numbers(node: fx.Node) -> Iterator[int]:
    """Sizes of a node's tensor, and its literals."""
    if nodes.tensor(node) is not None:
        yield from (n for n in nodes.shape(node) if isinstance(n, int))
    op = dialect.read(node)
    if op is not None and op.name in _VALUES and not _is_integral(node):
        return
    yield from _integers((node.args, node.kwargs))
    if node.target in OPERATORS:
        yield from _constants(ScoreProgram.parse(str(node.args[7])))
    if node.target is torch.ops.flashfuse.attention_weights.default:
        yield from _constants(ScoreProgram.parse(str(node.args[5])))


def _integers(x: Any) -> Iterator[int]:
    if isinstance(x, bool):
        return
    if isinstance(x, int):
        yield abs(x)
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _integers(item)
    elif isinstance(x, dict):
        yield from _integers(tuple(x.values()))
    elif isinstance(x, slice):
        yield from _integers((x.start, x.stop, x.step))


def _constants(program: ScoreProgram) -> Iterator[int]:
    """The integers of the program; those that are no positions do no harm."""
    for e in program.parts:
        for n in E.walk(e):
            if n.is_const and type(n.value) is int:
                yield abs(n.value)


def _products(shape: AttentionShape, site: Iterable[fx.Node]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Numbers that a reshape takes apart or puts together."""
    for node in site:
        op = dialect.read(node)
        if op is None or op.name not in ("view", "reshape", "flatten", "unflatten", "reshape_as"):
            continue
        yield from _regrouped(nodes.shape(op.input), nodes.shape(node))
    heads = (shape.num_q_heads, shape.num_kv_heads)
    if all(isinstance(n, int) for n in heads) and heads[0] != heads[1]:
        yield heads[0], (heads[1], shape.gqa_group)


def _regrouped(a: Sequence[Size], b: Sequence[Size]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The dimensions of one shape that several of the other make up."""
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        i, j = i + 1, j + 1
        while not nodes.same(nodes.product(left), nodes.product(right)):
            x, y = nodes.product(left), nodes.product(right)
            grow_left = isinstance(x, int) and isinstance(y, int) and x < y
            if grow_left and i < len(a):
                left.append(a[i])
                i += 1
            elif not grow_left and j < len(b) and isinstance(x, int) and isinstance(y, int):
                right.append(b[j])
                j += 1
            else:
                return
        for whole, parts in ((left, right), (right, left)):
            factors = tuple(n for n in parts if isinstance(n, int) and n != 1)
            if len(whole) == 1 and len(factors) > 1 and isinstance(whole[0], int):
                yield whole[0], factors


def _sums(site: Iterable[fx.Node]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Numbers that a concatenation adds up."""
    for node in site:
        op = dialect.read(node)
        if op is None or op.name != "cat":
            continue
        shapes = [nodes.shape(t) for t in op.args["tensors"] if len(nodes.shape(t)) > 1]
        for d, whole in enumerate(nodes.shape(node)):
            parts = tuple(s[d] for s in shapes if len(s) > d)
            if isinstance(whole, int) and whole >= KEPT and parts and whole not in parts:
                numbers = tuple(n for n in parts if isinstance(n, int))
                if sum(numbers) == whole and len(numbers) == len(parts):
                    yield whole, numbers


def _as_sum(n: int, numbers: Sequence[int]) -> tuple[int, ...] | None:
    """``n`` as the sum of two of the numbers, or next to one: the 2S − 1 of relative positions."""
    for i, a in enumerate(numbers):
        for b in numbers[i:]:
            if b < n and abs(n - a - b) <= 1:
                return (a, b, n - a - b) if n != a + b else (a, b)
    return None


def unchanged(site: Sequence[fx.Node]) -> Shrink:
    """The mapping that changes nothing; symbolic sizes are as in the trace."""
    hints = _hints(site)
    return Shrink({}, {}, {}, (), hints, {n for node in site for n in _numbers(node)}, bool(hints))
