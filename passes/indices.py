"""Index-only operations: which element of its input an element of a view is.

One function serves the lift of scores and the search for the tensors behind q, k and v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.passes import nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.nodes import Size, same, shape

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift

Index = tuple[Expr, ...]


class NotLiftable(Exception):
    """Raised inside the lift where an operation has no scalar meaning; the node becomes a leaf."""


def dimension(dim: Any, rank: int) -> int:
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
    if name in ("view", "reshape", "reshape_as", "flatten", "unflatten"):
        return _reshaped(lift, index, shape(node), sizes)
    if name == "unsqueeze":
        dim = dimension(op.args["dim"], rank + 1)
        return index[:dim] + index[dim + 1 :]
    if name == "squeeze":
        dims = op.args.get("dim")
        chosen = (
            range(rank)
            if dims is None
            else [dimension(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
        )
        dropped = [d for d in chosen if same(sizes[d], 1)]
        rest = iter(index)
        return tuple(const(0) if d in dropped else next(rest) for d in range(rank))
    if name in ("transpose", "t", "mT", "T"):
        if name == "transpose":
            d0, d1 = dimension(op.args["dim0"], rank), dimension(op.args["dim1"], rank)
        elif rank == 2 or name == "mT":
            d0, d1 = rank - 2, rank - 1
        else:
            return None
        swapped = list(index)
        swapped[d0], swapped[d1] = swapped[d1], swapped[d0]
        return tuple(swapped)
    if name == "permute":
        dims = [dimension(d, rank) for d in op.args["dims"]]
        moved: list[Expr] = [const(0)] * rank
        for position, d in enumerate(dims):
            moved[d] = index[position]
        return tuple(moved)
    if name == "movedim":
        return _moved(op.args["source"], op.args["destination"], index)
    if name in ("expand", "expand_as"):
        aligned = index[len(index) - rank :]
        return tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, sizes, strict=True))
    if name == "repeat":
        aligned = index[len(index) - rank :]
        return tuple(
            const(0) if same(n, 1) else lift.simplify(E.mod(i, lift.size(n)))
            for i, n in zip(aligned, sizes, strict=True)
        )
    if name == "repeat_interleave":
        repeats, axis = op.args.get("repeats"), op.args.get("dim")
        if not isinstance(repeats, int) or axis is None:
            return None
        d = dimension(axis, rank)
        return (*index[:d], lift.simplify(E.floordiv(index[d], const(repeats))), *index[d + 1 :])
    if name in ("slice", "narrow", "select"):
        d = dimension(op.get("dim", 0), rank)
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


def _moved(source: Any, destination: Any, index: Index) -> Index | None:
    starts, ends = ([d] if isinstance(d, int) else list(d) for d in (source, destination))
    rank = len(index)
    at = dict(zip((dimension(d, rank) for d in starts), (dimension(d, rank) for d in ends), strict=True))
    rest = iter(p for p in range(rank) if p not in at.values())
    return tuple(index[at[d] if d in at else next(rest)] for d in range(rank))


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
    if any(
        not (i is None or i is Ellipsis or isinstance(i, (int, slice)) or _is_symint(i))
        or isinstance(i, bool)
        for i in items
    ):
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
        if i_end - i > 1 or j_end - j > 1:
            _check_computed(index[i:i_end])
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


def _check_computed(index: Sequence[Expr]) -> None:
    """Stored positions are not taken apart: nothing is known of their digits."""
    if any(n.op == "load" for i in index for n in E.walk(i)):
        raise NotLiftable("a reshape of what stored positions select")


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
