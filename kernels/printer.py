"""Expressions as Triton statements.

Captures are read through ``ptrs``, a tuple of pointers, and ``nums``, the strides that the code does not know
followed by the named integers; names are canonical (captures by position).  Integers are int32, but for
offsets that need more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels.expr import (
    COMPARISONS,
    INDEX_VARS,
    LENGTHS,
    UNARY,
    ZERO,
    Expr,
    S,
    add,
    const,
    substitute,
    variables,
)
from flashfuse.kernels.spec import ScoreProgram

_FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_FLOAT32_TINY = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class CaptureType:
    """What the generated code knows of a capture.

    ``strides`` holds per dimension ``"0"``, ``"1"``, ``"8"`` (a multiple of 8, passed divided by 8) or
    ``"n"``; the last two are run-time numbers.  ``wide``: offsets need int64.  ``padded``: the last axis,
    of keys, is dense and takes up a multiple of 8 elements in memory, and so does every row.
    """

    kind: str
    strides: str
    wide: bool
    padded: bool = False

    @property
    def num_count(self) -> int:
        return sum(code in "8n" for code in self.strides)


def capture_type(t: Tensor) -> tuple[CaptureType, tuple[int, ...]]:
    """The type of ``t`` and the strides to pass at run time."""
    kind = "bool" if t.dtype == torch.bool else "float" if t.is_floating_point() else "int"
    codes, numbers, extent = "", [], 0
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size == 1:
            stride = 0
        extent += max(size - 1, 0) * stride
        if stride in (0, 1):
            codes += str(stride)
        elif stride % 8 == 0:
            codes += "8"
            numbers.append(stride // 8)
        else:
            codes += "n"
            numbers.append(stride)
    return CaptureType(kind, codes, extent >= 2**31), tuple(numbers)


class Names:
    """Where captures, ``arrays`` and integers of a program lie in ``ptrs`` and ``nums``."""

    def __init__(
        self,
        program: ScoreProgram,
        captures: Sequence[CaptureType],
        tanh: str = "tanh",
        scatters: bool = False,
        arrays: Mapping[str, CaptureType] | None = None,
    ) -> None:
        self.tanh = tanh
        self.scatters = scatters
        self.types = {**dict(zip(program.captures, captures, strict=True)), **(arrays or {})}
        self.pointer = {name: f"ptrs[{i}]" for i, name in enumerate(self.types)}
        self.strides: dict[str, list[str]] = {}
        position = 0
        for name, kind in self.types.items():
            self.strides[name], position = stride_texts(kind, position)
        self.ints = {name: f"nums[{position + i}]" for i, name in enumerate(program.ints)}
        self.kinds = {name: kind.kind for name, kind in self.types.items()}
        self.kinds.update(dict.fromkeys(self.ints, "int"))


def stride_texts(kind: CaptureType, position: int, source: str = "nums") -> tuple[list[str], int]:
    texts = []
    for code in kind.strides:
        if code in "01":
            texts.append(code)
            continue
        texts.append(f"{source}[{position}]" + (" * 8" if code == "8" else ""))
        position += 1
    return texts, position


# --- what an expression depends on ------------------------------------------------------------


def kind_of(e: Expr, kinds: Mapping[str, str]) -> str:
    """``bool``, ``int`` or ``float``: the type in which the kernel computes ``e``."""
    op = e.op
    if op == "const":
        return "bool" if isinstance(e.value, bool) else "int" if isinstance(e.value, int) else "float"
    if op == "var":
        return "float" if e == S else kinds.get(e.args[0], "int")
    if op == "load":
        return kinds[e.args[0]]
    if op in COMPARISONS or op in ("and", "or", "not"):
        return "bool"
    if op == "/" or (op in UNARY and op != "abs"):
        return "float"
    operands = e.operands[1:] if op == "where" else e.operands
    found = {kind_of(a, kinds) for a in operands}
    if "float" in found:
        return "float"
    return "bool" if found == {"bool"} and op == "where" else "int"


def axis_of(e: Expr) -> int:
    """0: alike for all keys, 1: alike for all queries, 2: of both."""
    used = variables(e)
    return 0 if "kv" not in used else 1 if "q" not in used else 2


def _by_axis(e: Expr) -> tuple[Expr, ...]:
    """``e``, or the parts of an integer sum: what is alike for all keys, for all queries, the rest."""
    if e.op != "+" or axis_of(e) != 2:
        return (e,)
    groups: dict[int, list[Expr]] = {}
    for term in e.operands:
        groups.setdefault(axis_of(term), []).append(term)
    return tuple(add(*groups[axis]) for axis in sorted(groups)) if len(groups) > 1 else (e,)


def _is_small(e: Expr) -> bool:
    """An integer that float32 holds: positions and lengths with small factors, added up."""
    if e.is_const:
        return abs(e.value) < 2**20
    if e.op == "var":
        return e.args[0] in (*INDEX_VARS, *LENGTHS)
    if e.op == "*":
        a, b = e.operands
        return (a.is_const and abs(a.value) <= 4 and _is_small(b)) or (
            b.is_const and abs(b.value) <= 4 and _is_small(a)
        )
    return e.op == "+" and len(e.operands) <= 4 and all(_is_small(a) for a in e.operands)


def literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        # Arithmetic is float32: beyond its range a constant is infinite or zero.
        if math.isnan(value):
            return "float('nan')"
        if abs(value) > _FLOAT32_MAX:
            return "float('inf')" if value > 0 else "float('-inf')"
        if abs(value) < _FLOAT32_TINY:
            return "0.0"
    text = repr(value)
    return f"({text})" if value < 0 else text


def is_scattered(load: Expr) -> bool:
    """Of each pair of q and kv an entry of a table: the next key's does not follow in a row of its own."""
    return axis_of(load) == 2 and (is_of_distance(load) or not any(map(follows_keys, load.operands)))


def follows_keys(index: Expr) -> bool:
    """One further with each key."""

    def next_key(node: Expr) -> Expr | None:
        return add(node, const(1)) if node == Expr("var", "kv") else None

    return "kv" in variables(index) and substitute(index, next_key) == add(index, const(1))


def is_of_distance(load: Expr) -> bool:
    """The index depends on q and kv, and only by their difference."""
    return axis_of(load) == 2 and is_shifted(load)


def is_shifted(e: Expr) -> bool:
    """``e`` is the same one position further in both q and kv."""

    def further(node: Expr) -> Expr | None:
        return add(node, const(1)) if node.op == "var" and node.args[0] in ("q", "kv") else None

    return substitute(e, further) == e


# --- the printer ------------------------------------------------------------------------------


class Printer:
    """Writes an expression as Triton statements, one per distinct node."""

    def __init__(self, names: Names, variables: Mapping[str, str] | None = None) -> None:
        self.names = names
        self.variables = dict(variables or {})
        self.lines: list[str] = []
        self._memo: dict[Expr, str] = {}
        self._count = 0

    def emit(self, text: str) -> str:
        name = f"t{self._count}"
        self._count += 1
        self.lines.append(f"{name} = {text}")
        return name

    def as_kind(self, e: Expr, kind: str) -> str:
        """The text of ``e`` computed as ``kind``."""
        own = kind_of(e, self.names.kinds)
        if e.is_const:
            cast = {"bool": bool, "int": int, "float": float}[
                kind if own != "float" or kind == "bool" else "float"
            ]
            return literal(cast(e.value))
        if kind == "float" and own == "int":
            parts = _by_axis(e)
            if len(parts) > 1 and all(_is_small(p) for p in parts):
                # Exact, and a sum of a row and a column instead of a conversion of every element.
                return self.emit(" + ".join(f"({self.text(p)}).to(tl.float32)" for p in parts))
        text = self.text(e)
        if own == kind:
            return text
        if kind == "bool":
            return f"({text} != 0)"
        if kind == "float":
            return f"{text}.to(tl.float32)"
        return f"{text}.to(tl.int32)" if own == "bool" else text

    def text(self, e: Expr) -> str:
        if e.is_const:
            return literal(e.value)
        if e.op == "var":
            name = e.args[0]
            return self.variables.get(name) or self.names.ints.get(name, name)
        if e not in self._memo:
            self._memo[e] = self.emit(self._compute(e))
        return self._memo[e]

    def offset(self, indices: Sequence[Expr], strides: Sequence[str], wide: bool) -> str:
        """Terms without kv first: added to a pointer from the left, those are worked out once per row."""
        terms = []
        for index, stride in zip(indices, strides, strict=True):
            if stride == "0" or index == ZERO:
                continue
            is_float = kind_of(index, self.names.kinds) == "float"
            for part in (index,) if is_float else _by_axis(index):
                text = self.as_kind(part, "int")
                if is_float:
                    text = f"{text}.to(tl.int32)"
                if wide and not part.is_const:
                    text = f"{text}.to(tl.int64)"
                terms.append((axis_of(part), text if stride == "1" else f"({text}) * {stride}"))
        terms.sort(key=lambda term: term[0])
        groups = (" + ".join(t for _, t in group) for _, group in itertools.groupby(terms, lambda t: t[0]))
        return " + ".join(f"({group})" for group in groups) or "0"

    def _compute(self, e: Expr) -> str:
        op, args = e.op, e.args
        kind = kind_of(e, self.names.kinds)
        if op == "load":
            return self._load(e)
        if op in COMPARISONS:
            operand_kind = "float" if "float" in {kind_of(a, self.names.kinds) for a in args} else "int"
            return f"{self.as_kind(args[0], operand_kind)} {op} {self.as_kind(args[1], operand_kind)}"
        if op in ("and", "or"):
            return (" & " if op == "and" else " | ").join(f"({self.as_kind(a, 'bool')})" for a in args)
        if op == "not":
            return f"{self.as_kind(args[0], 'bool')} == 0"
        if op == "where":
            values = [self.as_kind(a, kind) for a in args[1:]]
            return f"tl.where({self.as_kind(args[0], 'bool')}, {', '.join(values)})"
        if op in UNARY:
            value = self.as_kind(args[0], kind)
            if op == "tanh":
                return f"{self.names.tanh}({value})"
            if op == "sigmoid":
                return f"sigmoid({value})"
            return f"tl.{'sqrt_rn' if op == 'sqrt' else op}({value})"
        values = [self.as_kind(a, kind) for a in args]
        if op == "+":
            # Integers may be added in any order: what is alike in a row or a column goes first.
            parts = _by_axis(e) if kind == "int" else (e,)
            return " + ".join(values if len(parts) == 1 else (f"({self.as_kind(p, kind)})" for p in parts))
        if op == "*":
            # A product of two run-time integers may be an index into more than 2^31 elements.
            widen = kind == "int" and not args[0].is_const and not args[1].is_const
            return f"{values[0]}.to(tl.int64) * {values[1]}" if widen else " * ".join(values)
        if op == "/":
            return " / ".join(values)
        if op in ("//", "%"):
            return f"{'floordiv' if op == '//' else 'mod'}_{kind}({values[0]}, {values[1]})"
        assert op in ("min", "max")
        nan = ", propagate_nan=tl.PropagateNan.ALL" if kind == "float" else ""
        return f"tl.{op}imum({values[0]}, {values[1]}{nan})"

    def _load(self, e: Expr) -> str:
        name = e.args[0]
        kind = self.names.types[name]
        strides = self.names.strides[name]
        if kind.padded:
            lead = self.offset(e.operands[:-1], strides[:-1], kind.wide)
            return f"tl.load({self.names.pointer[name]} + {lead} + in_eights(kv)).to(tl.float32)"
        offset = self.offset(e.operands, strides, kind.wide)
        if self.names.scatters and is_scattered(e):
            return f"load_scattered({self.names.pointer[name]} + {offset})"
        text = f"tl.load({self.names.pointer[name]} + {offset})"
        if kind.kind == "float":
            return f"{text}.to(tl.float32)"
        # Narrow integers would overflow in arithmetic.
        return f"{text}.to(tl.int1)" if kind.kind == "bool" else f"widened({text})"
