"""What a score program asks of one tile of rows on a CPU.

A tile is a range of rows and a range of columns.  This file says which columns a range of rows can
reach, gives the value of any part of the program on a tile, and sends a gradient of a tile back to
the captured tensors.  Everything here costs one tile at most; nothing has the size of all scores.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels.expr import (
    COMPARISONS,
    INDEX_VARS,
    KV,
    TRUE,
    Expr,
    Q,
    S,
    add,
    contains,
    load,
    substitute,
    var,
    variables,
    walk,
)
from flashfuse.kernels.reference import Value, evaluate
from flashfuse.kernels.spec import ScoreProgram

_D = var("kv - q")
"""The distance of a key from its query, as one variable."""


@dataclass(frozen=True)
class Load:
    """A load outside every other load, and the cheapest way to read it on a tile.

    ``direct``: each index is a constant or an index variable of its own, so a view will do.
    ``by_distance``: the indices over ``kv - q``, when they depend on ``q`` and ``kv`` only so.
    """

    node: Expr
    direct: bool
    by_distance: tuple[Expr, ...] | None

    @property
    def name(self) -> str:
        name: str = self.node.args[0]
        return name


@dataclass(frozen=True)
class Form:
    """A program taken apart.

    Expressions here hold their loads as ``@0[]``, ``@1[]`` …, one for each of ``loads``.
    ``scale`` and ``bias`` are set where the score is ``s * scale + bias`` with ``bias`` free of
    ``s``; ``bias`` is ``None`` for 0.  The mask is true where all ``conditions`` are.  ``sink`` is
    ``None`` where the program has none.
    """

    score: Expr
    scale: float | None
    bias: Expr | None
    conditions: tuple[Expr, ...]
    loads: tuple[Load, ...]
    sink: Expr | None = None

    def loads_of(self, e: Expr) -> list[Load]:
        return [self.loads[_slot(node)] for node in walk(e) if node.op == "load"]

    def uses(self, e: Expr) -> frozenset[str]:
        """Variables that the value of ``e`` depends on."""
        found = self._uses.get(e)
        if found is None:
            found = frozenset(variables(e)).union(*(variables(x.node) for x in self.loads_of(e)))
            self._uses[e] = found
        return found

    @functools.cached_property
    def _uses(self) -> dict[Expr, frozenset[str]]:
        # Asked at every call; a step of one query takes less time than an answer.
        return {}

    @functools.cached_property
    def mask_loads(self) -> bool:
        return any(self.loads_of(c) for c in self.conditions)

    @functools.cached_property
    def of_indices(self) -> tuple[bool, ...]:
        """For each condition: it loads nothing and is the same in every batch entry."""
        return tuple(not self.loads_of(c) and "b" not in self.uses(c) for c in self.conditions)

    @functools.cached_property
    def mask_uses(self) -> frozenset[str]:
        return frozenset().union(*(self.uses(c) for c in self.conditions))

    @functools.cached_property
    def bias_uses(self) -> frozenset[str]:
        return self.uses(self.bias) if self.bias is not None else frozenset()


def _slot(node: Expr) -> int:
    return int(node.args[0][1:])


@functools.lru_cache(maxsize=1024)
def form_of(program: ScoreProgram) -> Form:
    found: dict[Expr, Expr] = {}

    def take(node: Expr) -> Expr | None:
        if node.op != "load":
            return None
        return found.setdefault(node, load(f"@{len(found)}", ()))

    score = substitute(program.score, take)
    scale, bias = _linear(score)
    mask = substitute(program.mask, take) if program.mask is not None else TRUE
    conditions = () if mask == TRUE else mask.operands if mask.op == "and" else (mask,)
    sink = substitute(program.sink, take) if program.sink is not None else None
    return Form(score, scale, bias, conditions, tuple(_load_of(node) for node in found), sink)


def _linear(score: Expr) -> tuple[float | None, Expr | None]:
    """``(scale, bias)`` of a score ``s * scale + bias``, else ``(None, None)``."""
    terms: list[Expr] = []

    def flatten(e: Expr) -> None:
        if e.op == "+" and contains(e, S):
            for operand in e.operands:
                flatten(operand)
        else:
            terms.append(e)

    flatten(score)
    with_s = [t for t in terms if contains(t, S)]
    if len(with_s) != 1:
        return None, None
    (term,) = with_s
    if term == S:
        scale = 1.0
    elif term.op == "*" and term.args[0] == S and term.args[1].is_const:
        scale = float(term.args[1].value)
    else:
        return None, None
    rest = [t for t in terms if not contains(t, S)]
    return scale, add(*rest) if rest else None


def _load_of(node: Expr) -> Load:
    indices = node.operands
    names = [i.args[0] for i in indices if i.op == "var" and i.args[0] in INDEX_VARS]
    constants = sum(i.is_const for i in indices)
    direct = len(names) + constants == len(indices) and len(set(names)) == len(names)
    by_distance = tuple(_over_distance(i) for i in indices)
    uses_both = {"q", "kv"} <= variables(node)
    is_free = all("q" not in variables(i) and "kv" not in variables(i) for i in by_distance)
    return Load(node, direct, by_distance if not direct and uses_both and is_free else None)


def _over_distance(e: Expr) -> Expr:
    """``e`` with ``kv`` written as distance + ``q``; free of ``q`` where only the distance matters."""
    return substitute(e, lambda node: add(_D, Q) if node == KV else None)


# --- which columns a range of rows can reach -----------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Rows ``q0:q1`` of batch entries ``b0:b1`` against columns ``k0:k1``.

    Columns outside are masked.  ``conditions`` are those that do not hold everywhere inside; with
    ``causal``, ``kv - k0 <= q - q0`` must hold as well.
    """

    b0: int
    b1: int
    q0: int
    q1: int
    k0: int
    k1: int
    conditions: tuple[Expr, ...] = ()
    causal: bool = False

    @property
    def is_empty(self) -> bool:
        return self.k0 >= self.k1

    def widened(self, form: Form, kv_len: int) -> Tile:
        """The same rows against every column."""
        return replace(self, k0=0, k1=kv_len, conditions=form.conditions)


Sizes = tuple[int, int, int, int]


def tiles(
    program: ScoreProgram,
    captures: Mapping[str, Tensor],
    ints: tuple[tuple[str, int], ...],
    sizes: Sizes,
    rows: int,
    by_batch: bool,
) -> Sequence[Tile]:
    """Every row once, in tiles of ``rows`` rows; one batch entry at a time if ``by_batch``."""
    form = form_of(program)
    if not form.mask_loads:
        return _tiles_of_indices(program, ints, sizes, rows, by_batch)
    return _tiles(form, captures, ints, sizes, rows, by_batch)


@functools.lru_cache(maxsize=256)
def _tiles_of_indices(
    program: ScoreProgram, ints: tuple[tuple[str, int], ...], sizes: Sizes, rows: int, by_batch: bool
) -> Sequence[Tile]:
    # Without loads the tiles follow from the sizes, so all layers of a model share them.
    return _tiles(form_of(program), {}, ints, sizes, rows, by_batch)


def _tiles(
    form: Form,
    captures: Mapping[str, Tensor],
    ints: tuple[tuple[str, int], ...],
    sizes: Sizes,
    rows: int,
    by_batch: bool,
) -> Sequence[Tile]:
    batch, _, q_len, kv_len = sizes
    found = []
    for b0 in range(batch) if by_batch else (0,):
        b1 = b0 + 1 if by_batch else batch
        whole = TileValues(form, captures, ints, sizes, Tile(b0, b1, 0, q_len, 0, kv_len), torch.float32)
        reach = [
            _reach_of_indices(c, ints, sizes) if of_indices else _Reach.of(c, whole)
            for c, of_indices in zip(form.conditions, form.of_indices, strict=True)
        ]
        for q0 in range(0, q_len, rows):
            q1 = min(q0 + rows, q_len)
            k0, k1 = 0, kv_len
            for r in reach:
                low, high = r.columns(q0, q1)
                k0, k1 = max(k0, low), min(k1, high)
            tile = Tile(b0, b1, q0, q1, k0, k1)
            if not tile.is_empty:
                open_ = [not r.holds(q0, q1, k0, k1) for r in reach]
                tile = replace(tile, conditions=tuple(itertools.compress(form.conditions, open_)))
            found.append(tile)
    return found


_FLIPPED = {"<=": ">=", "<": ">", ">=": "<=", ">": "<", "==": "==", "!=": "!="}


class _Reach:
    """Bounds on where one condition can be true, and where it certainly is.

    This one knows nothing: it may be true anywhere and holds nowhere for sure.
    """

    def __init__(self, kv_len: int) -> None:
        self.kv_len = kv_len

    def columns(self, q0: int, q1: int) -> tuple[int, int]:
        """Outside of these columns the condition is false for every row of ``q0:q1``."""
        return 0, self.kv_len

    def holds(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        """True only if the condition is true everywhere inside."""
        return False

    @staticmethod
    def of(condition: Expr, whole: TileValues) -> _Reach:
        form, kv_len = whole.form, whole.sizes[3]
        used = form.uses(condition)
        if condition.op in ("or", "and"):
            return _Several([_Reach.of(c, whole) for c in condition.operands], condition.op, kv_len)
        if "q" not in used:
            return _Columns(whole.tensor(condition).bool(), kv_len)
        if condition.op in COMPARISONS:
            left, right = condition.operands
            op = condition.op
            if "kv" not in form.uses(left):
                left, right, op = right, left, _FLIPPED[op]
            if "q" not in form.uses(left) and "kv" not in form.uses(right):
                return _Compared(op, whole.tensor(left), whole.tensor(right), kv_len)
        return _Reach(kv_len)


@functools.lru_cache(maxsize=32)
def _reach_of_indices(condition: Expr, ints: tuple[tuple[str, int], ...], sizes: Sizes) -> _Reach:
    """The reach of a condition that loads nothing, the same for all layers of a model."""
    form = Form(condition, None, None, (condition,), ())
    tile = Tile(0, sizes[0], 0, sizes[2], 0, sizes[3])
    return _Reach.of(condition, TileValues(form, {}, ints, sizes, tile, torch.float32))


def _hull(possible: Tensor) -> tuple[int, int]:
    """First and last+1 column of ``possible`` [B?, H?, 1, Skv?] in which anything is true."""
    somewhere = possible.flatten(0, 2).any(0).nonzero()
    return (int(somewhere[0]), int(somewhere[-1]) + 1) if len(somewhere) else (0, 0)


class _Columns(_Reach):
    """A condition on the key alone."""

    def __init__(self, allowed: Tensor, kv_len: int) -> None:
        super().__init__(kv_len)
        self.allowed = allowed.expand(*allowed.shape[:3], kv_len)
        self.range = _hull(self.allowed)

    def columns(self, q0: int, q1: int) -> tuple[int, int]:
        return self.range

    def holds(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        return bool(self.allowed[..., k0:k1].all())


class _Compared(_Reach):
    """``left(b, h, kv) op right(b, h, q)``."""

    def __init__(self, op: str, left: Tensor, right: Tensor, kv_len: int) -> None:
        super().__init__(kv_len)
        self.op = op
        self.left = left.expand(*left.shape[:3], kv_len)
        self.right = right

    def _right_bounds(self, q0: int, q1: int) -> tuple[Tensor, Tensor]:
        right = self.right[:, :, q0:q1] if self.right.shape[2] > 1 else self.right
        return right.amin(2, keepdim=True), right.amax(2, keepdim=True)

    def columns(self, q0: int, q1: int) -> tuple[int, int]:
        low, high = self._right_bounds(q0, q1)
        if self.op == "!=":
            return 0, self.kv_len
        if self.op == "==":
            return _hull((self.left >= low) & (self.left <= high))
        reached: Any = COMPARISONS[self.op](self.left, high if self.op in ("<", "<=") else low)
        return _hull(reached)

    def holds(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        low, high = self._right_bounds(q0, q1)
        left = self.left[..., k0:k1]
        if self.op == "==":
            return bool(((left == low) & (left == high)).all())
        if self.op == "!=":
            return bool(((left < low) | (left > high)).all())
        everywhere: Any = COMPARISONS[self.op](left, low if self.op in ("<", "<=") else high)
        return bool(everywhere.all())


class _Several(_Reach):
    """An ``and`` or an ``or``."""

    def __init__(self, parts: list[_Reach], op: str, kv_len: int) -> None:
        super().__init__(kv_len)
        self.parts, self.op = parts, op

    def columns(self, q0: int, q1: int) -> tuple[int, int]:
        ranges = [part.columns(q0, q1) for part in self.parts]
        if self.op == "and":
            return max(r[0] for r in ranges), min(r[1] for r in ranges)
        ranges = [r for r in ranges if r[0] < r[1]] or [(0, 0)]
        return min(r[0] for r in ranges), max(r[1] for r in ranges)

    def holds(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        decide = all if self.op == "and" else any
        return decide(part.holds(q0, q1, k0, k1) for part in self.parts)


# --- values and gradients on a tile ---------------------------------------------------------------


class TileValues(dict[str, Value]):
    """The environment of :func:`evaluate` on one tile: everything broadcasts to [b, H, rows, columns].

    Entries are made when first asked for.  Floating loads come in ``dtype``.
    """

    def __init__(
        self,
        form: Form,
        captures: Mapping[str, Tensor],
        ints: Sequence[tuple[str, int]],
        sizes: Sizes,
        tile: Tile,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(ints)
        self.update(captures)
        self["Sq"], self["Skv"] = sizes[2], sizes[3]
        self.form, self.sizes, self.dtype = form, sizes, dtype
        self.ranges = {
            "b": (tile.b0, tile.b1),
            "h": (0, sizes[1]),
            "q": (tile.q0, tile.q1),
            "kv": (tile.k0, tile.k1),
        }

    def __missing__(self, name: str) -> Value:
        value = self._index(name) if name in self.ranges else self._load(self.form.loads[int(name[1:])])
        self[name] = value
        return value

    def _index(self, name: str) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[INDEX_VARS.index(name)] = -1
        return torch.arange(*self.ranges[name]).view(shape)

    def tensor(self, e: Expr) -> Tensor:
        """``e`` as a tensor of four axes that broadcasts over the tile."""
        value = torch.as_tensor(evaluate(e, self))
        value = value.to(self.dtype) if value.is_floating_point() else value
        return value[(None,) * (4 - value.dim())]

    def _load(self, load: Load) -> Tensor:
        source = self[load.name]
        assert isinstance(source, Tensor)
        if load.direct:
            value = self._view(load, source)
        elif load.by_distance is not None:
            value = self._by_distance(source[self._distance_indices(load)])
        else:
            value = source[tuple(torch.as_tensor(evaluate(i, self)) for i in load.node.operands)]
            value = value[(None,) * (4 - value.dim())]
        return value.to(self.dtype) if value.is_floating_point() else value

    def _view(self, load: Load, source: Tensor) -> Tensor:
        """The part of ``source`` that the tile reads, as [b or 1, H or 1, rows or 1, columns or 1]."""
        axes: list[Any] = []
        for index in load.node.operands:
            if index.is_const:
                source = source.select(len(axes), int(index.value))
            else:
                start, stop = self.ranges[index.args[0]]
                source = source[(slice(None),) * len(axes) + (slice(start, stop),)]
                axes.append(INDEX_VARS.index(index.args[0]))
        source = source.permute(sorted(range(len(axes)), key=axes.__getitem__))
        return source[tuple(slice(None) if axis in axes else None for axis in range(4))]

    def _distance_indices(self, load: Load) -> tuple[Tensor, ...]:
        assert load.by_distance is not None
        (q0, q1), (k0, k1) = self.ranges["q"], self.ranges["kv"]
        self[str(_D)] = torch.arange(k0 - q1 + 1, k1 - q0).view(1, 1, 1, -1)
        return tuple(torch.as_tensor(evaluate(i, self)) for i in load.by_distance)

    def _by_distance(self, table: Tensor) -> Tensor:
        """[…, rows + columns - 1] by distance → [.., .., rows, columns]."""
        table = table[(None,) * (4 - table.dim())]
        columns = self.ranges["kv"][1] - self.ranges["kv"][0]
        # Window w of the table is the row that lies w above the last one.
        return table.select(2, 0).unfold(-1, columns, 1).flip(-2)

    def add_gradient(self, load: Load, gradient: Tensor, into: Tensor) -> None:
        """Adds ``gradient`` [b, H, rows, columns] of the tile's values of ``load`` to ``into``."""
        if load.direct:
            view = self._view(load, into)
            view.add_(_sum_to(gradient, view.shape))
            return
        if load.by_distance is not None:
            indices = self._distance_indices(load)
            gradient = _sum_by_distance(gradient)
        else:
            indices = tuple(torch.as_tensor(evaluate(i, self)) for i in load.node.operands)
        shape = torch.broadcast_shapes(*(i.shape for i in indices))
        shape = (1,) * (4 - len(shape)) + tuple(shape)
        gradient = _sum_to(gradient, shape).to(into.dtype)
        into.index_put_(tuple(i.expand(shape) for i in indices), gradient, accumulate=True)


def _sum_to(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum over the axes that are 1 in ``shape``, in float64: it cancels over whole rows."""
    axes = [axis for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis] > 1]
    return gradient.sum(axes, keepdim=True, dtype=torch.float64) if axes else gradient


def _sum_by_distance(gradient: Tensor) -> Tensor:
    """[b, H, rows, columns] → [b, H, 1, rows + columns - 1]: the sum over each diagonal."""
    batch, heads, rows, columns = gradient.shape
    width = rows + columns - 1
    # In a zeroed [rows, width] block, row w starts at column w: then a diagonal is a column.
    skewed = gradient.new_zeros(batch, heads, rows, width)
    strides = (heads * rows * width, rows * width, width + 1, 1)
    skewed.as_strided((batch, heads, rows, columns), strides).copy_(gradient.flip(-2))
    return skewed.sum(2, keepdim=True)
