"""What a score program asks of one tile of rows on a CPU.

A tile is a range of rows and a range of columns.  This file says which columns a range of rows can
reach, gives the value of any part of the program on a tile, and sends a gradient of a tile back to
the captured tensors.  Everything here costs one tile at most; nothing has the size of all scores.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels.expr import (
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
from flashfuse.kernels.spec import ScoreProgram, conditions

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
    sink = substitute(program.sink, take) if program.sink is not None else None
    return Form(
        score,
        scale,
        bias,
        conditions(None if mask == TRUE else mask),
        tuple(_load_of(node) for node in found),
        sink,
    )


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


# --- tiles -----------------------------------------------------------------------------------------

Runs = tuple[tuple[int, int], ...]
"""Columns as ranges ``start:stop``, in order and apart from each other."""


@dataclass(frozen=True)
class Tile:
    """Rows ``q0:q1`` of batch entries ``b0:b1`` and heads ``h0:h1`` against the columns of ``runs``.

    Columns outside are masked.  Where there are several runs, the tile is computed on their columns laid side
    by side (:meth:`take`), and what it adds to columns goes back to where they were (:meth:`add_to`).
    ``conditions`` are those that do not hold everywhere inside; with ``causal``, which has one run at most,
    ``kv - k0 <= q - q0`` must hold as well.
    """

    b0: int
    b1: int
    h0: int
    h1: int
    q0: int
    q1: int
    runs: Runs
    conditions: tuple[Expr, ...] = ()
    causal: bool = False

    @property
    def is_empty(self) -> bool:
        return not self.runs

    @property
    def k0(self) -> int:
        return self.runs[0][0]

    @property
    def k1(self) -> int:
        return self.runs[-1][1]

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of columns of each run."""
        return tuple(stop - start for start, stop in self.runs)

    @functools.cached_property
    def columns(self) -> int:
        return sum(self.lengths)

    @property
    def scores(self) -> int:
        return (self.b1 - self.b0) * (self.h1 - self.h0) * (self.q1 - self.q0) * self.columns

    def widened(self, form: Form, kv_len: int) -> Tile:
        """The same rows against every column."""
        return replace(self, runs=((0, kv_len),), conditions=form.conditions)

    def rows_of(self, x: Tensor) -> Tensor:
        """The tile's part of ``x`` [B, H, Sq, ..]."""
        return x[self.b0 : self.b1, self.h0 : self.h1, self.q0 : self.q1]

    def kv_heads(self, group: int) -> slice:
        """The key heads of the tile, of which each serves ``group`` heads."""
        return slice(self.h0 // group, -(-self.h1 // group))

    def take(self, x: Tensor, axis: int) -> Tensor:
        """The tile's columns of ``x``, which has all along ``axis``; no copy where there is one run."""
        return side_by_side([x.narrow(axis, start, stop - start) for start, stop in self.runs], axis)

    def add_to(self, x: Tensor, axis: int, values: Tensor) -> None:
        """Adds ``values`` to what :meth:`take` reads."""
        for (start, stop), part in zip(self.runs, values.split(self.lengths, axis), strict=True):
            x.narrow(axis, start, stop - start).add_(part)


Sizes = tuple[int, int, int, int]


def side_by_side(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


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
        self.form, self.captures, self.ints, self.sizes = form, captures, ints, sizes
        self.tile, self.dtype = tile, dtype

    def on(self, tile: Tile) -> TileValues:
        """The same program on another tile."""
        return TileValues(self.form, self.captures, self.ints, self.sizes, tile, self.dtype)

    def __missing__(self, name: str) -> Value:
        value = self._index(name) if name in INDEX_VARS else self._load(self.form.loads[int(name[1:])])
        self[name] = value
        return value

    def _range(self, name: str, columns: tuple[int, int]) -> tuple[int, int]:
        tile = self.tile
        ranges = {"b": (tile.b0, tile.b1), "h": (tile.h0, tile.h1), "q": (tile.q0, tile.q1), "kv": columns}
        return ranges[name]

    def _index(self, name: str) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[INDEX_VARS.index(name)] = -1
        runs = self.tile.runs if name == "kv" else ((0, 0),)
        return side_by_side([torch.arange(*self._range(name, run)) for run in runs], 0).view(shape)

    def tensor(self, e: Expr) -> Tensor:
        """``e`` as a tensor of four axes that broadcasts over the tile."""
        value = torch.as_tensor(evaluate(e, self))
        value = value.to(self.dtype) if value.is_floating_point() else value
        return value[(None,) * (4 - value.dim())]

    def _load(self, load: Load) -> Tensor:
        source = self[load.name]
        assert isinstance(source, Tensor)
        if load.direct:
            value = side_by_side([self._view(load, source, run) for run in self._runs(load)], -1)
        elif load.by_distance is not None:
            tables = ((run, source[self._distance_indices(load, run)]) for run in self._runs(load))
            value = side_by_side([self._by_distance(table, run) for run, table in tables], -1)
        else:
            value = source[tuple(torch.as_tensor(evaluate(i, self)) for i in load.node.operands)]
            value = value[(None,) * (4 - value.dim())]
        return value.to(self.dtype) if value.is_floating_point() else value

    def _runs(self, load: Load) -> Runs:
        """The runs that ``load`` tells apart."""
        return self.tile.runs if "kv" in variables(load.node) else ((0, 0),)

    def _view(self, load: Load, source: Tensor, columns: tuple[int, int]) -> Tensor:
        """What a tile of these columns reads of ``source``: [b or 1, H or 1, rows or 1, columns or 1]."""
        axes: list[Any] = []
        for index in load.node.operands:
            if index.is_const:
                source = source.select(len(axes), int(index.value))
            else:
                start, stop = self._range(index.args[0], columns)
                source = source[(slice(None),) * len(axes) + (slice(start, stop),)]
                axes.append(INDEX_VARS.index(index.args[0]))
        source = source.permute(sorted(range(len(axes)), key=axes.__getitem__))
        return source[tuple(slice(None) if axis in axes else None for axis in range(4))]

    def _distance_indices(self, load: Load, columns: tuple[int, int]) -> tuple[Tensor, ...]:
        assert load.by_distance is not None
        first, last = columns[0] - self.tile.q1 + 1, columns[1] - self.tile.q0
        self[str(_D)] = torch.arange(first, last).view(1, 1, 1, -1)
        return tuple(torch.as_tensor(evaluate(i, self)) for i in load.by_distance)

    def _by_distance(self, table: Tensor, columns: tuple[int, int]) -> Tensor:
        """[…, rows + columns - 1] by distance → [.., .., rows, columns]."""
        table = table[(None,) * (4 - table.dim())]
        # Window w of the table is the row that lies w above the last one.
        return table.select(2, 0).unfold(-1, columns[1] - columns[0], 1).flip(-2)

    def add_gradient(self, load: Load, gradient: Tensor, into: Tensor) -> None:
        """Adds ``gradient`` [b, H, rows, columns] of the tile's values of ``load`` to ``into``."""
        if not load.direct and load.by_distance is None:
            _put(into, tuple(torch.as_tensor(evaluate(i, self)) for i in load.node.operands), gradient)
            return
        runs = self._runs(load)
        parts = gradient.split(self.tile.lengths, -1) if len(runs) > 1 else (gradient,)
        for run, part in zip(runs, parts, strict=True):
            if load.direct:
                view = self._view(load, into, run)
                view.add_(_sum_to(part, view.shape))
            else:
                _put(into, self._distance_indices(load, run), _sum_by_distance(part))


def _put(into: Tensor, indices: tuple[Tensor, ...], gradient: Tensor) -> None:
    """``into[indices] += gradient``, summed first over the axes that no index depends on."""
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
