"""PyTorch tensors whose elements are field elements, so that the user's own nodes can be run as they are.

A :class:`FieldTensor` says it is of the dtype that the graph works in.  PyTorch takes composite
operations apart, differentiates them and keeps track of views; what reaches :data:`RULES` are a few
dozen primitive operations, each with its meaning over a field.  Operations on ordinary tensors (masks,
positions, integers) never come here: they are evaluated for real.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flashfuse.proof.certificate import NotProvable
from flashfuse.proof.value import Draw, Value

Precision = dict[str, tuple[int, int]]
"""Mantissa and exponent bits of the narrowest dtype that each input went through."""


class _Cell:
    """What all views of one memory share: the other components, laid out as ``p`` is."""

    def __init__(self, draw: Draw, q: Tensor | None, level: Tensor | None, factor: Tensor | None) -> None:
        self.draw, self.q, self.level, self.factor = draw, q, level, factor
        self.via: Precision = {}


class FieldTensor(torch.Tensor):
    """A tensor of field elements; see the module."""

    _p: Tensor
    _cell: _Cell

    @staticmethod
    def __new__(cls, p: Tensor, cell: _Cell, dtype: torch.dtype) -> FieldTensor:
        made: FieldTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            p.size(),
            strides=p.stride(),
            storage_offset=p.storage_offset(),
            dtype=dtype,
            device=torch.device("cpu"),
        )
        made._p, made._cell = p, cell
        return made

    def __init__(self, p: Tensor, cell: _Cell, dtype: torch.dtype) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FieldTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def draw(self) -> Draw:
        return self._cell.draw

    @property
    def via(self) -> Precision:
        """How narrow each input became on its way here."""
        return self._cell.via

    @property
    def value(self) -> Value:
        """The elements."""
        cell, p = self._cell, self._p
        q, level, factor = (None if t is None else _like(t, p) for t in (cell.q, cell.level, cell.factor))
        return Value(cell.draw, p, q, level, factor=factor)

    @staticmethod
    def of(value: Value, dtype: torch.dtype, via: Precision) -> FieldTensor:
        """A tensor of its own memory."""
        p = value.p
        if p.storage_offset() or 0 in p.stride():
            p = p.clone(memory_format=torch.contiguous_format)
        others = (value.q, value.level, value.factor)
        cell = _Cell(value.draw, *(None if t is None else _laid_out(t, p) for t in others))
        cell.via = via
        return FieldTensor(p, cell, dtype)

    def write(self, value: Value, via: Precision) -> None:
        """What an in-place operation does; every view of the memory sees it."""
        cell, p = self._cell, self._p
        if value.factor is not None or cell.factor is not None:
            value = value.exponent_only()
            cell.factor = None
        if cell.q is not None:
            _like(cell.q, p).copy_(value.exponent())
        if value.level is not None or cell.level is not None:
            if cell.level is None:
                flat = p.untyped_storage().nbytes() // p.element_size()
                cell.level = torch.zeros(flat, dtype=torch.float64)
            _like(cell.level, p).copy_(torch.zeros(()) if value.level is None else value.level)
        p.copy_(value.p)
        cell.via = _merged([cell.via, via])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind == "view":
            return _view(func, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FieldTensor)]
        via = _merged(x.via for x in inputs)
        draw = inputs[0].draw
        if kind == "write":
            target = args[0]
            if not isinstance(target, FieldTensor):
                raise NotProvable(f"`{name}` writes scores into an ordinary tensor")
            result = _rule(name[:-1])(draw, *args, **kwargs)
            target.write(draw.value(result).map(lambda t: t.expand(target.shape)).rounded(target.dtype), via)
            return target
        result = _rule(name)(draw, *args, **kwargs)
        if name in _NORMALISING:
            for role, bits in via.items():
                draw.precision[role] = _narrowest(draw.precision.get(role, bits), bits)
            via = {}
        made = _wrapped(result, name, args, kwargs, via)
        if name in _SOFTMAX:
            bits = bits_of(made.dtype)
            draw.precision[SOFTMAX] = _narrowest(draw.precision.get(SOFTMAX, bits), bits)
        return made


def _like(other: Tensor, p: Tensor) -> Tensor:
    return torch.as_strided(other, p.size(), p.stride(), p.storage_offset())


def _laid_out(other: Tensor, p: Tensor) -> Tensor:
    if other.shape == p.shape and other.stride() == p.stride() and not other.storage_offset():
        return other
    return torch.empty_strided(p.size(), p.stride(), dtype=other.dtype).copy_(other)


@functools.lru_cache(maxsize=4096)
def _kind(func: Any) -> str:
    """``view``, ``write`` (in place) or ``new``, as the operator's schema says."""
    schema = func._schema
    if schema.name in ("aten::_unsafe_view", "aten::_reshape_alias"):
        return "view"
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return "write"
    if any(r.alias_info is not None for r in schema.returns):
        return "view"
    return "new"


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[0]
    assert isinstance(source, FieldTensor)
    made = func(source._p, *args[1:], **kwargs)
    return tree_map_only(Tensor, lambda p: FieldTensor(p, source._cell, source.dtype), made)


def _merged(parts: Iterable[Precision]) -> Precision:
    total: Precision = {}
    for part in parts:
        for role, bits in part.items():
            total[role] = _narrowest(total.get(role, bits), bits)
    return total


def _narrowest(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), min(a[1], b[1])


def bits_of(dtype: torch.dtype) -> tuple[int, int]:
    """Bits of the mantissa and of the exponent."""
    info = torch.finfo(dtype)
    return round(-math.log2(info.eps)), math.ceil(math.log2(math.log2(info.max))) + 1


def _wrapped(result: Any, name: str, args: Any, kwargs: Any, via: Precision) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(_wrapped(r, name, args, kwargs, via) for r in result)
    if not isinstance(result, Value):
        return result
    dtype = kwargs.get("dtype") or _dtype(name, args)
    if name == "_to_copy" and dtype is not None:
        via = {role: _narrowest(bits, bits_of(dtype)) for role, bits in via.items()}
    return FieldTensor.of(result.rounded(dtype), dtype, dict(via))


def _dtype(name: str, args: Any) -> torch.dtype:
    """The dtype of a result, by PyTorch's rules of promotion."""
    if name in _KEEPS_DTYPE:
        return args[0].dtype
    operands = [x for x in tree_leaves(args) if isinstance(x, (Tensor, float))]
    if name in ("where", "masked_fill"):
        operands = [x for x in operands if not isinstance(x, Tensor) or x.dtype != torch.bool]
    kinds = tuple((x.dtype, x.ndim > 0) if isinstance(x, Tensor) else (None, False) for x in operands)
    return _promoted(kinds)


@functools.lru_cache(maxsize=4096)
def _promoted(kinds: tuple[tuple[torch.dtype | None, bool], ...]) -> torch.dtype:
    tensors = [
        1.0 if dtype is None else torch.empty((1,) if has_dims else (), dtype=dtype)
        for dtype, has_dims in kinds
    ]
    while len(tensors) > 1:
        a, b = tensors.pop(), tensors.pop()
        ndim = max(x.ndim if isinstance(x, Tensor) else 0 for x in (a, b))
        tensors.append(torch.empty((1,) * ndim, dtype=torch.result_type(a, b)))
    found = tensors[0]
    assert isinstance(found, Tensor)
    return found.dtype


# --- rules --------------------------------------------------------------------------------------

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
_NORMALISING = {"bmm", "mm", "baddbmm", "_softmax", "_safe_softmax", "_log_softmax", "logsumexp", "exp"}
"""Where inputs become scores, and scores weights: from here on precision is the kernel's affair."""
_SOFTMAX = {"_softmax", "_safe_softmax", "_log_softmax", "logsumexp"}
SOFTMAX = "the softmax"
"""Its dtype is kept beside those of the inputs."""
_KEEPS_DTYPE = {
    "bmm", "mm", "baddbmm", "_softmax", "_safe_softmax", "_log_softmax", "logsumexp", "amax", "max", "index",
    "index_put", "slice_backward", "select_backward", "copy", "zeros_like", "ones_like", "full_like",
    "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "clamp", "clamp_min",
    "clamp_max", "masked_fill", "pow", "_softmax_backward_data", "_log_softmax_backward_data",
}  # fmt: skip


def _rule(name: str) -> Rule:
    rule = RULES.get(name)
    if rule is None:
        raise NotProvable(f"`{name}` has no meaning over a field here")
    return rule


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the meaning of operators: of ``add`` also that of ``add_``."""

    def register(run: Rule) -> Rule:
        for name in names:
            RULES[name] = run
        return run

    return register


def _value(draw: Draw, x: Any) -> Value:
    return x.value if isinstance(x, FieldTensor) else draw.value(x)


def _binary(name: str, run: Callable[[Value, Value], Any]) -> None:
    RULES[name] = lambda draw, a, b: run(_value(draw, a), _value(draw, b))


def _sum(draw: Draw, a: Any, b: Any, alpha: Any = 1) -> Value:
    second = _value(draw, b)
    return _value(draw, a) + (second if alpha == 1 else second * alpha)


RULES["add"] = _sum
RULES["sub"] = lambda draw, a, b, alpha=1: _sum(draw, a, -_value(draw, b), alpha)
RULES["rsub"] = lambda draw, a, b, alpha=1: _sum(draw, b, -_value(draw, a), alpha)
_binary("mul", Value.__mul__)
_binary("maximum", Value.maximum)
_binary("minimum", Value.minimum)
_binary("eq", Value.equals)
_binary("ne", lambda a, b: ~a.equals(b))
_binary("gt", lambda a, b: (a - b).sign() > 0)
_binary("lt", lambda a, b: (a - b).sign() < 0)
_binary("ge", lambda a, b: ((a - b).sign() >= 0) & ~_nan(a) & ~_nan(b))
_binary("le", lambda a, b: ((a - b).sign() <= 0) & ~_nan(a) & ~_nan(b))


def _nan(a: Value) -> Tensor:
    return torch.zeros((), dtype=torch.bool) if a.level is None else a.level.isnan()


@rule("div")
def _divide(draw: Draw, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise NotProvable("a rounded division of scores")
    return _value(draw, a) / _value(draw, b)


def _unary(name: str, run: Callable[[Value], Any]) -> None:
    RULES[name] = lambda draw, x: run(x.value)


_unary("neg", Value.__neg__)
_unary("reciprocal", Value.reciprocal)
_unary("exp", Value.exp)
_unary("log", Value.log)
_unary("sgn", lambda x: x.draw.value(x.sign()))
_unary("sign", lambda x: x.draw.value(x.sign()))
_unary("abs", lambda x: x * x.draw.value(x.sign()))
_unary("relu", lambda x: x.maximum(0))
_unary("square", lambda x: x * x)
_unary("isnan", _nan)
_unary("isinf", lambda x: torch.zeros(x.shape, dtype=torch.bool) if x.level is None else x.level.isinf())
for _name in ("tanh", "sigmoid", "sqrt", "erf", "sin", "cos", "log1p", "expm1", "exp2", "log2"):
    _unary(_name, functools.partial(lambda x, name: x.draw.apply(name, x), name=_name))
_unary("rsqrt", lambda x: x.draw.apply("sqrt", x).reciprocal())


@rule("pow")
def _power(draw: Draw, a: Any, b: Any) -> Value:
    if isinstance(b, Tensor) or not isinstance(a, FieldTensor):
        raise NotProvable("a power with an exponent from the scores")
    return a.value.power(b)


def _clamped(draw: Draw, x: Any, low: Any = None, high: Any = None) -> Value:
    value: Value = x.value
    if low is not None:
        value = value.maximum(_value(draw, low))
    return value if high is None else value.minimum(_value(draw, high))


RULES["clamp"] = lambda draw, x, min=None, max=None: _clamped(draw, x, min, max)
RULES["clamp_min"] = lambda draw, x, min: _clamped(draw, x, min)
RULES["clamp_max"] = lambda draw, x, max: _clamped(draw, x, None, max)


@rule("amax")
def _amax(draw: Draw, x: FieldTensor, dim: Any = (), keepdim: bool = False) -> Value:
    return x.value.amax(dim if isinstance(dim, (list, tuple)) else (dim,), keepdim)


@rule("max")
def _max(draw: Draw, x: FieldTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return x.value.amax((), False)
    top = x.value.amax((dim,), True)
    at = x.value.equals(top).long().argmax(dim, keepdim=True)
    return (top, at) if keepdim else (top.map(lambda t: t.squeeze(dim)), at.squeeze(dim))


@rule("sum")
def _total(draw: Draw, x: FieldTensor, dim: Any = (), keepdim: bool = False, dtype: Any = None) -> Value:
    return x.value.sum(dim or (), keepdim)


@rule("mean")
def _mean(draw: Draw, x: FieldTensor, dim: Any = (), keepdim: bool = False, dtype: Any = None) -> Value:
    dims = dim or range(x.ndim)
    return x.value.sum(dim or (), keepdim) / math.prod(x.shape[d] for d in dims)


# Products.


@rule("bmm", "mm")
def _product(draw: Draw, a: Any, b: Any) -> Value:
    return _value(draw, a) @ _value(draw, b)


@rule("baddbmm")
def _sum_and_product(draw: Draw, bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Value:
    product = _product(draw, a, b) * alpha
    if beta == 0:
        return product
    # A bias of −∞ times 1 is a bias of −∞, which a product of numbers at any level would not say.
    return (_value(draw, bias) if beta == 1 else _value(draw, bias) * beta) + product


# Softmax.


@rule("_softmax")
def _softmax(draw: Draw, x: FieldTensor, dim: int, half_to_float: bool) -> Value:
    return x.value.softmax(dim)


@rule("_safe_softmax")
def _safe_softmax(draw: Draw, x: FieldTensor, dim: int, dtype: Any = None) -> Value:
    return x.value.softmax(dim, dead_rows_are_zero=True)


@rule("_log_softmax")
def _log_softmax(draw: Draw, x: FieldTensor, dim: int, half_to_float: bool) -> Value:
    return x.value - x.value.log_sum_exp(dim, True)


@rule("logsumexp")
def _log_sum_exp(draw: Draw, x: FieldTensor, dim: Any, keepdim: bool = False) -> Value:
    (d,) = dim
    return x.value.log_sum_exp(d, keepdim)


@rule("_softmax_backward_data")
def _softmax_backward(draw: Draw, grad: Any, out: Any, dim: int, input_dtype: Any) -> Value:
    g, y = _value(draw, grad), _value(draw, out)
    return (g - (g * y).sum((dim,), True)) * y


@rule("_log_softmax_backward_data")
def _log_softmax_backward(draw: Draw, grad: Any, out: Any, dim: int, input_dtype: Any) -> Value:
    g = _value(draw, grad)
    return g - _value(draw, out).exp() * g.sum((dim,), True)


@rule("tanh_backward")
def _tanh_backward(draw: Draw, grad: Any, out: Any) -> Value:
    y = _value(draw, out)
    return _value(draw, grad) * (-(y * y) + 1)


@rule("sigmoid_backward")
def _sigmoid_backward(draw: Draw, grad: Any, out: Any) -> Value:
    y = _value(draw, out)
    return _value(draw, grad) * (y * (-y + 1))


# Choices.


@rule("where")
def _where(draw: Draw, condition: Tensor, a: Any, b: Any) -> Value:
    if isinstance(condition, FieldTensor):
        raise NotProvable("a condition that is a score")
    return _value(draw, a).where(condition, _value(draw, b))


@rule("masked_fill")
def _masked_fill(draw: Draw, x: Any, mask: Tensor, fill: Any) -> Value:
    return _value(draw, x).where(~mask, _value(draw, fill))


@rule("nan_to_num")
def _nan_to_num(draw: Draw, x: FieldTensor, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Value:
    return x.value.where(~_nan(x.value), 0.0 if nan is None else nan)


# Made like another tensor.


def _filled(draw: Draw, sizes: Any, fill: Any, dtype: torch.dtype) -> Any:
    if not dtype.is_floating_point:
        return torch.full(tuple(sizes), fill, dtype=dtype)
    return draw.value(float(fill)).map(lambda t: t.expand(tuple(sizes)).clone())


@rule("zeros_like", "empty_like")
def _zeros_like(draw: Draw, x: FieldTensor, dtype: Any = None, **_: Any) -> Any:
    return _filled(draw, x.shape, 0, dtype or x.dtype)


RULES["ones_like"] = lambda draw, x, dtype=None, **_: _filled(draw, x.shape, 1, dtype or x.dtype)
RULES["full_like"] = lambda draw, x, fill, dtype=None, **_: _filled(draw, x.shape, fill, dtype or x.dtype)
RULES["new_zeros"] = lambda draw, x, size, dtype=None, **_: _filled(draw, size, 0, dtype or x.dtype)
RULES["new_empty"] = RULES["new_zeros"]
RULES["new_empty_strided"] = lambda draw, x, size, stride, dtype=None, **_: _filled(
    draw, size, 0, dtype or x.dtype
)
RULES["new_ones"] = lambda draw, x, size, dtype=None, **_: _filled(draw, size, 1, dtype or x.dtype)
RULES["new_full"] = lambda draw, x, size, fill, dtype=None, **_: _filled(draw, size, fill, dtype or x.dtype)
RULES["fill"] = lambda draw, x, fill: draw.value(fill)
RULES["zero"] = lambda draw, x: draw.value(0.0)
RULES["copy"] = lambda draw, x, source, non_blocking=False: _value(draw, source)


@rule("_to_copy")
def _cast(draw: Draw, x: FieldTensor, dtype: Any = None, **_: Any) -> Any:
    dtype = dtype or x.dtype
    if dtype == torch.bool:
        return x.value.p != 0
    if not dtype.is_floating_point:
        raise NotProvable("scores cast to integers")
    return x.value.map(Tensor.clone)


# What only moves elements, or fills with 0.


def _moves(name: str) -> Rule:
    operator = getattr(torch.ops.aten, name)

    def run(draw: Draw, x: Any, *args: Any, **kwargs: Any) -> Value:
        return _value(draw, x).map(lambda t: operator(t, *args, **kwargs))

    return run


for _name in (
    "clone", "index", "_unsafe_index", "index_select", "gather", "repeat", "flip", "roll", "tril", "triu",
    "slice_backward", "select_backward", "diagonal_backward", "take", "unfold_backward", "repeat_interleave",
):  # fmt: skip
    RULES[_name] = _moves(_name)
    _KEEPS_DTYPE.add(_name)


@rule("embedding")
def _embedding(draw: Draw, weight: FieldTensor, indices: Tensor, *_: Any) -> Value:
    return weight.value.map(lambda t: t[indices])


@rule("embedding_dense_backward")
def _embedding_backward(draw: Draw, grad: FieldTensor, indices: Tensor, rows: int, *_: Any) -> Value:
    g = grad.value.map(lambda t: t.reshape(-1, grad.shape[-1]))
    nothing = Value(draw, torch.zeros((rows, grad.shape[-1]), dtype=torch.int64))
    summands = (FieldTensor.of(v, grad.dtype, grad.via) for v in (nothing, g))
    return RULES["index_add"](draw, next(summands), 0, indices.reshape(-1), next(summands))


@rule("constant_pad_nd")
def _pad(draw: Draw, x: FieldTensor, pad: Any, fill: Any = 0) -> Value:
    inside = torch.ops.aten.constant_pad_nd(torch.ones(x.shape, dtype=torch.bool), pad, False)
    moved = x.value.map(lambda t: torch.ops.aten.constant_pad_nd(t, pad, 0))
    return moved if fill == 0 else moved.where(inside, fill)


def _joined(join: Callable[..., Tensor]) -> Rule:
    def run(draw: Draw, tensors: Any, dim: int = 0) -> Value:
        values = [_value(draw, t).exponent_only().added() for t in tensors]
        q = None if any(v.q is None for v in values) else join([v.q for v in values], dim)
        level = None
        if any(v.level is not None for v in values):
            parts = [torch.zeros(v.shape).double() if v.level is None else v.level for v in values]
            level = join([t.expand(v.shape) for t, v in zip(parts, values, strict=True)], dim)
        return Value(draw, join([v.p for v in values], dim), q, level)

    return run


RULES["cat"], RULES["stack"] = _joined(torch.cat), _joined(torch.stack)


def _adds_up(name: str) -> Rule:
    """Sums of residues stay far below 2⁶³, so they are reduced once at the end."""
    operator = getattr(torch.ops.aten, name)

    def run(draw: Draw, x: Any, *args: Any, **kwargs: Any) -> Value:
        a = _value(draw, x).exponent_only()
        values = [y.value if isinstance(y, FieldTensor) else y for y in args]
        added = [a, *(y for y in values if isinstance(y, Value))]
        if any(bool((v.level.nan_to_num(0.0) != 0).any()) for v in added if v.level is not None):
            raise NotProvable(f"`{name}` of masked scores")

        def part(pick: Callable[[Value], Tensor], modulus: int) -> Tensor:
            return (
                operator(pick(a), *(pick(y) if isinstance(y, Value) else y for y in values), **kwargs)
                % modulus
            )

        has_q = a.q is not None and all(y.q is not None for y in values if isinstance(y, Value))
        q = part(lambda v: v.exponent(), draw.q) if has_q else None
        level = None
        if any(v.level is not None for v in added):
            # What NaN is added to is NaN.
            level = torch.where(part(_nans, draw.p) > 0, math.nan, 0.0).double()
        return Value(draw, part(lambda v: v.p, draw.p), q, level)

    return run


def _nans(v: Value) -> Tensor:
    return torch.zeros_like(v.p) if v.level is None else v.level.isnan().expand(v.p.shape).long()


for _name in ("cumsum", "index_put", "_index_put_impl", "index_add", "scatter_add", "scatter"):
    RULES[_name] = _adds_up(_name)
    _KEEPS_DTYPE.add(_name)
