"""Score programs to Triton functions.

A generated function receives the score, the indices, the lengths and two tuples: ``ptrs``, one
pointer per capture, and ``nums``, the captures' strides that the signature does not know followed by
the named integers.  Names are canonical (captures by position), so sites that differ only in names
or sizes share one compiled kernel.  Indices given to a function must lie inside the sizes; the
kernels clamp them, but for the functions of tables, which see to it themselves.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flashfuse.kernels.derivative import derivative
from flashfuse.kernels.expr import (
    KV,
    Expr,
    H,
    Q,
    S,
    add,
    const,
    contains,
    div,
    logical_and,
    mul,
    substitute,
    variables,
    walk,
)
from flashfuse.kernels.printer import (
    CaptureType,
    Names,
    Printer,
    axis_of,
    follows_keys,
    is_of_distance,
    is_scattered,
    is_shifted,
    stride_texts,
)
from flashfuse.kernels.spec import ScoreProgram, conditions

LOG2E = 1 / math.log(2)


class Gathered(NamedTuple):
    """A load of the score that is alike for all batch entries, gathered into an array [H or 1, Sq, Skv]."""

    load: Expr
    array: CaptureType

    @property
    def place(self) -> Expr:
        """What the kernels load instead; no capture has such a name."""
        return Expr("load", f"all {self.load}", H, Q, KV)


@dataclass(frozen=True)
class Table:
    """The gradient of a load to which many tiles add alike: those on one diagonal, or of all batch entries.

    Attributes:
        slope: the derivative of the score by the load; ``None`` where it is 1.
        add: adds a tile of gradients to the buffer.
        write: writes it there, where h, q and the key are the index and lie in rows, and nothing else adds to
            it; or ``None``.
        slot: which buffer.
        by_distance: the index depends on q and kv only by their difference; else not on b.
        uses_b: the index, or where the ends are, depends on b.
        has_ends: beyond :class:`Ends`, all distances share one element, whose gradient is a plain sum of dS.
    """

    slope: Any
    add: Any
    write: Any
    slot: int
    by_distance: bool
    uses_b: bool
    has_ends: bool


@dataclass(frozen=True)
class Ends:
    """A score a s + t, of which t depends on q and kv only by a table of distances, or is a line over kv.

    Tables of buckets are one number beyond the farthest bucket: tiles that lie there need no loads.  A line
    is a number for each row and one for each column in all tiles, if it stays moderate over the sequence.

    Attributes:
        capture: the position of the table, of one axis or two, of which the last is that of distances; of a
            line ``None``.
        values: the position of what the table's integers are indices of, if they are: one axis or two.
        axis: the one of ``values`` that they are indices of.
        of_row: the jit function that gives (low, high): the table is constant at distances kv − q up to low,
            and from high on.  It reads the indices of the table where that is so, ``triton_attention.ends``.
    """

    capture: int | None
    values: int | None
    axis: int
    of_row: Any

    @property
    def is_line(self) -> bool:
        return self.capture is None


@dataclass(frozen=True)
class Generated:
    """The jit functions of one program.

    Attributes:
        score: the score in natural units, or times log2(e) where ``folded``.
        sink: the sinks of rows, in natural units.
        scale: c where the score is exactly ``s*c`` with c > 0, so that no score code is needed.
        dscale: the derivative of the score by ``s`` where it is constant; else ``dscore`` is set.
        gather: of each load that is gathered, what loads it.
        accumulate: adds the gradients of the wanted captures into their buffers.
        tables: the loads among them that have a kernel of their own for that.
        others: ``accumulate`` for the rest; ``None`` where there are none.
        reach: what the mask says of distances alone, which may leave out a whole diagonal; or ``None``.
        reach_is_mask: the mask says nothing else.
        ends: how to find tiles in which the score's table is one number, if it has such a table.
        sums_rows: a wanted gradient is summed over the keys of a row, where the errors of dS add up.
        loads: ``tiles`` where the score loads something at an index of both q and kv, ``scattered`` where
            that is by ``load_scattered``, ``distances`` where it is one table of distances, ``buckets`` where
            that holds indices; ``line`` where ``ends`` is one, else ``""``.
        by_key: score or mask loads something for each key.
    """

    score: Any
    mask: Any
    sink: Any
    dscore: Any
    gather: tuple[Any, ...]
    accumulate: Any
    tables: tuple[Table, ...]
    others: Any
    reach: Any
    reach_is_mask: bool
    ends: Ends | None
    scale: float | None
    dscale: float | None
    folded: bool
    sums_rows: bool
    loads: str
    by_key: bool


@functools.lru_cache(maxsize=1024)
def generate(
    program: ScoreProgram,
    captures: tuple[CaptureType, ...],
    grads: tuple[tuple[int, CaptureType], ...] = (),
    gathered: tuple[Gathered, ...] = (),
    has_batch: bool = False,
    fold: bool = True,
    approximate: bool = False,
) -> Generated:
    """The functions of ``program`` over captures of these types.

    ``grads`` lists the captures of the score whose gradient is wanted, with the types of their buffers.  A
    sink's gradient is made on the host.  The arrays of what is ``gathered`` follow the captures.
    ``has_batch``: there are several batch entries.  Without ``fold`` the scores are as exact as float32
    allows, at more cost: natural units, a precise tanh.  ``approximate``: what products of 16-bit numbers
    round away may be rounded away here too (the tanh of the hardware, exact to 2^-11).
    """
    tanh = "tanh_precise" if not fold else "tanh_approx" if approximate else "tanh"
    arrays = {of.place.args[0]: of.array for of in gathered}
    names = Names(program, captures, tanh, scatters=approximate, arrays=arrays)
    score, mask = with_gathered(program.score, gathered), program.mask
    scale = _plain_scale(score) if fold else None
    folded = fold and (scale is not None or is_moderate(score, names.kinds))
    slope = derivative(score, S)
    dscale = float(slope.value) if slope.is_const else None
    functions = [_score_function(_in_base_2(score) if folded else score, names)]
    functions.append(_function("mask_mod", mask, names) if mask is not None else "")
    functions.append(_function("sink_mod", program.sink, names) if program.sink is not None else "")
    functions.append(_function("dscore_mod", slope, names) if dscale is None else "")
    functions += [_function(f"gather_{i}", of.load, names) for i, of in enumerate(gathered)]
    wanted = _wanted_loads(program, grads, gathered)
    loads = [load for load in wanted if derivative(score, load.node) != const(0)]
    functions.append(_accumulate_function("accumulate", score, loads, names) if grads else "")
    of_tables = [load for load in loads if _is_of_table(load, mask, has_batch)]
    others = [load for load in loads if load not in of_tables]
    functions.append(_accumulate_function("accumulate_others", score, others, names) if others else "")
    for i, of_table in enumerate(of_tables):
        is_alone = [load.slot for load in loads].count(of_table.slot) == 1
        functions += _table_functions(i, of_table, is_alone, score, names)
    reach = [c for c in conditions(mask) if _is_of_distances_alone(c)]
    functions.append(_function("reach_mod", logical_and(*reach), names) if reach and of_tables else "")
    may_have_ends = fold and dscale is not None and dscale > 0
    with_ends = _load_with_ends(score, names) if may_have_ends else None
    line = _slopes(score) if may_have_ends and not folded else None
    if with_ends is not None:
        functions.append(_ends_function(*with_ends, score, names))
    elif line is not None:
        functions.append(_ends_of_line(line, score, names))
    module = load_module("\n\n".join(f for f in functions if f))
    ends = None
    if with_ends is not None:
        load, place = with_ends
        values = None if place is load else program.captures.index(load.args[0])
        axis = 0 if place is load else load.operands.index(place)
        ends = Ends(program.captures.index(place.args[0]), values, axis, module.ends_of_row)
    elif line is not None:
        ends = Ends(None, None, 0, module.ends_of_row)
    tables = []
    for i, of_table in enumerate(of_tables):
        has_ends = ends is not None and ends.values is not None and of_table.node == load
        # Where the ends are may depend on the rest of the score, too.
        uses_b = "b" in variables(score if has_ends else of_table.node)
        slope_mod, add_mod, write = (
            getattr(module, f"table_{name}_{i}", None) for name in ("slope", "add", "write")
        )
        by_distance = is_of_distance(of_table.node)
        tables.append(Table(slope_mod, add_mod, write, of_table.slot, by_distance, uses_b, has_ends))
    return Generated(
        score=module.score_mod,
        mask=getattr(module, "mask_mod", None),
        sink=getattr(module, "sink_mod", None),
        dscore=getattr(module, "dscore_mod", None),
        gather=tuple(getattr(module, f"gather_{i}") for i in range(len(gathered))),
        accumulate=getattr(module, "accumulate", None),
        tables=tuple(tables),
        others=getattr(module, "accumulate_others", None),
        reach=getattr(module, "reach_mod", None),
        reach_is_mask=bool(reach) and len(reach) == len(conditions(mask)),
        ends=ends,
        scale=scale,
        dscale=dscale,
        folded=folded,
        loads=_loads(score, ends, names),
        by_key=any(n.op == "load" and axis_of(n) == 1 for e in (score, mask) if e for n in walk(e)),
        sums_rows=any(_sums_rows(program.score, program.captures[index]) for index, _ in grads),
    )


def with_gathered(score: Expr, gathered: Sequence[Gathered]) -> Expr:
    """``score`` with what is gathered loaded from where it is then."""
    places = {of.load: of.place for of in gathered}
    return substitute(score, places.get) if places else score


def _loads(score: Expr, ends: Ends | None, names: Names) -> str:
    if ends is not None and (ends.is_line or ends.values is not None):
        return "line" if ends.is_line else "buckets"
    of_pairs = loads_of_pairs(score)
    if not of_pairs:
        return ""
    if not names.scatters or not all(map(is_scattered, of_pairs)):
        return "tiles"
    return "distances" if len(of_pairs) == 1 and is_of_distance(of_pairs[0]) else "scattered"


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
    MODERATE, add_gradient, block_max, block_min, floordiv_float, floordiv_int, in_eights, load_scattered,
    mod_float, mod_int, sigmoid, tanh, tanh_approx, tanh_precise, widened
)


"""


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
    """A load of a wanted capture, as the kernels load it, and where the buffer of its gradient has it.

    ``in_rows``: the numbers of a row of keys lie side by side there, and take up whole eights.
    """

    node: Expr
    indices: tuple[Expr, ...]
    slot: int
    strides: list[str]
    wide: bool
    in_rows: bool


def _wanted_loads(
    program: ScoreProgram, grads: Sequence[tuple[int, CaptureType]], gathered: Sequence[Gathered]
) -> list[_Load]:
    places = {of.load: of.place for of in gathered}
    found = []
    position = 0
    for slot, (index, buffer) in enumerate(grads):
        strides, position = stride_texts(buffer, position, "gnums")
        capture = program.captures[index]
        nodes = [n for n in walk(program.score) if n.op == "load" and n.args[0] == capture]
        for node in nodes:
            in_rows = is_in_rows(node) and strides[-1] == "1"
            found.append(_Load(places.get(node, node), node.operands, slot, strides, buffer.wide, in_rows))
    return found


def _is_of_table(load: _Load, mask: Expr | None, has_batch: bool) -> bool:
    """Whether many tiles add to the load's gradient alike, and most of them are not left out by the mask."""
    if is_of_distance(load.node):
        return True
    used = set().union(*(variables(i) for i in load.indices))
    # Which blocks other conditions on q and kv leave out nothing tells the kernel of tables.
    is_told = all(axis_of(c) != 2 or _is_of_distances_alone(c) for c in conditions(mask))
    return has_batch and {"q", "kv"} <= used and "b" not in used and is_told


def _is_of_distances_alone(condition: Expr) -> bool:
    loads = any(n.op == "load" for n in walk(condition))
    return is_shifted(condition) and not loads and "b" not in variables(condition)


_GRADIENT_PARAMETERS = f"g, s, {_PARAMETERS}, gptrs, gnums"


def _accumulate_function(name: str, score: Expr, loads: Sequence[_Load], names: Names) -> str:
    """Adds ``g · d score / d load`` of a [q, kv] tile at every one of ``loads``.

    ``g`` is dL/dscore, zero where a key is not allowed or out of range.  Axes that the index does
    not depend on are summed in registers first.  What lies in rows is added by four, of the rows that are
    ``inside``, where the tile is WHOLE: all its keys are in range.
    """
    printer = Printer(names)
    for load in loads:
        slope = derivative(score, load.node)
        text = printer.as_kind(slope, "float")
        value = "g" if text == "1.0" else f"g * {text}"
        if contains(slope, S) or not is_moderate(slope, names.kinds):
            # A weight of 0 has no part in it, even where the derivative overflows.
            value = f"tl.where(g == 0.0, 0.0, {value})"
        value = printer.emit(value)
        inside = "inside if WHOLE else {} != 0" if load.in_rows else "{} != 0"
        _add(load, value, inside, printer)
    parameters = f"{_GRADIENT_PARAMETERS}, inside, WHOLE: tl.constexpr"
    return render(name, parameters, printer.lines or ["pass"])


def _add(load: _Load, value: str, inside: str, printer: Printer, alone: bool = False) -> None:
    """Write the addition of a [q, kv] tile of gradients at the indices of ``load``; see ``add_gradient``."""
    offset = printer.offset(load.indices, load.strides, load.wide)
    used = set().union(*(variables(i) for i in load.indices))
    if "kv" not in used and "q" not in used:
        value = printer.emit(f"tl.sum(tl.sum({value}, 1), 0)")
    else:
        if "kv" not in used:
            value = printer.emit(f"tl.sum({value}, 1)[:, None]")
        elif "q" not in used:
            value = printer.emit(f"tl.sum({value}, 0)[None, :]")
        offset = f"{offset} + tl.zeros_like({value}).to(tl.int32)"
    buffer, scale = f"gptrs[{2 * load.slot}]", f"gptrs[{2 * load.slot + 1}]"
    inside = inside.format(value)
    printer.lines.append(f"add_gradient({buffer}, {scale}, {offset}, {value}, {inside}, {alone})")


def _table_functions(i: int, load: _Load, is_alone: bool, score: Expr, names: Names) -> list[str]:
    found = []
    slope = derivative(score, load.node)
    if slope != const(1):
        found.append(_function(f"table_slope_{i}", slope, names))
    is_written = is_alone and load.in_rows and {H, Q, KV} <= set(load.indices)
    for name in ("add", "write") if is_written else ("add",):
        printer = Printer(names)
        if load.in_rows:
            # A mask of whole eights, by which the compiler sees that four numbers go together.
            inside = "(q < Sq) & (kv // 8 < (Skv + 7) // 8)"
        else:
            printer.lines += ["q = tl.minimum(q, Sq - 1)", "kv = tl.minimum(kv, Skv - 1)"]
            inside = "{} != 0"
        _add(load, "g", inside, printer, alone=name == "write")
        found.append(render(f"table_{name}_{i}", _GRADIENT_PARAMETERS, printer.lines))
    return found


def is_in_rows(load: Expr) -> bool:
    """The last axis is that of the keys, the others depend on q, not on keys, and on nothing looked up."""
    if not load.operands or load.operands[-1] != KV:
        return False
    lead = load.operands[:-1]
    used = set().union(*map(variables, lead))
    return "q" in used and "kv" not in used and not any(n.op == "load" for i in lead for n in walk(i))


def loads_of_pairs(score: Expr) -> list[Expr]:
    """What is loaded for each q and kv, but for what is loaded as an index."""
    loads = [node for node in walk(score) if node.op == "load" and axis_of(node) == 2]
    inner = {n for load in loads for i in load.operands for n in walk(i)}
    return [load for load in loads if load not in inner]


def _load_with_ends(score: Expr, names: Names) -> tuple[Expr, Expr] | None:
    """The load of which :class:`Ends` speaks, and of what is at its distance: an index of it, or itself."""
    loads = loads_of_pairs(score)
    if len(loads) != 1 or names.types[loads[0].args[0]].kind != "float":
        return None
    load = loads[0]
    of_pair = [i for i in load.operands if variables(i) & {"q", "kv"}]
    slope = derivative(score, load)
    if len(load.operands) > 2 or len(of_pair) != 1 or load in walk(slope):
        return None
    if (variables(_where_0(score, S, load)) | variables(slope)) & {"s", "q", "kv"}:
        return None
    place = load
    if of_pair[0].op == "load":
        place = of_pair[0]
        if len(place.operands) != 1 or names.types[place.args[0]].kind != "int":
            return None
    elif load.operands[-1] is not of_pair[0]:
        return None
    distance = place.operands[-1]
    return (load, place) if is_shifted(distance) and follows_keys(distance) else None


def _where_0(score: Expr, *terms: Expr) -> Expr:
    return substitute(score, lambda node: const(0.0) if node in terms else None)


def _moderate(values: Sequence[Expr], printer: Printer) -> str:
    """Whether float32 adds all of them up with others well: not NaN, infinity or what absorbs."""
    texts = (printer.as_kind(value, "float") for value in values)
    return " & ".join(f"(tl.abs({text}) < MODERATE)" for text in texts)


def _ends_function(load: Expr, place: Expr, score: Expr, names: Names) -> str:
    lead = [i for i in load.operands if not variables(i) & {"q", "kv"}]
    printer = Printer(names, {"q": "0", "kv": "0"})
    row = printer.as_kind(lead[0], "int") if lead else "0"
    at_zero = printer.as_kind(place.operands[-1], "int")
    moderate = _moderate((_where_0(score, S, load), derivative(score, load)), printer)
    lines = [
        f"moderate = {moderate}",
        f"low = tl.where(moderate, tl.load(Ends + ({row}) * 2) - ({at_zero}), -(1 << 30))",
        f"high = tl.where(moderate, tl.load(Ends + ({row}) * 2 + 1) - ({at_zero}), 1 << 30)",
        "return low, high",
    ]
    return render("ends_of_row", "Ends, b, h, Sq, Skv, ptrs, nums", [*printer.lines, *lines])


def _slopes(score: Expr) -> tuple[Expr, Expr] | None:
    """m and n where the score is m·kv + n·q + f(s), both alike for all q and kv; ``None`` where m is 0."""
    m, n = _slope(score, "kv"), _slope(score, "q")
    if m is None or n is None or m == const(0) or (variables(m) | variables(n)) & {"s", "q", "kv"}:
        return None
    return m, n


def _slope(e: Expr, name: str) -> Expr | None:
    """The derivative by a variable of what is of first degree in it, ``None`` of anything else."""
    if name not in variables(e):
        return const(0)
    if e.op == "var":
        return const(1)
    if e.op == "+":
        found = [m for m in (_slope(term, name) for term in e.operands) if m is not None]
        return add(*found) if len(found) == len(e.operands) else None
    if e.op in ("*", "/"):
        a, b = e.operands
        if e.op == "*" and name in variables(b):
            a, b = b, a
        slope = None if name in variables(b) else _slope(a, name)
        return None if slope is None else mul(slope, b) if e.op == "*" else div(slope, b)
    return None


def _ends_of_line(slopes: tuple[Expr, Expr], score: Expr, names: Names) -> str:
    """All tiles lie in the first end, or none in any."""
    printer = Printer(names)
    q, kv, q_len, kv_len = (Expr("var", name) for name in ("q", "kv", "Sq", "Skv"))
    over_all = [mul(m, Expr("max", q_len, kv_len)) for m in slopes]
    moderate = _moderate((*over_all, _where_0(score, S, q, kv)), printer)
    every = [*printer.lines, f"return tl.where({moderate}, 1 << 30, -(1 << 30)), 1 << 30"]
    return render("ends_of_row", "Ends, b, h, Sq, Skv, ptrs, nums", every)


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
