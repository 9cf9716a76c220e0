"""Products of two tensors, however they are written, as a sum over one index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import Expr, const
from flashfuse.passes import dialect, nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index
from flashfuse.passes.nodes import Size, same, shape

SUMMED = E.var("d")
"""The index that is summed over."""


@dataclass(frozen=True)
class Product:
    """A sum over one index of two tensors: ``Σ_r a[..., r, ...] · b[..., r, ...]``.

    ``a_index`` and ``b_index`` are the indices of the operands, with ``summed`` in the place of r.
    """

    node: fx.Node
    a: fx.Node
    a_index: Index
    b: fx.Node
    b_index: Index
    summed: Expr
    length: Size


def contraction(node: fx.Node, op: Op, index: Index) -> Product | None:
    """``node[index]`` as a sum of products of two tensors, or ``None``."""
    if op.name == "einsum":
        return _einsum(node, op, index)
    if op.name == "sum":
        return _summed(node, op, index)
    a, b = op.args.get("input"), op.args.get("other")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    if nodes.tensor(a) is None or nodes.tensor(b) is None:
        return None
    a_sizes, b_sizes = shape(a), shape(b)
    if len(a_sizes) < 2 or len(b_sizes) < 2:
        return None
    batch, row, column = index[:-2], index[-2], index[-1]

    def lead(sizes: Sequence[Size]) -> Index:
        aligned = batch[len(batch) - (len(sizes) - 2) :] if len(sizes) > 2 else ()
        return tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, sizes, strict=False))

    return Product(
        node, a, (*lead(a_sizes), row, SUMMED), b, (*lead(b_sizes), SUMMED, column), SUMMED, a_sizes[-1]
    )


def _summed(node: fx.Node, op: Op, index: Index) -> Product | None:
    """``(a * b).sum(dim)``, where both run over ``dim``."""
    times = dialect.read(op.input) if isinstance(op.input, fx.Node) else None
    if times is None or times.name != "mul" or times.mutates:
        return None
    a, b = times.args.get("input"), times.args.get("other")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    examples = [nodes.tensor(n) for n in (a, b, op.input, node)]
    if any(t is None or not t.is_floating_point() for t in examples):
        return None
    sizes, dims = shape(op.input), op.args.get("dim")
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if len(dims) != 1 or not isinstance(dims[0], int):
        return None
    d = dims[0] % len(sizes)
    kept = 1 if op.get("keepdim", False) else 0
    whole = (*index[:d], SUMMED, *index[d + kept :])

    def operand_index(x: fx.Node) -> Index:
        own = shape(x)
        aligned = whole[len(whole) - len(own) :]
        return tuple(const(0) if same(n, 1) else i for n, i in zip(own, aligned, strict=True))

    a_index, b_index = operand_index(a), operand_index(b)
    if SUMMED not in a_index or SUMMED not in b_index:
        return None
    return Product(node, a, a_index, b, b_index, SUMMED, sizes[d])


def _einsum(node: fx.Node, op: Op, index: Index) -> Product | None:
    operands, equation = op.args.get("operands"), op.args.get("equation")
    if not isinstance(equation, str) or operands is None or len(operands) != 2:
        return None
    a, b = operands
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    if nodes.tensor(a) is None or nodes.tensor(b) is None:
        return None
    terms, out = _spelled_out(equation, len(shape(a)), len(shape(b)))
    if len(terms) != 2 or any(len(set(t)) != len(t) for t in (*terms, out)) or len(out) != len(index):
        return None
    summed = [c for c in dict.fromkeys(terms[0] + terms[1]) if c not in out]
    if len(summed) != 1 or not all(summed[0] in t for t in terms):
        return None
    where = dict(zip(out, index, strict=True)) | {summed[0]: SUMMED}
    sizes = dict(zip(terms[0], shape(a), strict=True))
    if not same(sizes[summed[0]], shape(b)[terms[1].index(summed[0])]):
        return None

    def operand_index(term: str, operand: fx.Node) -> Index:
        found = zip(term, shape(operand), strict=True)
        return tuple(const(0) if same(n, 1) and c in out else where[c] for c, n in found)

    a_index, b_index = operand_index(terms[0], a), operand_index(terms[1], b)
    return Product(node, a, a_index, b, b_index, SUMMED, sizes[summed[0]])


def _spelled_out(equation: str, *ranks: int) -> tuple[list[str], str]:
    """The terms and the output of an einsum with one letter per dimension, ellipses replaced."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return [], ""
    if not arrow:
        letters = "".join(terms).replace(".", "")
        out = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1)
        )
    batch = "0123456789"
    widest = 0
    for i, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        missing = rank - len(term.replace("...", ""))
        if "..." in term and 0 <= missing <= len(batch):
            widest = max(widest, missing)
            terms[i] = term.replace("...", batch[len(batch) - missing :])
        elif missing:
            return [], ""
    return terms, out.replace("...", batch[len(batch) - widest :])
