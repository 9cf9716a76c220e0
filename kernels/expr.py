"""Scalar expressions over one attention score.

An expression is a small immutable tree.  Its leaves are the score ``s`` (the product of one query
row and one key row), the index variables ``b h q kv``, the lengths ``Sq Skv``, named integers,
constants, and loads ``name[index, ...]`` from captured tensors.  Arithmetic is that of the real
numbers; kernels carry it out in float32 and integers.  A number in a boolean place means "is not
zero"; a boolean in an arithmetic place is 0 or 1.

The text form is a Python expression (``where``, ``min``, ``max`` and the functions of ``UNARY``
are calls), so that it can be read in a printed graph and parsed back by :func:`parse`.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, Union

Number = Union[bool, int, float]

INDEX_VARS = ("b", "h", "q", "kv")
LENGTHS = ("Sq", "Skv")
UNARY: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "sqrt": math.sqrt,
    "abs": abs,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_NEGATED = {"<=": ">", "<": ">=", ">=": "<", ">": "<=", "==": "!=", "!=": "=="}
_TIGHTER = {("<", 1): "<=", (">=", 1): ">", ("<=", -1): "<", (">", -1): ">="}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": min,
    "max": max,
}


_KNOWN: dict[tuple[Any, ...], Expr] = {}
MAX_KNOWN = 1 << 16
"""Nodes that are remembered; beyond, all are forgotten."""


class Expr:
    """A node: ``op`` and its ``args`` (sub-expressions, except in the leaves).

    Leaves: ``("const", value)``, ``("var", name)`` for ``s``, index variables, lengths and named
    integers, ``("load", name, *indices)``.  Build nodes with the functions of this module, which
    simplify; compare with ``==``.
    """

    __slots__ = ("_hash", "_nodes", "_shown", "_variables", "args", "op", "operands")
    op: str
    args: tuple[Any, ...]
    operands: tuple[Expr, ...]
    """The sub-expressions (the indices, for a load)."""

    def __new__(cls, op: str, *args: Any) -> Expr:
        # Layers say the same again and again: equal nodes are one object, which keeps what is asked of it.
        # The constants True, 1 and 1.0 are different ones, and so are 0.0 and -0.0.
        key = (op, type(args[0]), repr(args[0])) if op == "const" else (op, *args)
        known = _KNOWN.get(key)
        if known is not None:
            return known
        self = super().__new__(cls)
        self.op, self.args = op, args
        self.operands = tuple([a for a in args if isinstance(a, Expr)])
        self._hash = hash(key)
        self._nodes, self._variables, self._shown = None, None, None
        if len(_KNOWN) >= MAX_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = self
        return self

    _hash: int
    _nodes: tuple[Expr, ...] | None
    _variables: frozenset[str] | None
    _shown: tuple[str, int] | None

    def __reduce__(self) -> tuple[Any, ...]:
        return Expr, (self.op, *self.args)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        # Two objects may still be equal: one may be older than the last clearing.
        return self is other or (
            isinstance(other, Expr)
            and self._hash == other._hash
            and self.op == other.op
            and (repr(self.args) == repr(other.args) if self.op == "const" else self.args == other.args)
        )

    def __str__(self) -> str:
        return _text(self)[0]

    __repr__ = __str__

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    @property
    def value(self) -> Number:
        assert self.op == "const"
        value: Number = self.args[0]
        return value


def const(value: Number) -> Expr:
    return Expr("const", value)


def var(name: str) -> Expr:
    return Expr("var", name)


def load(name: str, indices: Iterable[Expr]) -> Expr:
    return Expr("load", name, *indices)


S = var("s")
B, H, Q, KV = (var(name) for name in INDEX_VARS)
SQ, SKV = (var(name) for name in LENGTHS)
TRUE, FALSE, ZERO, ONE = const(True), const(False), const(0), const(1)


# --- arithmetic -------------------------------------------------------------------------------


def _is_zero(e: Expr) -> bool:
    return e.is_const and e.value == 0


@functools.lru_cache(maxsize=1 << 16)
def is_integral(e: Expr) -> bool:
    """True where the value is an integer by its form, so that sums may be reordered exactly.

    Captured tensors count as real: ``(s + m) - m`` is not ``s`` in floating point when ``m`` is the
    finite minimum, so real sums keep the order in which the model wrote them.
    """
    if e.op == "const":
        return isinstance(e.value, int)
    if e.op == "var":
        return e != S
    if e.op in ("+", "*", "//", "%", "min", "max", "abs"):
        return all(is_integral(a) for a in e.operands)
    return is_bool(e) or (e.op == "where" and all(is_integral(a) for a in e.args[1:]))


def collected(e: Expr) -> dict[Expr | None, Number]:
    """An integral ``e`` as a sum: atom → coefficient, ``None`` → the constant."""
    if e.is_const:
        return {None: e.value + 0}
    if e.op == "+":
        total: dict[Expr | None, Number] = {}
        for operand in e.operands:
            for atom, coefficient in collected(operand).items():
                total[atom] = total.get(atom, 0) + coefficient
        return total
    if e.op == "*" and e.args[1].is_const:
        return {e.args[0]: e.args[1].value}
    return {e: 1}


def _scaled(atom: Expr, coefficient: Number) -> Expr:
    if coefficient == 1:
        return atom
    return Expr("*", atom, const(coefficient))


def _order(atom: Expr) -> tuple[int, str]:
    """``s`` first, then index variables in their order, then everything by its text."""
    names = ("s", "kv", "q", "h", "b")
    if atom.op == "var" and atom.args[0] in names:
        return names.index(atom.args[0]), ""
    return (0 if contains(atom, S) else len(names)), str(atom)


@functools.lru_cache(maxsize=MAX_KNOWN)
def add(*operands: Expr) -> Expr:
    """The sum.  Integral sums collect like terms; real sums keep their order, left to right."""
    if all(is_integral(operand) for operand in operands):
        terms = _joined(collected(Expr("+", *operands)))
        constant = terms.pop(None, 0)
        parts = [_scaled(a, c) for a, c in sorted(terms.items(), key=lambda t: _order(t[0])) if c != 0]  # type: ignore[arg-type]
        if constant != 0 or not parts:
            parts.append(const(constant))
    else:
        # What precedes the first real term may be collected: that is how the text would be read.
        whole = tuple(itertools.takewhile(is_integral, operands))
        first, rest = (add(*whole), operands[len(whole) :]) if whole else (operands[0], operands[1:])
        flat = (*(first.operands if first.op == "+" and not is_integral(first) else (first,)), *rest)
        parts = []
        for part in flat:
            if len(parts) == 1 and parts[0].is_const and part.is_const:
                parts = [const(parts[0].value + part.value)]
            elif not _is_zero(part):
                parts.append(part)
        parts = [part for part in parts if not _is_zero(part)] or [ZERO]
        if len(parts) < len(flat):
            # What stands first now may be integral.
            return add(*parts)
    return parts[0] if len(parts) == 1 else Expr("+", *parts)


def _joined(terms: dict[Expr | None, Number]) -> dict[Expr | None, Number]:
    """``n·(x // n) + x % n`` becomes ``x``: the two digits that a reshape made of it."""
    for low in [t for t in terms if t is not None and t.op == "%" and t.args[1].is_const]:
        x, n = low.args
        high = floordiv(x, n)
        if low in terms and n.value > 0 and terms[low] and terms.get(high) == terms[low] * n.value:
            coefficient = terms.pop(low)
            del terms[high]
            for atom, c in collected(mul(x, const(coefficient))).items():
                terms[atom] = terms.get(atom, 0) + c
    return terms


def neg(a: Expr) -> Expr:
    return mul(a, const(-1))


def sub(a: Expr, b: Expr) -> Expr:
    return add(a, neg(b))


def _is_normal(value: Number) -> bool:
    """In the range where float32 loses nothing but rounding."""
    return 1e-37 < abs(value) < 3e38


@functools.lru_cache(maxsize=MAX_KNOWN)
def mul(a: Expr, b: Expr) -> Expr:
    if a.is_const and b.is_const:
        return const(a.value * b.value)
    if a.is_const:
        a, b = b, a
    if b.is_const:
        if b.value == 1:
            return a
        if is_integral(a) and is_integral(b):
            if b.value == 0:
                return ZERO
            if a.op == "+":
                return add(*(mul(operand, b) for operand in a.operands))
        if a.op == "*" and a.args[1].is_const and _is_normal(a.args[1].value * b.value):
            return mul(a.args[0], const(a.args[1].value * b.value))
    elif _order(a) > _order(b):
        a, b = b, a
    return Expr("*", a, b)


def div(a: Expr, b: Expr) -> Expr:
    """True division."""
    if b.is_const and b.value != 0 and not isinstance(b.value, bool):
        if a.is_const:
            return const(a.value / b.value)
        if _is_normal(1 / b.value):
            return mul(a, const(1 / b.value))
    return Expr("/", a, b)


def _split_multiples(a: Expr, modulus: Number) -> tuple[Expr, Expr]:
    """``a = modulus·x + y`` over the integers with every multiple of ``modulus`` in ``x``."""
    multiple, rest = [], []
    for atom, c in collected(a).items():
        if c % modulus == 0 and atom is not None:
            multiple.append(_scaled(atom, c // modulus))
        elif atom is None:
            multiple.append(const(c // modulus))
            rest.append(const(c % modulus))
        else:
            rest.append(_scaled(atom, c))
    return add(*multiple) if multiple else ZERO, add(*rest) if rest else ZERO


@functools.lru_cache(maxsize=MAX_KNOWN)
def floordiv(a: Expr, b: Expr) -> Expr:
    if b.is_const and b.value == 1:
        return a
    if is_integral(a) and b.is_const and isinstance(b.value, int) and b.value > 0:
        if a.is_const:
            return const(a.value // b.value)
        multiple, rest = _split_multiples(a, b.value)
        if not _is_zero(multiple):
            return add(multiple, floordiv(rest, b))
        if a.op == "//" and a.args[1].is_const:
            return floordiv(a.args[0], const(a.args[1].value * b.value))
        if a.op == "%" and a.args[1] == b:
            return ZERO
    return Expr("//", a, b)


@functools.lru_cache(maxsize=MAX_KNOWN)
def mod(a: Expr, b: Expr) -> Expr:
    if b.is_const and b.value == 1:
        return ZERO
    if is_integral(a) and b.is_const and isinstance(b.value, int) and b.value > 0:
        if a.is_const:
            return const(a.value % b.value)
        multiple, rest = _split_multiples(a, b.value)
        if not _is_zero(multiple):
            return mod(rest, b)
        if a.op == "%" and a.args[1] == b:
            return a
    return Expr("%", a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    return a if a == b else _fold("min", a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return a if a == b else _fold("max", a, b)


def _fold(op: str, a: Expr, b: Expr) -> Expr:
    if a.is_const and b.is_const:
        return const(_ARITHMETIC[op](a.value, b.value))
    return Expr(op, a, b)


def call(name: str, a: Expr) -> Expr:
    """A function of ``UNARY``."""
    if name not in UNARY:
        raise ValueError(f"expected one of {', '.join(UNARY)}, got {name!r}")
    if a.is_const:
        try:
            return const(UNARY[name](a.value))
        except (ValueError, OverflowError):
            return Expr(name, a)
    return Expr(name, a)


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    condition = truth(condition)
    if condition.is_const:
        return a if condition.value else b
    if a == b:
        return a
    if a == TRUE and b == FALSE:
        return condition
    if a == FALSE and b == TRUE:
        return logical_not(condition)
    return Expr("where", condition, a, b)


# --- conditions -------------------------------------------------------------------------------


def is_bool(e: Expr) -> bool:
    """True where the value can only be 0 or 1 by its form."""
    if e.op == "const":
        return isinstance(e.value, bool)
    if e.op == "where":
        return is_bool(e.args[1]) and is_bool(e.args[2])
    return e.op in COMPARISONS or e.op in ("and", "or", "not")


def truth(e: Expr) -> Expr:
    """``e`` as a condition: constants become ``True`` or ``False``, ``x != 0`` becomes ``x``."""
    if e.is_const:
        return TRUE if e.value else FALSE
    if e.op == "!=" and _is_zero(e.args[1]):
        return truth(e.args[0])
    if e.op == "where" and e.args[1].is_const and e.args[2].is_const:
        return where(e.args[0], truth(e.args[1]), truth(e.args[2]))
    return e


@functools.lru_cache(maxsize=MAX_KNOWN)
def compare(op: str, a: Expr, b: Expr) -> Expr:
    if a.is_const and b.is_const:
        return const(bool(COMPARISONS[op](a.value, b.value)))
    if is_bool(a) and b.is_const and op in ("==", "!="):
        if b.value in (0, 1):
            return a if (op == "==") == bool(b.value) else logical_not(a)
        return const(op == "!=")
    if a.op == "where" and b.is_const and a.args[1].is_const and a.args[2].is_const:
        return where(a.args[0], compare(op, a.args[1], b), compare(op, a.args[2], b))
    if is_integral(a) and is_integral(b) and not is_bool(a) and not is_bool(b):
        difference = sub(a, b)
        if difference.is_const:
            return const(bool(COMPARISONS[op](difference.value, 0)))
        a, op, b = _solved(difference, op)
        shift = int(collected(b).get(None, 0))
        if (op, shift) in _TIGHTER:
            # Over the integers `kv < q + 1` is `kv <= q`.
            op, b = _TIGHTER[op, shift], sub(b, const(shift))
    return Expr(op, a, b)


def _solved(difference: Expr, op: str) -> tuple[Expr, str, Expr]:
    """``difference op 0`` with its leading term alone on the left: ``kv - q <= 0`` → ``kv <= q``."""
    terms = collected(difference)
    lead = min((a for a in terms if a is not None), key=_order)
    coefficient = terms.pop(lead)
    rest = add(*(const(c) if a is None else _scaled(a, c) for a, c in terms.items())) if terms else ZERO
    if coefficient < 0:
        op = {"<=": ">=", "<": ">", ">=": "<=", ">": "<"}.get(op, op)
        return _scaled(lead, -coefficient), op, rest
    return _scaled(lead, coefficient), op, neg(rest)


def logical_not(a: Expr) -> Expr:
    a = truth(a)
    if a.is_const:
        return const(not a.value)
    if a.op == "not":
        inner: Expr = a.args[0]
        return inner
    if a.op in _NEGATED and (a.op in ("==", "!=") or all(is_integral(x) for x in a.operands)):
        # Not so for real operands: both `x <= y` and `x > y` are false where one is NaN.
        return compare(_NEGATED[a.op], *a.args)
    if a.op == "and":
        return logical_or(*(logical_not(x) for x in a.operands))
    if a.op == "or":
        return logical_and(*(logical_not(x) for x in a.operands))
    return Expr("not", a)


def _connective(op: str, neutral: Expr, absorbing: Expr, operands: Iterable[Expr]) -> Expr:
    parts: dict[Expr, None] = {}
    for operand in operands:
        operand = truth(operand)
        for part in operand.operands if operand.op == op else (operand,):
            if part == absorbing:
                return absorbing
            if part != neutral:
                parts[part] = None
    if any(logical_not(part) in parts for part in parts):
        return absorbing
    if not parts:
        return neutral
    return next(iter(parts)) if len(parts) == 1 else Expr(op, *parts)


def logical_and(*operands: Expr) -> Expr:
    return _connective("and", TRUE, FALSE, operands)


def logical_or(*operands: Expr) -> Expr:
    return _connective("or", FALSE, TRUE, operands)


# --- whole trees ------------------------------------------------------------------------------

MAX_REMEMBERED = 1 << 10
"""Nodes, and characters, of an expression that remembers them."""


def walk(e: Expr) -> Iterator[Expr]:
    """Every distinct node, operands before the nodes that use them."""
    return iter(_nodes(e))


def _nodes(e: Expr) -> tuple[Expr, ...]:
    if e._nodes is not None:
        return e._nodes
    seen = {node: None for operand in e.operands for node in _nodes(operand)}
    found = (*seen, e)
    if len(found) <= MAX_REMEMBERED:
        e._nodes = found
    return found


def contains(e: Expr, leaf: Expr) -> bool:
    if leaf.op == "var":
        return leaf.args[0] in _variables(e)
    return leaf in _nodes(e)


def selects(e: Expr) -> bool:
    """True for a load whose index is itself loaded."""
    return e.op == "load" and any(node.op == "load" for i in e.operands for node in walk(i))


def variables(e: Expr) -> set[str]:
    """Names of ``s``, index variables, lengths and integers that the value depends on."""
    return set(_variables(e))


def _variables(e: Expr) -> frozenset[str]:
    if e._variables is None:
        own = e.args[:1] if e.op == "var" else ()
        e._variables = frozenset(own).union(*map(_variables, e.operands))
    return e._variables


def build(op: str, args: tuple[Any, ...]) -> Expr:
    """The simplified node ``op`` over ``args``; leaves pass through."""
    if op == "const" or op == "var" or op == "load":
        return Expr(op, *args)
    if op in COMPARISONS:
        return compare(op, *args)
    if op in UNARY:
        return call(op, *args)
    return _BUILDERS[op](*args)


_BUILDERS: dict[str, Callable[..., Expr]] = {
    "+": add,
    "*": mul,
    "/": div,
    "//": floordiv,
    "%": mod,
    "min": minimum,
    "max": maximum,
    "where": where,
    "and": logical_and,
    "or": logical_or,
    "not": logical_not,
}


def substitute(e: Expr, replace: Callable[[Expr], Expr | None]) -> Expr:
    """``e`` rebuilt with every node for which ``replace`` gives an expression swapped for it."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in memo:
            new = replace(node)
            if new is None:
                new = build(node.op, tuple(visit(a) if isinstance(a, Expr) else a for a in node.args))
            memo[node] = new
        return memo[node]

    return visit(e)


# --- text -------------------------------------------------------------------------------------

_PRECEDENCE = {"where": 0, "or": 1, "and": 2, "not": 3, "+": 5, "*": 6, "/": 6, "//": 6, "%": 6}
_ATOM = 9


def _text(e: Expr) -> tuple[str, int]:
    """The text and its precedence."""
    if e._shown is not None:
        return e._shown
    shown = _spelled(e)
    if len(shown[0]) <= MAX_REMEMBERED:
        e._shown = shown
    return shown


def _spelled(e: Expr) -> tuple[str, int]:
    op, args = e.op, e.args
    if op == "const":
        value = args[0]
        if isinstance(value, float) and not math.isfinite(value):
            return ("nan" if math.isnan(value) else "inf" if value > 0 else "-inf"), _ATOM
        return repr(value), (7 if not isinstance(value, bool) and value < 0 else _ATOM)
    if op == "var":
        return args[0], _ATOM
    if op == "load":
        return f"{args[0]}[{', '.join(str(i) for i in args[1:])}]", _ATOM
    if op in UNARY or op in ("min", "max", "where"):
        return f"{op}({', '.join(str(a) for a in args)})", _ATOM
    if op == "not":
        return f"not {_wrapped(args[0], 3)}", 3
    if op in ("and", "or"):
        level = _PRECEDENCE[op]
        return f" {op} ".join(_wrapped(a, level + 1) for a in args), level
    if op in COMPARISONS:
        return f"{_wrapped(args[0], 5)} {op} {_wrapped(args[1], 5)}", 4
    if op == "+":
        # A positive term first where there is one, for reading.
        ordered = sorted(args, key=_is_negative) if is_integral(e) else list(args)
        out = _wrapped(ordered[0], 5)
        for term in ordered[1:]:
            positive = neg(term) if _is_negative(term) else term
            sign, shown = (
                (" - ", positive) if positive != term and not _is_negative(positive) else (" + ", term)
            )
            out += sign + _wrapped(shown, 6)
        return out, 5
    if op == "*" and args[1].is_const and args[1].value == -1:
        return f"-{_wrapped(args[0], 7)}", 7
    level = _PRECEDENCE[op]
    return f"{_wrapped(args[0], level)}{'*' if op == '*' else f' {op} '}{_wrapped(args[1], level + 1)}", level


def _is_negative(e: Expr) -> bool:
    """A constant below 0, or a product with one."""
    coefficient = e.args[1] if e.op == "*" else e
    return bool(coefficient.is_const and coefficient.value < 0 and _is_normal(coefficient.value))


def _wrapped(e: Expr, level: int) -> str:
    text, own = _text(e)
    return text if own >= level else f"({text})"


_BINARY_AST: dict[type, Callable[[Expr, Expr], Expr]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: div,
    ast.FloorDiv: floordiv,
    ast.Mod: mod,
}
_COMPARE_AST: dict[type, str] = {
    ast.LtE: "<=",
    ast.Lt: "<",
    ast.GtE: ">=",
    ast.Gt: ">",
    ast.Eq: "==",
    ast.NotEq: "!=",
}


def parse(text: str) -> Expr:
    """The expression that ``text`` spells.

    Raises:
        ValueError: the text is not an expression of this language.
    """
    try:
        return _from_ast(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"expected a score expression, got {text!r}: {error.msg}") from None


def _from_ast(node: ast.expr) -> Expr:
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return const(node.value)
    if isinstance(node, ast.Name):
        return const(float(node.id)) if node.id in ("inf", "nan") else var(node.id)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        index = node.slice
        items = index.elts if isinstance(index, ast.Tuple) else [index]
        return load(node.value.id, (_from_ast(item) for item in items))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY_AST:
        return _BINARY_AST[type(node.op)](_from_ast(node.left), _from_ast(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        operand = _from_ast(node.operand)
        return neg(operand) if isinstance(node.op, ast.USub) else logical_not(operand)
    if isinstance(node, ast.BoolOp):
        operands = [_from_ast(value) for value in node.values]
        return (logical_and if isinstance(node.op, ast.And) else logical_or)(*operands)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE_AST:
        return compare(_COMPARE_AST[type(node.ops[0])], _from_ast(node.left), _from_ast(node.comparators[0]))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        args = [_from_ast(a) for a in node.args]
        name = node.func.id
        if name in UNARY and len(args) == 1:
            return call(name, args[0])
        if name in ("min", "max") and len(args) >= 2:
            return reduce(minimum if name == "min" else maximum, args)
        if name == "where" and len(args) == 3:
            return where(args[0], args[1], args[2])
    raise ValueError(f"expected a score expression, got {ast.unparse(node)!r}")
