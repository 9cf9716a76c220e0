"""What a graph computes from each row of a site's scores beside the softmax.

    lse_i = ln Σ_j exp(score_ij)        max_i = max_j score_ij

over the keys, and the sink where it is one more column of what is normalised.  The operator computes both on
its way, so that a ``logsumexp`` or ``amax`` of the scores that a softmax reads costs nothing and needs no
scores.  The operator's maximum has no gradient: one is only taken where ``detach`` or ``no_grad`` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Container, Iterator

import torch
from torch import fx

from flashfuse.kernels.expr import KV, const
from flashfuse.kernels.expr import contains as holds
from flashfuse.kernels.spec import AVERAGING
from flashfuse.passes import dialect, nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index
from flashfuse.passes.lift import Lift
from flashfuse.passes.nodes import Memory, same, shape
from flashfuse.passes.operands import Operand, is_view
from flashfuse.passes.region import AttentionRegion, RowResult
from flashfuse.passes.softmax import Softmax, single_dim


def row_results(
    softmax: Softmax, index: Index, end: fx.Node, lift: Lift, memory: Memory, live: Container[fx.Node]
) -> dict[RowResult, tuple[fx.Node, ...]]:
    """What follows from the scores that ``softmax`` normalises, and the nodes between.

    Args:
        index: of what is normalised, over ``b h q kv``.
        end: the product with v.  What something before it needs cannot come from the operator in its place.
    """
    if softmax.sink is not None or memory.written_after(softmax.input):
        # A term that is added to the sum is no part of what is reduced here.
        return {}
    return {
        found: through
        for found, through in _reductions(softmax, index, memory)
        if _is_whole(found, lift)
        and found.node not in memory.opaque
        and all(
            memory.position[user] > memory.position[end]
            for user in found.node.users
            if user in live and user not in softmax.parts
        )
    }


def with_results(region: AttentionRegion, of_rows: Collection[RowResult]) -> AttentionRegion:
    """``region`` with these results, where they are those of its program."""
    if region.program.dead_rows not in AVERAGING:
        return dataclasses.replace(region, row_results=tuple(of_rows))
    return without_results(region, of_rows, "it may be that of finite minima, which mask them")


def without_results(region: AttentionRegion, of_rows: Collection[RowResult], why: str) -> AttentionRegion:
    """``region`` that says why these results stay the user's own."""
    names = ", ".join(f"`{r.reduction.name}`" for r in of_rows)
    notes = (f"{names} of the scores stays as it is: {why}",) if of_rows else ()
    return dataclasses.replace(region, row_results=(), notes=(*region.notes, *notes))


def _reductions(
    softmax: Softmax, index: Index, memory: Memory
) -> Iterator[tuple[RowResult, tuple[fx.Node, ...]]]:
    pending: list[tuple[fx.Node, bool, tuple[fx.Node, ...]]] = [(x, False, ()) for x in _sources(softmax)]
    while pending:
        scores, detached, through = pending.pop()
        for user in scores.users:
            op = dialect.read(user)
            if op is None or op.mutates or op.args.get("input") is not scores:
                continue
            off = detached or user in memory.without_gradient
            if op.name == "detach" or (op.name in dialect.CASTS and _widens(scores, user)):
                pending.append((user, off or op.name == "detach", (*through, user)))
            elif op.name in ("logsumexp", "amax", "max") and single_dim(op, len(index)) == softmax.dim:
                yield from _results(user, op, off, (*through, user), index, softmax.dim)


def _results(
    node: fx.Node, op: Op, detached: bool, through: tuple[fx.Node, ...], index: Index, dim: int
) -> Iterator[tuple[RowResult, tuple[fx.Node, ...]]]:
    kept: Index = (const(0),) if op.get("keepdim", False) else ()
    at: Index = (*index[:dim], *kept, *index[dim + 1 :])
    if any(holds(e, KV) for e in at):
        return
    if op.name == "logsumexp":
        yield RowResult(node, at, "lse", node, detached), through
        return
    values = node
    if op.name == "max":
        # A pair of maxima and their places; the places are nobody else's.
        if len(node.users) != 1:
            return
        (values,) = node.users
        part = dialect.read(values)
        if part is None or part.name != "getitem" or part.args["index"] != 0:
            return
        through = (*through, values)
    if detached:
        yield RowResult(values, at, "max", node, True), through
        return
    off = [user for user in values.users if (read := dialect.read(user)) and read.name == "detach"]
    if len(off) == len(values.users):
        for user in off:
            yield RowResult(user, at, "max", node, True), (*through, user)


def _sources(softmax: Softmax) -> Iterator[fx.Node]:
    """What is normalised, also before a cast to a wider dtype."""
    node = softmax.input
    yield node
    while True:
        op = dialect.read(node)
        if op is None or op.mutates or op.name not in dialect.CASTS or not isinstance(op.input, fx.Node):
            return
        if nodes.tensor(op.input) is None or not _widens(op.input, node):
            return
        node = op.input
        yield node


def _widens(before: fx.Node, after: fx.Node) -> bool:
    old, new = nodes.value(before).dtype, nodes.value(after).dtype
    return bool(new.is_floating_point and torch.promote_types(old, new) == new)


def _is_whole(found: RowResult, lift: Lift) -> bool:
    """Whether each row has one of its own there."""
    if nodes.tensor(found.node) is None:
        return False
    rows = nodes.product(lift.bounds[name] for name in ("b", "h", "q"))
    return same(nodes.product(shape(found.node)), rows) and is_view(Operand(found.node, found.index), lift)
