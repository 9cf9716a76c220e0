"""What looks like attention and is not read as a site: so that the report can say so."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from flashfuse.kernels.spec import Reason
from flashfuse.passes import dialect, nodes
from flashfuse.passes.inline import is_whole
from flashfuse.passes.nodes import shape
from flashfuse.passes.region import NearMiss
from flashfuse.passes.softmax import read_softmax

_WHOLE = Reason(
    "whole_module",
    "this call holds attention and could not be taken apart exactly",
    hint="capture the model with torch.export and rewrite that graph",
)


def near_misses(graph: fx.Graph, live: set[fx.Node], claimed: set[fx.Node]) -> Iterator[NearMiss]:
    """Softmaxes of a product of two activations whose weights meet no product we can follow.

    Args:
        claimed: softmaxes that were read already.
    """
    for node in graph.nodes:
        if is_whole(node) and node in live:
            yield NearMiss(node.name, node, (_WHOLE,), nodes.source(node))
        if node in claimed or node not in live:
            continue
        softmax = read_softmax(node)
        if softmax is None or not scores_like(softmax.input):
            continue
        user = next((u for u in node.users if u in live), None)
        where = f"through `{user.name}`" if user is not None else "nowhere"
        yield NearMiss(
            node.name,
            node,
            (
                Reason(
                    "weights_path",
                    f"the softmax of a product of two tensors goes {where}, not to a product with v",
                    nodes.source(user) if user is not None else "",
                    "apply only dropout, casts and reshapes to the weights before the product with v",
                ),
            ),
            nodes.source(node),
        )


def scores_like(scores: fx.Node) -> bool:
    """Whether ``scores`` come, row by row, from a product of two activations.

    A product with a parameter, or with a matrix that the whole batch shares, is a projection: what a
    classifier or a router of experts normalises.
    """
    pending, seen = [scores], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        op = dialect.read(node)
        if op is not None and op.name in dialect.PRODUCTS:
            operands = [n for n in node.all_input_nodes if n is not op.args.get("bias")]
            ranks = {nodes.folded_rank(n) for n in operands if nodes.tensor(n) is not None}
            einsum = op.name == "einsum" and min(ranks, default=0) > 2
            return (einsum or len(ranks) == 1) and not any(nodes.is_parameter(n) for n in operands)
        inputs = [n for n in node.all_input_nodes if nodes.tensor(n) is not None]
        row_by_row = op is not None and op.name in _ROW_BY_ROW
        if len(inputs) == 1 and nodes.tensor(node) is not None:
            row_by_row = row_by_row or shape(node) == shape(inputs[0])
        pending += inputs if row_by_row else []
    return False


_ROW_BY_ROW = (
    dialect.ARITHMETIC
    | dialect.CASTS
    | dialect.VIEWS
    | {"masked_fill", "where", "clamp", "tanh", "cat", "getitem", "clone", "contiguous"}
)
