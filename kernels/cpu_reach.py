"""Which columns a range of rows can reach on a CPU, and the tiles that follow from it.

What a mask allows to some rows is a list of *runs* of columns: one for causal masks, windows and padding,
several where the mask has holes (neighbours and global blocks, strides).  Each condition of a mask says
where it may be true and where it certainly is; ``and`` and ``or`` intersect and unite the runs.  So a tile
visits the columns that something is allowed in, and evaluates the conditions that do not hold on all of them.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels.block_map import BLOCK, EMPTY, FULL, block_states
from flashfuse.kernels.cpu_score import Form, Runs, Sizes, Tile, TileValues, form_of
from flashfuse.kernels.expr import COMPARISONS, INDEX_VARS, ZERO, Expr, substitute, truth, var, variables
from flashfuse.kernels.reference import evaluate
from flashfuse.kernels.spec import ScoreProgram

_GAP = 64
"""A hole below this width costs more to leave out than to visit."""

_QUANTUM = 16
"""Runs beside holes start and end at multiples of this: whole vectors, and never fewer columns."""

_LONG_ROW = 512
"""Keys from which holes are looked for where that takes more than a look at each key."""


# --- lists of columns ------------------------------------------------------------------------------


def _runs_of(flags: Tensor, exact: bool) -> Runs:
    """Where ``flags`` [n] is true: ``exact`` leaves short runs out, else narrow holes are closed."""
    at = flags.nonzero()[:, 0]
    if not len(at):
        return ()
    first, last = int(at[0]), int(at[-1]) + 1
    if last - first == len(at):
        return ((first, last),)
    breaks = (at.diff() > (1 if exact else _GAP)).nonzero()[:, 0]
    starts, stops = torch.cat([at[:1], at[breaks + 1]]), torch.cat([at[breaks], at[-1:]]) + 1
    if exact:
        long = stops - starts >= _GAP
        starts, stops = starts[long], stops[long]
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def _joined(runs: Iterable[tuple[int, int]], gap: int = 0) -> Runs:
    """Ranges in any order → runs; those that lie within ``gap`` of each other are one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if found and start <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _stretches_of(flags: Tensor, edges: Sequence[int]) -> Runs:
    """The columns ``edges[i]:edges[i + 1]`` for each i at which ``flags`` is true."""
    return _joined((edges[i], edges[i + 1]) for i in flags.nonzero()[:, 0].tolist())


def _common(one: Runs, other: Runs) -> Runs:
    """The columns that are in both."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, stop = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < stop:
            found.append((start, stop))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def _size(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def _worth_leaving_out(runs: Runs, kv_len: int) -> Runs:
    """``runs`` with the holes that cost more than they save closed."""
    if len(runs) < 2:
        return runs
    wider = (
        (start // _QUANTUM * _QUANTUM, min(-(-stop // _QUANTUM) * _QUANTUM, kv_len)) for start, stop in runs
    )
    found = _joined(wider, _GAP)
    hull = (runs[0][0], runs[-1][1])
    return found if _size(found) * 8 < (hull[1] - hull[0]) * 7 else (hull,)


# --- tiles -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How rows are cut into tiles: ``rows`` at a time, one batch entry at a time if ``by_batch``.

    A tile has fewer rows where its columns have holes, or where its scores are more than ``most_scores``.
    Heads whose columns differ are in different tiles, which hold either heads of one of the groups of
    ``group`` heads that share a key head, or whole groups.
    """

    rows: int
    by_batch: bool = False
    group: int = 1
    most_scores: int | None = None

    def rows_of(self, tile: Tile) -> int:
        """The rows that such a tile should have."""
        rows = min(self.rows, BLOCK) if len(tile.runs) > 1 else self.rows
        if self.most_scores is not None and tile.scores > self.most_scores:
            of_a_row = tile.scores // (tile.q1 - tile.q0)
            rows = min(rows, max(16, self.most_scores // of_a_row // 16 * 16))
        return rows


def _ranges(start: int, stop: int, step: int) -> Iterable[tuple[int, int]]:
    return ((i, min(i + step, stop)) for i in range(start, stop, step))


def tiles(
    program: ScoreProgram,
    captures: Mapping[str, Tensor],
    ints: tuple[tuple[str, int], ...],
    sizes: Sizes,
    cut: Cut,
    dtype: torch.dtype = torch.float32,
) -> Sequence[Tile]:
    """Tiles that hold every row of every head once, the batch entries in order; loads come in ``dtype``."""
    form = form_of(program)
    if not form.mask_loads:
        return _tiles_of_indices(program, ints, sizes, cut)
    return _tiles(form, captures, ints, sizes, cut, dtype)


@functools.lru_cache(maxsize=256)
def _tiles_of_indices(
    program: ScoreProgram,
    ints: tuple[tuple[str, int], ...],
    sizes: Sizes,
    cut: Cut,
) -> Sequence[Tile]:
    # Without loads the tiles follow from the sizes, so all layers of a model share them.
    return _tiles(form_of(program), {}, ints, sizes, cut, torch.float32)


def _tiles(
    form: Form,
    captures: Mapping[str, Tensor],
    ints: tuple[tuple[str, int], ...],
    sizes: Sizes,
    cut: Cut,
    dtype: torch.dtype,
) -> Sequence[Tile]:
    batch, heads, q_len, kv_len = sizes
    by_head = heads > 1 and "h" in form.mask_uses and kv_len >= _LONG_ROW
    blocks = functools.cache(lambda condition: _states(condition, form, captures, ints, sizes))
    found: list[Tile] = []
    for b0, b1 in [(b, b + 1) for b in range(batch)] if cut.by_batch else [(0, batch)]:
        planes = []
        for h0, h1 in [(h, h + 1) for h in range(heads)] if by_head else [(0, heads)]:
            whole = Tile(b0, b1, h0, h1, 0, q_len, ((0, kv_len),), form.conditions)
            planes.append(_Plane(TileValues(form, captures, ints, sizes, whole, dtype), blocks))
        for q0, q1 in _ranges(0, q_len, cut.rows):
            for tile in _of_rows(planes, q0, q1, cut.group):
                rows = cut.rows_of(tile)
                if rows >= q1 - q0:
                    found.append(tile)
                    continue
                some = planes[tile.h0 : tile.h1] if by_head else planes
                for r0, r1 in _ranges(q0, q1, rows):
                    found += _of_rows(some, r0, r1, cut.group)
    return found


class _Plane:
    """Batch entries and heads whose rows reach the same columns, or are treated so."""

    def __init__(self, whole: TileValues, blocks: Any) -> None:
        self.tile, self.kv_len = whole.tile, whole.sizes[3]
        self.conditions = whole.form.conditions
        self.reach = [
            _reach_of_indices(c, tuple(whole.ints), whole.sizes, whole.tile)
            if free
            else _Reach.of(c, whole, blocks)
            for c, free in zip(whole.form.conditions, whole.form.of_indices, strict=True)
        ]

    def columns(self, q0: int, q1: int) -> Runs:
        runs: Runs = ((0, self.kv_len),) if self.kv_len else ()
        for reach in self.reach:
            runs = _common(runs, reach.possible(q0, q1))
        return _worth_leaving_out(runs, self.kv_len)

    def open(self, q0: int, q1: int, runs: Runs) -> list[bool]:
        """Which conditions may be false somewhere in ``runs``."""
        return [_common(runs, reach.certain(q0, q1)) != runs for reach in self.reach]


def _of_rows(planes: Sequence[_Plane], q0: int, q1: int, group: int) -> Iterable[Tile]:
    """The tiles of some rows, one for planes next to each other that visit nearly the same columns."""
    kv_len = planes[0].kv_len
    together: list[tuple[list[_Plane], Runs, int]] = []
    for plane in planes:
        runs = plane.columns(q0, q1)
        if together:
            others, theirs, wanted = together[-1]
            both = runs if runs == theirs else _worth_leaving_out(_joined(runs + theirs), kv_len)
            wanted += _size(runs)
            if _size(both) * (len(others) + 1) * 4 <= wanted * 5:
                together[-1] = [*others, plane], both, wanted
                continue
        together.append(([plane], runs, _size(runs)))
    for some, runs, _ in together:
        first = some[0].tile
        conditions: tuple[Expr, ...] = ()
        if runs:
            open_ = [any(of_one) for of_one in zip(*(p.open(q0, q1, runs) for p in some), strict=True)]
            conditions = tuple(itertools.compress(some[0].conditions, open_))
        for h0, h1 in _whole_groups(first.h0, some[-1].tile.h1, group):
            yield Tile(first.b0, first.b1, h0, h1, q0, q1, runs, conditions)


def _whole_groups(h0: int, h1: int, group: int) -> Iterable[tuple[int, int]]:
    """Heads ``h0:h1`` in ranges of whole groups, and what is left of groups at both ends."""
    first, last = min(-(-h0 // group) * group, h1), max(h1 // group * group, h0)
    edges = sorted({h0, first, last, h1})
    return itertools.pairwise(edges)


# --- where a condition can be true -----------------------------------------------------------------

_FLIPPED = {"<=": ">=", "<": ">", ">=": "<=", ">": "<", "==": "==", "!=": "!="}


class _Reach:
    """Bounds on where one condition can be true, and where it certainly is.

    This one knows nothing: it may be true anywhere and holds nowhere for sure.
    """

    def __init__(self, kv_len: int) -> None:
        self.kv_len = kv_len

    def possible(self, q0: int, q1: int) -> Runs:
        """Outside of these columns the condition is false for every row of ``q0:q1``."""
        return ((0, self.kv_len),)

    def certain(self, q0: int, q1: int) -> Runs:
        """Inside of these columns it is true for every one."""
        return ()

    @staticmethod
    def of(condition: Expr, whole: TileValues, blocks: Any) -> _Reach:
        form, kv_len = whole.form, whole.sizes[3]
        used = form.uses(condition)
        if condition.op in ("or", "and"):
            return _Several([_Reach.of(c, whole, blocks) for c in condition.operands], condition.op, kv_len)
        if "q" not in used:
            return _Columns(whole.tensor(condition), kv_len)
        if condition.op in COMPARISONS:
            left, right = condition.operands
            op = condition.op
            if "kv" not in form.uses(left):
                left, right, op = right, left, _FLIPPED[op]
            if "q" not in form.uses(left) and "kv" not in form.uses(right):
                return _Compared(op, whole.tensor(left), whole.tensor(right), kv_len)
        if kv_len < _LONG_ROW:
            return _Reach(kv_len)
        if any({"q", "kv"} <= variables(load.node) for load in form.loads_of(condition)):
            return _Elements(condition, whole)
        return _Blocks(blocks(condition), whole.tile, kv_len)


@functools.lru_cache(maxsize=256)
def _reach_of_indices(condition: Expr, ints: tuple[tuple[str, int], ...], sizes: Sizes, tile: Tile) -> _Reach:
    """The reach of a condition that loads nothing, the same for all layers of a model."""
    form = Form(condition, None, None, (condition,), ())
    whole = TileValues(form, {}, ints, sizes, tile, torch.float32)
    return _Remembered(_Reach.of(condition, whole, lambda c: _states(c, form, {}, ints, sizes)))


def _states(
    condition: Expr,
    form: Form,
    captures: Mapping[str, Tensor],
    ints: Sequence[tuple[str, int]],
    sizes: Sizes,
) -> Tensor:
    """The blocks of a condition by interval arithmetic, as of :func:`block_states`."""
    program = ScoreProgram(ZERO, truth(_with_loads(condition, form)))
    values = dict(ints)
    return block_states(
        [captures[name] for name in program.captures],
        [values[name] for name in program.ints],
        torch.device("cpu"),
        sizes,
        program,
    )


def _with_loads(e: Expr, form: Form) -> Expr:
    """``e`` with its loads as the program spells them."""
    return substitute(e, lambda node: form.loads[int(node.args[0][1:])].node if node.op == "load" else None)


class _Columns(_Reach):
    """A condition on the key alone."""

    def __init__(self, holds: Tensor, kv_len: int) -> None:
        super().__init__(kv_len)
        self.allowed = (holds != 0).expand(*holds.shape[:3], kv_len).flatten(0, 2)
        self.somewhere = _runs_of(self.allowed.any(0), exact=False)

    def possible(self, q0: int, q1: int) -> Runs:
        return self.somewhere

    @functools.cached_property
    def everywhere(self) -> Runs:
        return _runs_of(self.allowed.all(0), exact=True)

    def certain(self, q0: int, q1: int) -> Runs:
        return self.everywhere


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

    def possible(self, q0: int, q1: int) -> Runs:
        low, high = self._right_bounds(q0, q1)
        if self.op == "!=":
            return ((0, self.kv_len),)
        if self.op == "==":
            reached: Any = (self.left >= low) & (self.left <= high)
        else:
            reached = COMPARISONS[self.op](self.left, high if self.op in ("<", "<=") else low)
        return _runs_of(reached.flatten(0, 2).any(0), exact=False)

    def certain(self, q0: int, q1: int) -> Runs:
        low, high = self._right_bounds(q0, q1)
        if self.op == "==":
            everywhere: Any = (self.left == low) & (self.left == high)
        elif self.op == "!=":
            everywhere = (self.left < low) | (self.left > high)
        else:
            everywhere = COMPARISONS[self.op](self.left, low if self.op in ("<", "<=") else high)
        return _runs_of(everywhere.flatten(0, 2).all(0), exact=True)


class _Several(_Reach):
    """An ``and`` or an ``or``."""

    def __init__(self, parts: list[_Reach], op: str, kv_len: int) -> None:
        super().__init__(kv_len)
        self.parts, self.op = parts, op

    def possible(self, q0: int, q1: int) -> Runs:
        return self._put_together([part.possible(q0, q1) for part in self.parts])

    def certain(self, q0: int, q1: int) -> Runs:
        return self._put_together([part.certain(q0, q1) for part in self.parts])

    def _put_together(self, runs: list[Runs]) -> Runs:
        return functools.reduce(_common, runs) if self.op == "and" else _joined(itertools.chain(*runs))


class _Remembered(_Reach):
    """Another reach, asked once for each range of rows."""

    def __init__(self, reach: _Reach) -> None:
        super().__init__(reach.kv_len)
        self.possible, self.certain = functools.cache(reach.possible), functools.cache(reach.certain)  # type: ignore[method-assign]


class _Blocks(_Reach):
    """Any condition, by what interval arithmetic says of its blocks."""

    def __init__(self, states: Tensor, tile: Tile, kv_len: int) -> None:
        super().__init__(kv_len)
        self.edges = [*range(0, kv_len, BLOCK), kv_len]
        b = slice(tile.b0, tile.b1) if states.shape[0] > 1 else slice(None)
        h = slice(tile.h0, tile.h1) if states.shape[1] > 1 else slice(None)
        states = states[b, h].flatten(0, 1)
        self.somewhere, self.everywhere = (states != EMPTY).any(0), (states == FULL).all(0)

    def possible(self, q0: int, q1: int) -> Runs:
        return _stretches_of(self.somewhere[q0 // BLOCK : -(-q1 // BLOCK)].any(0), self.edges)

    def certain(self, q0: int, q1: int) -> Runs:
        return _stretches_of(self.everywhere[q0 // BLOCK : -(-q1 // BLOCK)].all(0), self.edges)


class _Elements(_Reach):
    """A condition that loads at both the query and the key: by its elements, a few rows at a time.

    Rows next to each other that all parts of the condition see alike are looked at once, and so are columns:
    those of a block, where the load is ``keep[q // 128, kv // 128]``.
    """

    def __init__(self, condition: Expr, whole: TileValues) -> None:
        super().__init__(whole.sizes[3])
        self.condition, self.whole = condition, whole
        self.rows, self.columns = self._distinct("q"), self._distinct("kv")
        self._last: tuple[tuple[int, int], Sequence[Tensor]] | None = None

    def _distinct(self, name: str) -> list[int] | None:
        """Where stretches of equal rows, or columns, begin, then the end; ``None`` where most are short."""
        changes = torch.zeros(1, dtype=torch.bool)
        for part in _parts_of(_with_loads(self.condition, self.whole.form), name):
            if part == var(name):
                return None
            value = torch.as_tensor(evaluate(part, self.whole))
            value = value[(None,) * (4 - value.dim())].movedim(INDEX_VARS.index(name), -1).flatten(0, -2)
            changes = changes | (value[:, 1:] != value[:, :-1]).any(0)
        length = self.whole.sizes[INDEX_VARS.index(name)]
        found = [0, *(changes.expand(length - 1).nonzero()[:, 0] + 1).tolist(), length]
        return found if len(found) * _QUANTUM <= length else None

    def _seen(self, q0: int, q1: int) -> Sequence[Tensor]:
        """For each stretch of columns whether the condition is true in any, and in every row."""
        if self._last is not None and self._last[0] == (q0, q1):
            return self._last[1]
        values = self.whole.on(replace(self.whole.tile, q0=q0, q1=q1))
        if self.rows is not None:
            first, end = bisect.bisect_right(self.rows, q0) - 1, bisect.bisect_left(self.rows, q1)
            values["q"] = torch.tensor(self.rows[first:end]).view(1, 1, -1, 1)
        if self.columns is not None:
            values["kv"] = torch.tensor(self.columns[:-1]).view(1, 1, 1, -1)
        holds = (values.tensor(self.condition) != 0).flatten(0, 2)
        # As bytes: of booleans the same takes 30 times as long.
        found = [holds.view(torch.uint8).amax(0).bool(), holds.view(torch.uint8).amin(0).bool()]
        self._last = (q0, q1), found
        return found

    def _runs(self, flags: Tensor, exact: bool) -> Runs:
        return _runs_of(flags, exact) if self.columns is None else _stretches_of(flags, self.columns)

    def possible(self, q0: int, q1: int) -> Runs:
        return self._runs(self._seen(q0, q1)[0], exact=False)

    def certain(self, q0: int, q1: int) -> Runs:
        return self._runs(self._seen(q0, q1)[1], exact=True)


def _parts_of(e: Expr, name: str) -> Iterable[Expr]:
    """The largest parts of ``e`` that depend on ``name``, of q and kv, alone."""
    used = variables(e) & {"q", "kv"}
    if used == {name}:
        yield e
    elif len(used) == 2:
        for operand in e.operands:
            yield from _parts_of(operand, name)
