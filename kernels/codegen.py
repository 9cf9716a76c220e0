"""Score programs to Triton functions.

A generated function receives the score, the indices, the lengths and two tuples: ``ptrs``, one
pointer per capture, and ``nums``, the captures' strides that the signature does not know followed by
the named integers.  Names are canonical (captures by position), so sites that differ only in names
or sizes share one compiled kernel.  Indices given to a function must lie inside the sizes; the
kernels clamp them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import linecache
import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels.derivative import derivative
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
    contains,
    logical_and,
    mul,
    substitute,
    variables,
    walk,
)
from flashfuse.kernels.spec import ScoreProgram, conditions

LOG2E = 1 / math.log(2)
_FLOAT32_MAX = float(torch.finfo(torch.float32).max)
_FLOAT32_TINY = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class CaptureType:
    """What the generated code knows of a capture.

    ``strides`` holds per dimension ``"0"``, ``"1"``, ``"8"`` (a multiple of 8, passed divided by 8) or
    ``"n"``; the last two are run-time numbers.  ``wide``: offsets need int64.
    """

    kind: str
    strides: str
    wide: bool

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


@dataclass(frozen=True)
class Table:
    """The gradient of a table of distances, which tiles on one diagonal of the scores add to alike.

    Attributes:
        slope: the derivative of the score by the load; ``None`` where it is 1.
        add: adds a tile of gradients to the buffer.
        reach: what the mask says of distances alone, which may leave out a whole diagonal; or ``None``.
        reach_is_mask: the mask says nothing else.
        others: ``accumulate`` for the other loads; ``None`` where there are none.
        uses_b: the index depends on b.
    """

    slope: Any
    add: Any
    reach: Any
    reach_is_mask: bool
    others: Any
    uses_b: bool


@dataclass(frozen=True)
class Ends:
    """A score a s + t, of which t depends on q and kv only by a table of distances.

    Tables of buckets are one number beyond the farthest bucket: tiles that lie there need no loads.

    Attributes:
        capture: the position of the table, of one axis or two, of which the last is that of distances.
        of_row: the jit function that gives (low, high): the table is constant at distances kv − q up to low,
            and from high on.  It reads the indices of the table where that is so, ``triton_attention.ends``.
    """

    capture: int
    of_row: Any


@dataclass(frozen=True)
class Generated:
    """The jit functions of one program.

    Attributes:
        score: the score in natural units, or times log2(e) where ``folded``.
        sink: the sinks of rows, in natural units.
        scale: c where the score is exactly ``s*c`` with c > 0, so that no score code is needed.
        dscale: the derivative of the score by ``s`` where it is constant; else ``dscore`` is set.
        accumulate: adds the gradients of the wanted captures into their buffers.
        table: the one load among them whose index depends on q and kv only by their difference, if there is
            one: ``Table``, and what of ``accumulate`` is left without it.
        ends: how to find tiles in which the score's table is one number, if it has such a table.
        sums_rows: a wanted gradient is summed over the keys of a row, where the errors of dS add up.
        loads: ``tiles`` where the score loads something at an index of both q and kv, ``scattered`` where
            that is by ``load_scattered``, ``distances`` where it is one table of distances, else ``""``.
    """

    score: Any
    mask: Any
    sink: Any
    dscore: Any
    accumulate: Any
    table: Table | None
    ends: Ends | None
    scale: float | None
    dscale: float | None
    folded: bool
    sums_rows: bool
    loads: str


@functools.lru_cache(maxsize=1024)
def generate(
    program: ScoreProgram,
    captures: tuple[CaptureType, ...],
    grads: tuple[tuple[int, CaptureType], ...] = (),
    fold: bool = True,
    approximate: bool = False,
) -> Generated:
    """The functions of ``program`` over captures of these types.

    ``grads`` lists the captures of the score whose gradient is wanted, with the types of their buffers;
    a sink's gradient is made on the host.  Without ``fold`` the scores are as exact as float32 allows, at
    more cost: natural units, a precise tanh.  ``approximate``: what products of 16-bit numbers round away
    may be rounded away here too (the tanh of the hardware, exact to 2^-11).
    """
    tanh = "tanh_precise" if not fold else "tanh_approx" if approximate else "tanh"
    names = Names(program, captures, tanh, scatters=approximate)
    score, mask = program.score, program.mask
    scale = _plain_scale(score) if fold else None
    folded = fold and (scale is not None or is_moderate(score, names.kinds))
    slope = derivative(score, S)
    dscale = float(slope.value) if slope.is_const else None
    functions = [_score_function(_in_base_2(score) if folded else score, names)]
    functions.append(_function("mask_mod", mask, names) if mask is not None else "")
    functions.append(_function("sink_mod", program.sink, names) if program.sink is not None else "")
    functions.append(_function("dscore_mod", slope, names) if dscale is None else "")
    loads = _wanted_loads(program, grads)
    functions.append(_accumulate_function("accumulate", program, loads, names) if grads else "")
    of_distance = [load for load in loads if _is_of_distance(load.node)]
    if len(of_distance) == 1:
        functions += _table_functions(program, of_distance[0], loads, names)
    with_ends = _load_with_ends(score, names) if dscale is not None and dscale > 0 else None
    functions.append("" if with_ends is None else _ends_function(with_ends, names))
    module = load_module("\n\n".join(f for f in functions if f))
    ends = None
    if with_ends is not None:
        ends = Ends(program.captures.index(with_ends.args[0]), module.ends_of_row)
    table = None
    if len(of_distance) == 1:
        optional = (getattr(module, name, None) for name in ("table_slope", "reach_mod", "accumulate_others"))
        slope_mod, reach, others = optional
        whole = reach is not None and all(map(_is_of_distances_alone, conditions(mask)))
        uses_b = "b" in variables(of_distance[0].node)
        table = Table(slope_mod, module.table_add, reach, whole, others, uses_b)
    return Generated(
        score=module.score_mod,
        mask=getattr(module, "mask_mod", None),
        sink=getattr(module, "sink_mod", None),
        dscore=getattr(module, "dscore_mod", None),
        accumulate=getattr(module, "accumulate", None),
        table=table,
        ends=ends,
        scale=scale,
        dscale=dscale,
        folded=folded,
        loads=_loads(score, names),
        sums_rows=any(_sums_rows(score, program.captures[index]) for index, _ in grads),
    )


def _loads(score: Expr, names: Names) -> str:
    of_pairs = [node for node in walk(score) if node.op == "load" and _axis(node) == 2]
    if not of_pairs:
        return ""
    if not names.scatters or not all(map(is_scattered, of_pairs)):
        return "tiles"
    return "distances" if len(of_pairs) == 1 and _is_of_distance(of_pairs[0]) else "scattered"


def _sums_rows(score: Expr, capture: str) -> bool:
    loads = (node for node in walk(score) if node.op == "load" and node.args[0] == capture)
    return any("kv" not in variables(node) for node in loads)


def _plain_scale(score: Expr) -> float | None:
    slope = derivative(score, S)
    if slope.is_const and slope.value > 0 and score == mul(S, slope):
        return float(slope.value)
    return None


def _in_base_2(score: Expr) -> Expr:
    """The score times log2(e), with the factor at the leaves of a sum, where constants absorb it."""
    if score.op == "+":
        return Expr("+", *(_in_base_2(a) for a in score.operands))
    return mul(score, const(LOG2E))


def is_moderate(score: Expr, kinds: Mapping[str, str]) -> bool:
    """True where the score stays far from overflow for moderate ``s``, so that a factor can be folded in.

    A loaded bias may hold −inf or the finite minimum, whose product with log2(e) overflows.
    """
    for node in walk(score):
        if node.op == "const" and not abs(node.value) < 1e30:
            return False
        if node.op == "load" and kinds[node.args[0]] == "float":
            return False
        if node.op in ("/", "exp", "log", "sqrt"):
            return False
    return True


# --- functions --------------------------------------------------------------------------------

_PARAMETERS = "b, h, q, kv, Sq, Skv, ptrs, nums"
_SINK_PARAMETERS = "b, h, q, Sq, Skv, ptrs, nums"
_PREAMBLE = """\
import triton
import triton.language as tl

from flashfuse.kernels.device_math import (
    add_gradient, block_max, block_min, floordiv_float, floordiv_int, load_scattered, mod_float, mod_int,
    sigmoid, tanh, tanh_approx, tanh_precise, widened
)


"""


class Names:
    """Where the captures and integers of a program lie in ``ptrs`` and ``nums``."""

    def __init__(
        self,
        program: ScoreProgram,
        captures: Sequence[CaptureType],
        tanh: str = "tanh",
        scatters: bool = False,
    ) -> None:
        self.tanh = tanh
        self.scatters = scatters
        self.types = dict(zip(program.captures, captures, strict=True))
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


def _score_function(score: Expr, names: Names) -> str:
    text = _function("score_mod", score, names)
    if contains(score, S):
        return text
    # A score without the product still fills its tile.
    head, _, value = text.rpartition("return ")
    return f"{head}return tl.zeros_like(s) + ({value.strip()})\n"


def _function(name: str, body: Expr, names: Names) -> str:
    printer = Printer(names)
    value = printer.as_kind(body, "bool" if name in ("mask_mod", "reach_mod") else "float")
    if name == "mask_mod" and body.is_const:
        value = f"kv {'>=' if body.value else '<'} 0"
    parameters = {"mask_mod": _PARAMETERS, "reach_mod": _PARAMETERS, "sink_mod": _SINK_PARAMETERS}.get(
        name, f"s, {_PARAMETERS}"
    )
    return render(name, parameters, [*printer.lines, f"return {value}"])


def render(name: str, parameters: str, lines: Sequence[str]) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"@triton.jit\ndef {name}({parameters}):\n{body}\n"


@dataclass(frozen=True)
class _Load:
    """A load of a wanted capture: its buffer, by position, and the strides of that."""

    node: Expr
    slot: int
    strides: list[str]
    wide: bool


def _wanted_loads(program: ScoreProgram, grads: Sequence[tuple[int, CaptureType]]) -> list[_Load]:
    found = []
    position = 0
    for slot, (index, buffer) in enumerate(grads):
        strides, position = stride_texts(buffer, position, "gnums")
        capture = program.captures[index]
        nodes = (n for n in walk(program.score) if n.op == "load" and n.args[0] == capture)
        found += [_Load(node, slot, strides, buffer.wide) for node in nodes]
    return found


def is_scattered(load: Expr) -> bool:
    """Of each pair of q and kv an entry of a table: the next key's does not follow in a row of its own."""
    return _axis(load) == 2 and (_is_of_distance(load) or not any(map(_follows_keys, load.operands)))


def _follows_keys(index: Expr) -> bool:
    """One further with each key."""

    def next_key(node: Expr) -> Expr | None:
        return add(node, const(1)) if node == Expr("var", "kv") else None

    return "kv" in variables(index) and substitute(index, next_key) == add(index, const(1))


def _is_of_distance(load: Expr) -> bool:
    """The index depends on q and kv, and only by their difference."""
    return _axis(load) == 2 and _is_shifted(load)


def _is_shifted(e: Expr) -> bool:
    """``e`` is the same one position further in both q and kv."""

    def further(node: Expr) -> Expr | None:
        return add(node, const(1)) if node.op == "var" and node.args[0] in ("q", "kv") else None

    return substitute(e, further) == e


def _is_of_distances_alone(condition: Expr) -> bool:
    return _is_shifted(condition) and not any(n.op == "load" for n in walk(condition))


_GRADIENT_PARAMETERS = f"g, s, {_PARAMETERS}, gptrs, gnums"


def _accumulate_function(name: str, program: ScoreProgram, loads: Sequence[_Load], names: Names) -> str:
    """Adds ``g · d score / d load`` of a [q, kv] tile at every one of ``loads``.

    ``g`` is dL/dscore, zero where a key is not allowed or out of range.  Axes that the index does
    not depend on are summed in registers first.
    """
    printer = Printer(names)
    for load in loads:
        slope = printer.as_kind(derivative(program.score, load.node), "float")
        # A weight of 0 has no part in it, even where the derivative overflows.
        value = printer.emit("g" if slope == "1.0" else f"tl.where(g == 0.0, 0.0, g * {slope})")
        _add(load, value, printer)
    return render(name, _GRADIENT_PARAMETERS, printer.lines or ["pass"])


def _add(load: _Load, value: str, printer: Printer) -> None:
    """Write the addition of a [q, kv] tile of gradients at the index of ``load``."""
    offset = printer.offset(load.node.operands, load.strides, load.wide)
    used = set().union(*(variables(i) for i in load.node.operands))
    if "kv" not in used and "q" not in used:
        value = printer.emit(f"tl.sum(tl.sum({value}, 1), 0)")
    else:
        if "kv" not in used:
            value = printer.emit(f"tl.sum({value}, 1)[:, None]")
        elif "q" not in used:
            value = printer.emit(f"tl.sum({value}, 0)[None, :]")
        offset = f"{offset} + tl.zeros_like({value}).to(tl.int32)"
    buffer, scale = f"gptrs[{2 * load.slot}]", f"gptrs[{2 * load.slot + 1}]"
    printer.lines.append(f"add_gradient({buffer}, {scale}, {offset}, {value})")


def _table_functions(program: ScoreProgram, table: _Load, loads: Sequence[_Load], names: Names) -> list[str]:
    found = []
    slope = derivative(program.score, table.node)
    if slope != const(1):
        found.append(_function("table_slope", slope, names))
    printer = Printer(names)
    _add(table, "g", printer)
    found.append(render("table_add", _GRADIENT_PARAMETERS, printer.lines))
    reach = [c for c in conditions(program.mask) if _is_of_distances_alone(c)]
    if reach:
        found.append(_function("reach_mod", logical_and(*reach), names))
    others = [load for load in loads if load is not table]
    if others:
        found.append(_accumulate_function("accumulate_others", program, others, names))
    return found


def _load_with_ends(score: Expr, names: Names) -> Expr | None:
    """The load of which :class:`Ends` speaks, if there is one."""
    loads = [node for node in walk(score) if node.op == "load" and _axis(node) == 2]
    if len(loads) != 1 or names.types[loads[0].args[0]].kind != "float":
        return None
    load = loads[0]
    *lead, distance = load.operands
    rest = substitute(score, lambda node: const(0.0) if node == load else None)
    if len(lead) > 1 or variables(rest) & {"q", "kv"} or any(variables(i) & {"q", "kv"} for i in lead):
        return None
    return load if _is_shifted(distance) and _follows_keys(distance) else None


def _ends_function(load: Expr, names: Names) -> str:
    *lead, distance = load.operands
    printer = Printer(names, {"q": "0", "kv": "0"})
    row = printer.as_kind(lead[0], "int") if lead else "0"
    at_zero = printer.as_kind(distance, "int")
    low, high = f"tl.load(Ends + ({row}) * 2) - ({at_zero})", f"tl.load(Ends + ({row}) * 2 + 1) - ({at_zero})"
    return render("ends_of_row", "Ends, b, h, Sq, Skv, ptrs, nums", [*printer.lines, f"return {low}, {high}"])


# --- expressions ------------------------------------------------------------------------------


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


def _axis(e: Expr) -> int:
    """0: alike for all keys, 1: alike for all queries, 2: of both."""
    used = variables(e)
    return 0 if "kv" not in used else 1 if "q" not in used else 2


def _by_axis(e: Expr) -> tuple[Expr, ...]:
    """``e``, or the parts of an integer sum: what is alike for all keys, for all queries, the rest."""
    if e.op != "+" or _axis(e) != 2:
        return (e,)
    groups: dict[int, list[Expr]] = {}
    for term in e.operands:
        groups.setdefault(_axis(term), []).append(term)
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
                terms.append((_axis(part), text if stride == "1" else f"({text}) * {stride}"))
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
        offset = self.offset(e.operands, self.names.strides[name], kind.wide)
        if self.names.scatters and is_scattered(e):
            return f"load_scattered({self.names.pointer[name]} + {offset})"
        text = f"tl.load({self.names.pointer[name]} + {offset})"
        if kind.kind == "float":
            return f"{text}.to(tl.float32)"
        # Narrow integers would overflow in arithmetic.
        return f"{text}.to(tl.int1)" if kind.kind == "bool" else f"widened({text})"


# --- modules ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def load_module(source: str) -> types.ModuleType:
    """A module of jit functions with this source.

    Triton reads the source of a function through ``linecache``, which serves it from memory.
    """
    source = _PREAMBLE + source
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    name = f"flashfuse.kernels.generated_{digest}"
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType(name)
    module.__file__ = filename
    sys.modules[name] = module
    exec(compile(source, filename, "exec"), module.__dict__)
    return module
