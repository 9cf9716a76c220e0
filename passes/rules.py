"""What each operation of the vocabulary computes, as a scalar expression.

Every rule answers for ``node[index]``, asking the lift for the elements of the node's inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.passes import dialect, nodes
from flashfuse.passes.contraction import contraction
from flashfuse.passes.dialect import Op
from flashfuse.passes.formulas import FORMULAS
from flashfuse.passes.indices import Index, NotLiftable, dimension, source_index
from flashfuse.passes.nodes import Size, same, shape, size_of
from flashfuse.passes.tables import Table

if TYPE_CHECKING:
    from flashfuse.passes.lift import Lift


@dataclass(frozen=True)
class Row:
    """A maximum over ``length`` numbers of a row of scores: one number for all keys.

    ``through``: the nodes between the scores and ``node``, which is the last of them.
    """

    node: fx.Node
    length: Size
    through: tuple[fx.Node, ...]


RULES: dict[str, Callable[[Lift, fx.Node, Op, Index], Expr]] = dict(FORMULAS)


def _rule(*names: str) -> Callable[[Callable[[Lift, fx.Node, Op, Index], Expr]], Any]:
    def register(rule: Callable[[Lift, fx.Node, Op, Index], Expr]) -> Any:
        for name in names:
            RULES[name] = rule
        return rule

    return register


@_rule(
    "contiguous", "clone", "alias", "view", "reshape", "reshape_as", "flatten", "unflatten", "unsqueeze",
    "squeeze", "transpose", "permute", "movedim", "t", "mT", "T", "expand", "expand_as", "repeat",
    "repeat_interleave", "slice", "narrow", "select",
)  # fmt: skip
def _index_only(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    moved = source_index(lift, node, op, index)
    if moved is None:
        raise NotLiftable(f"`{op.name}` with these arguments")
    return lift.element(op.input, moved)


@_rule("detach")
def _detach(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    e = lift.element(op.input, index)
    if e.op == "load" and e.args[0] in lift.rows:
        # Not the same as the row itself: their gradients do not cancel each other.
        return lift.row(dataclasses.replace(lift.rows[e.args[0]], node=node), index)
    if _is_float(node) and any(n.op == "load" or n == E.S for n in E.walk(e)):
        raise NotLiftable("detach of a tensor that may need a gradient")
    return e


@_rule("dropout")
def _dropout(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    if op.get("training", True) is not False and nodes.constant(op.get("p", 0.5)) != 0:
        raise NotLiftable("dropout")
    return lift.element(op.input, index)


def _is_float(node: fx.Node) -> bool:
    example = nodes.tensor(node)
    return example is None or example.is_floating_point()


@_rule("getitem", "index")
def _indexed(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    source = op.input
    if isinstance(source, fx.Node) and isinstance(nodes.value(source), (tuple, list)):
        pair = dialect.read(source)
        if pair is not None and pair.name == "max" and op.args["index"] == 0:
            return _of_row(lift, node, pair, index)
        return lift.element(*piece(lift, source, op.args["index"], index))
    if op.name == "getitem":
        moved = source_index(lift, node, op, index)
        if moved is not None:
            return lift.element(source, moved)
    items = op.args["index"] if op.name == "getitem" else op.args["indices"]
    items = items if isinstance(items, (tuple, list)) else (items,)
    whole: Any = None if op.name == "index" else slice(None)
    first = next((d for d, item in enumerate(items) if not _is_same(item, whole)), 0)
    return _gather(lift, source, first, items[first:], index)


def _is_same(item: Any, whole: Any) -> bool:
    return type(item) is type(whole) and item == whole


def _gather(lift: Lift, source: fx.Node, first: int, items: Sequence[Any], index: Index) -> Expr:
    """``source[:, …, i0, i1, …]``: from dimension ``first`` on integer tensors, broadcast together."""
    sizes = shape(source)
    tensors = [i for i in items if isinstance(i, fx.Node) and isinstance(nodes.value(i), torch.Tensor)]
    if len(tensors) != len(items) or first + len(items) > len(sizes):
        raise NotLiftable("indexing that mixes tensors and slices")
    if any(nodes.value(t).dtype in (torch.bool, torch.uint8) for t in tensors):
        raise NotLiftable("indexing by a mask")
    end = len(index) - (len(sizes) - first - len(items))
    before, head, tail = index[:first], index[first:end], index[end:]
    positions = []
    for t, size in zip(tensors, sizes[first:], strict=False):
        position = lift.simplify(lift.operand(t, head))
        low, high = lift.interval(position)
        if _is_data(position):
            position = _from_end(lift, position, size)
        elif low is None or low < 0:
            # A negative index would count from the end.
            raise NotLiftable("indexing by positions that are not known to be at least 0")
        elif isinstance(size, int) and (high is None or high >= size):
            raise NotLiftable("indexing by positions that are not known to be in range")
        positions.append(const(0) if same(size, 1) else position)
    return lift.element(source, (*before, *positions, *tail))


def _from_end(lift: Lift, position: Expr, size: Size) -> Expr:
    """A position of which a negative one counts from the end; PyTorch raises where it is out of range."""
    end = E.add(position, lift.size(size))
    return E.where(E.compare("<", position, const(0)), end, position)


def _is_data(e: Expr) -> bool:
    """Whether a position is read from a tensor."""
    return any(n.op == "load" for n in E.walk(e))


@_rule("embedding")
def _embedding(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    """Rows of a matrix; a position outside of it, and a negative one, is an error in PyTorch."""
    row = lift.simplify(lift.operand(op.input, index[:-1]))
    return lift.element(op.args["weight"], (row, index[-1]))


@_rule("gather", "take_along_dim", "index_select")
def _selected(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    """Elements that integers select along one dimension; ``take_along_dim`` alone takes negative ones."""
    source, sizes = op.input, shape(op.input)
    if not isinstance(op.args.get("dim"), int) or not sizes:
        raise NotLiftable(f"`{op.name}` without a dimension")
    d = dimension(op.args["dim"], len(sizes))
    place = index[d : d + 1] if op.name == "index_select" else index
    position = lift.simplify(lift.operand(op.args["index"], place))
    low, _ = lift.interval(position)
    if op.name == "take_along_dim" and (low is None or low < 0):
        position = lift.simplify(_from_end(lift, position, sizes[d]))
    at = (*index[:d], position, *index[d + 1 :])
    if op.name == "take_along_dim":
        at = tuple(const(0) if same(n, 1) else i for i, n in zip(at, sizes, strict=True))
    return lift.element(source, at)


def piece(lift: Lift, pieces: fx.Node, which: Any, index: Index) -> tuple[fx.Node, Index]:
    """Where one result of ``chunk``, ``split`` or ``unbind`` lies in the tensor that was cut.

    Raises:
        NotLiftable: an element of another tuple.
    """
    op = dialect.read(pieces)
    example = nodes.value(pieces)
    if op is None or op.name not in ("chunk", "split", "unbind") or not isinstance(which, int):
        raise NotLiftable("an element of a tuple")
    which %= len(example)
    rank = len(shape(op.input))
    d = dimension(op.get("dim", 0), rank)
    if op.name == "unbind":
        return op.input, (*index[:d], const(which), *index[d:])
    start = sum(size_of(part.shape[d]) for part in example[:which])
    return op.input, (*index[:d], E.add(index[d], lift.size(start)), *index[d + 1 :])


@_rule("cat")
def _cat(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    tensors = [t for t in op.args["tensors"] if not _is_legacy_empty(t)]
    rank = len(index)
    d = dimension(op.get("dim", 0), rank)
    if len(tensors) == 1:
        return lift.element(tensors[0], index)
    starts: list[Expr] = [const(0)]
    for t in tensors[:-1]:
        starts.append(E.add(starts[-1], lift.size(shape(t)[d])))
    for t, start in zip(tensors, starts, strict=True):
        # Read inside of one part only, that part may be stored.
        bounds = (E.compare(">=", index[d], start), E.compare("<", index[d], _end(start, lift, t, d)))
        if all(lift.simplify(bound) == E.TRUE for bound in bounds):
            return lift.element(t, (*index[:d], lift.simplify(E.sub(index[d], start)), *index[d + 1 :]))
    result: Expr | None = None
    for t, start in reversed(list(zip(tensors, starts, strict=True))):
        part = lift.element(t, (*index[:d], E.sub(index[d], start), *index[d + 1 :]))
        if any(n.op == "load" for n in E.walk(part)):
            raise NotLiftable("a concatenation of stored tensors")
        result = (
            part
            if result is None
            else E.where(E.compare(">=", index[d], _end(start, lift, t, d)), result, part)
        )
    assert result is not None
    return lift.simplify(result)


@_rule("pad")
def _pad(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    mode, value = op.get("mode", "constant"), op.get("value", 0)
    if isinstance(mode, (int, float)):
        # ``aten.constant_pad_nd`` has no mode before the value.
        mode, value = "constant", mode
    if mode != "constant":
        raise NotLiftable("a padding that repeats values")
    widths, sizes = op.args["pad"], shape(op.input)
    inside, moved = E.TRUE, list(index)
    for i in range(len(widths) // 2):
        d = len(sizes) - 1 - i
        moved[d] = E.sub(index[d], lift.number(widths[2 * i]))
        inside = E.logical_and(
            inside, E.compare(">=", moved[d], const(0)), E.compare("<", moved[d], lift.size(sizes[d]))
        )
    fill = lift.number(value)
    inside = lift.simplify(inside)
    if inside == E.FALSE:
        return fill
    e = lift.element(op.input, tuple(map(lift.simplify, moved)))
    if inside == E.TRUE:
        return e
    if any(n.op == "load" for n in E.walk(e)):
        raise NotLiftable("a padded stored tensor")
    return lift.simplify(E.where(inside, e, E.truth(fill) if E.is_bool(e) else fill))


def _end(start: Expr, lift: Lift, t: fx.Node, d: int) -> Expr:
    return E.add(start, lift.size(shape(t)[d]))


def _is_legacy_empty(node: fx.Node) -> bool:
    """An empty 1-D tensor, which ``cat`` skips whatever the other ranks are."""
    sizes = shape(node)
    return len(sizes) == 1 and same(sizes[0], 0)


# --- elementwise rules ------------------------------------------------------------------------


@_rule("add", "sub", "rsub", "mul", "div", "floordiv", "mod", "minimum", "maximum", "pow")
def _arithmetic(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    example = nodes.tensor(node)
    if example is None or example.dtype in _NARROW:
        raise NotLiftable("arithmetic that may wrap around")
    a = lift.operand(op.args["input"], index)
    if example.dtype == torch.bool:
        if op.name not in ("add", "mul", "minimum", "maximum") or op.get("alpha", 1) != 1:
            raise NotLiftable("arithmetic of conditions")
        b = lift.operand(op.args["other"], index)
        return (E.logical_or if op.name in ("add", "maximum") else E.logical_and)(a, b)
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
    if op.name == "sub" and _is_choice(b) and not a.is_const:
        # a − (0 or c) is a + (0 or −c), bit for bit: ``scores - 1e30 * mask``.
        return E.add(a, _over_choice(E.mul, b, const(-1)))
    return _over_choice(_COMBINED[op.name], a, b)


_NARROW = (torch.uint8, torch.int8, torch.int16)

_COMBINED: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": E.add,
    "sub": E.sub,
    "rsub": lambda a, b: E.sub(b, a),
    "mul": E.mul,
    "div": E.div,
    "minimum": E.minimum,
    "maximum": E.maximum,
}


def _over_choice(combine: Callable[[Expr, Expr], Expr], a: Expr, b: Expr) -> Expr:
    """``combine(a, b)``; a choice between constants stays one: ``(1 - mask) * -1e9`` is a mask."""
    for choice, other, both in ((a, b, combine), (b, a, lambda x, y: combine(y, x))):
        if _is_choice(choice) and other.is_const:
            return E.where(choice.args[0], both(choice.args[1], other), both(choice.args[2], other))
    return combine(a, b)


def _is_choice(e: Expr) -> bool:
    return e.op == "where" and e.args[1].is_const and e.args[2].is_const


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


@_rule("clamp", "clamp_min", "clamp_max")
def _clamp(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    a = lift.operand(op.input, index)
    if op.args.get("min") is not None:
        a = E.maximum(a, lift.operand(op.args["min"], index))
    if op.args.get("max") is not None:
        a = E.minimum(a, lift.operand(op.args["max"], index))
    return a


@_rule("max", "min")
def _extreme(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    other = op.args.get("dim")
    if isinstance(other, fx.Node) and isinstance(nodes.value(other), torch.Tensor):
        combine = E.maximum if op.name == "max" else E.minimum
        return combine(lift.operand(op.input, index), lift.operand(other, index))
    if op.name == "min":
        raise NotLiftable("a minimum over a dimension")
    return _of_row(lift, node, op, index)


@_rule("amax", "logsumexp")
def _of_row(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    """The maximum of a row of scores stays a number of its own: a softmax may be shifted by it."""
    dims = op.args.get("dim")
    dim = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
    source, through = op.input, [node]
    if op.name == "max":
        through += node.all_input_nodes
    while isinstance(source, fx.Node) and (above := dialect.read(source)) and above.name == "detach":
        # What is taken off has no part in the gradient, nor need it have one.
        through.append(source)
        source = above.input
    if not isinstance(dim, int) or nodes.tensor(source) is None:
        raise NotLiftable("a maximum over a dimension")
    d = dimension(dim, len(shape(source)))
    beside = index[d + 1 :] if op.get("keepdim", False) else index[d:]
    if any(E.contains(e, E.KV) for e in (*index[:d], *beside)):
        raise NotLiftable("a maximum over a dimension")
    if not E.contains(lift.element(source, (*index[:d], E.KV, *beside)), E.S):
        raise NotLiftable("a maximum over a dimension")
    return lift.row(Row(node, shape(source)[d], tuple(through)), index)


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
    return _held(node, E.where(condition, a, b))


@_rule("masked_fill")
def _masked_fill(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    a, mask, fill = (lift.operand(op.args[name], index) for name in ("input", "mask", "value"))
    return _held(node, E.where(mask, fill, a))


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
    if before is None or after is None:
        raise NotLiftable("a cast of something that is no dense tensor")
    if before.device != after.device and not _is_computed_on_cpu(lift, op.input, index):
        raise NotLiftable("a copy to another device")
    a = lift.element(op.input, index)
    if after.dtype == before.dtype:
        return a
    if after.dtype == torch.bool:
        return E.truth(E.compare("!=", a, const(0)))
    if not after.dtype.is_floating_point and before.dtype.is_floating_point:
        raise NotLiftable("a cast from floating point to integer")
    if before.dtype == torch.bool and not a.is_const:
        return E.where(a, const(1), const(0))
    return _rounded(a, after.dtype) if after.dtype.is_floating_point else a


def _is_computed_on_cpu(lift: Lift, node: fx.Node, index: Index) -> bool:
    """Whether the CPU has it from positions and tables alone, so that nothing as large need be copied."""
    probe = lift.copy()
    loads = (n.args[0] for n in E.walk(probe.element(node, index)) if n.op == "load")
    return nodes.value(node).device.type == "cpu" and all(
        isinstance(probe.scope.captures.get(name), Table) for name in loads
    )


def _held(node: fx.Node, e: Expr) -> Expr:
    """``e`` with its constants as the dtype of ``node`` holds them."""
    example = nodes.tensor(node)
    return _rounded(e, example.dtype) if example is not None and example.is_floating_point() else e


def _rounded(e: Expr, dtype: torch.dtype) -> Expr:
    """Constants as ``dtype`` holds them: float32's minimum is −inf in bfloat16."""
    if e.is_const and isinstance(e.value, float):
        return const(float(torch.tensor(e.value, dtype=torch.float64).to(dtype)))
    if e.op == "where":
        return E.where(e.args[0], _rounded(e.args[1], dtype), _rounded(e.args[2], dtype))
    return e


# --- products ---------------------------------------------------------------------------------


@_rule("matmul", "bmm", "baddbmm", "einsum", "sum")
def _product(lift: Lift, node: fx.Node, op: Op, index: Index) -> Expr:
    if any(map(_is_data, index)):
        raise NotLiftable("a product read at stored positions")
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
