"""What looks like attention and is not read as a site: so that the report can say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from flashfuse.kernels.spec import Reason
from flashfuse.passes import dialect, nodes
from flashfuse.passes.inline import is_whole
from flashfuse.passes.nodes import shape
from flashfuse.passes.region import NearMiss
from flashfuse.passes.softmax import Softmax, read_softmax

_WHOLE = Reason(
    "whole_module",
    "this call holds attention and could not be taken apart exactly",
    hint="capture the model with torch.export and rewrite that graph",
)


_LINEAR = Reason(
    "linear_attention",
    "not softmax attention: the softmaxes run over features, and no matrix of queries by keys is made",
)


def near_misses(graph: fx.Graph, live: set[fx.Node], claimed: set[fx.Node]) -> Iterator[NearMiss]:
    """Softmaxes of a product of two activations whose weights meet no product we can follow.

    Args:
        claimed: softmaxes that were read already.
    """
    for node in graph.nodes:
        if is_whole(node) and node in live:
            yield NearMiss(node.name, node, (_WHOLE,), nodes.source(node))
        if node in live and _is_linear_attention(node):
            yield NearMiss(node.name, node, (_LINEAR,), nodes.source(node))
        if node in claimed or node not in live:
            continue
        softmax = read_softmax(node)
        if softmax is None:
            continue
        reason: Reason | None
        if scores_like(softmax.input):
            reason = _without_a_product(node, live)
        else:
            reason = _with_a_detour(softmax, live)
        if reason is not None:
            yield NearMiss(node.name, node, (reason,), nodes.source(node))


def _without_a_product(softmax: fx.Node, live: set[fx.Node]) -> Reason:
    """Why the weights that ``softmax`` makes meet no product with v."""
    total = _combination(softmax, live)
    if total is not None:
        return Reason(
            "weights_combined",
            f"`{total.name}` adds up the weights of softmaxes before the product with v; taken apart, large "
            "values that cancel there would be rounded first",
            nodes.source(total),
            "where that does not matter, write (P1 - c*P2) @ v as P1 @ v - c*(P2 @ v)",
        )
    user = next((u for u in softmax.users if u in live), None)
    if user is not None and _target(user) in _CHOICES:
        return Reason(
            "weights_path",
            f"`{user.name}` chooses among the weights of a row: what meets v is the choice, not the weights",
            nodes.source(user),
        )
    where = f"through `{user.name}`" if user is not None else "nowhere"
    return Reason(
        "weights_path",
        f"the softmax of a product of two tensors goes {where}, not to a product with v",
        nodes.source(user) if user is not None else "",
        "apply only dropout, casts and reshapes to the weights before the product with v",
    )


def _with_a_detour(softmax: Softmax, live: set[fx.Node]) -> Reason | None:
    """The operation that hides a product above or below ``softmax``; ``None`` where one of them is not there.

    Banded attention, for one, cuts its products into pieces and lays them side by side.
    """
    above = _until_products([softmax.input], _tensors)
    below = _until_products([u for u in softmax.output.users if u in live], lambda n: list(n.users))
    if above is None or below is None or not any(_tensors(n) == n.all_input_nodes for n in above[1]):
        return None
    strange = [
        n for n in (*above[0], *below[0]) if (op := dialect.read(n)) is None or op.name not in _ROW_BY_ROW
    ]
    if not strange:
        return None
    if _target(strange[0]) in _MADE_EMPTY:
        return Reason(
            "weights_path",
            f"scores or weights are written in pieces into `{strange[0].name}`, as those of banded attention "
            "are: a row is more than one product, or a part of one",
            nodes.source(strange[0]),
            "compute the scores of a row by one product, and mask what it does not attend to",
        )
    return Reason(
        "weights_path",
        f"`{strange[0].name}` between a product of two tensors, a softmax and a product with v is not read",
        nodes.source(strange[0]),
        "compute the scores of a row by one product, and mask what it does not attend to",
    )


def _until_products(
    start: list[fx.Node], step: Callable[[fx.Node], list[fx.Node]]
) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The nodes on the way to products and these, past anything but layers; ``None`` without a product."""
    passed, products, pending, seen = [], [], list(start), set(start)
    while pending:
        node = pending.pop(0)
        op = dialect.read(node)
        if op is not None and op.name in dialect.PRODUCTS:
            products.append(node)
        elif _target(node) not in _LAYERS and read_softmax(node) is None:
            passed.append(node)
            new = [n for n in step(node) if n not in seen]
            seen.update(new)
            pending += new
    return (passed, products) if products else None


_LAYERS = (
    "linear", "conv1d", "conv2d", "conv3d", "convolution", "addmm", "layer_norm", "rms_norm", "batch_norm",
    "group_norm", "embedding", "topk", "sort", "argsort", "argmax", "scaled_dot_product_attention",
)  # fmt: skip

_SCALED = dialect.VIEWS | dialect.CASTS | {"mul", "div", "neg", "getitem", "dropout", "contiguous", "clone"}


def _combination(softmax: fx.Node, live: set[fx.Node]) -> fx.Node | None:
    """The sum or difference of weights that ``softmax``, scaled or in part, goes into."""
    pending, seen = [softmax], {softmax}
    while pending:
        for user in pending.pop().users:
            op = dialect.read(user)
            if op is None or user not in live or user in seen:
                continue
            seen.add(user)
            if op.name in ("add", "sub"):
                terms = [x for x in (op.args.get("input"), op.args.get("other")) if isinstance(x, fx.Node)]
                if len(terms) == 2 and all(_are_weights(x) for x in terms):
                    return user
            elif op.name in _SCALED:
                pending.append(user)
    return None


def _are_weights(node: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        x = pending.pop()
        softmax = read_softmax(x)
        if softmax is not None:
            return scores_like(softmax.input)
        op = dialect.read(x)
        if op is not None and op.name in _SCALED:
            new = [n for n in x.all_input_nodes if n not in seen]
            seen.update(new)
            pending += new
    return False


def side_by_side(scores: fx.Node) -> fx.Node | None:
    """The concatenation of several products that ``scores`` are made of, row by row."""
    for node in _above(scores):
        op = dialect.read(node)
        if op is not None and op.name == "cat":
            parts = [t for t in op.args["tensors"] if isinstance(t, fx.Node)]
            if sum(any(_is_product(n) for n in _above(t)) for t in parts) > 1:
                return node
    return None


def _is_product(node: fx.Node) -> bool:
    op = dialect.read(node)
    return op is not None and op.name in dialect.PRODUCTS


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


def _is_linear_attention(node: fx.Node) -> bool:
    """``softmax(q) @ (softmax(k).T @ v)``, whatever else is done row by row."""
    op = dialect.read(node)
    if op is None or op.name not in dialect.PRODUCTS:
        return False
    operands = _tensors(node)
    for a, b in (operands, operands[::-1]) if len(operands) == 2 else ():
        inner = _unscaled(b)
        inner_op = dialect.read(inner)
        if inner_op is not None and inner_op.name in dialect.PRODUCTS and _normalises_features(a):
            return any(_normalises_features(n) for n in _tensors(inner))
    return False


def _normalises_features(node: fx.Node) -> bool:
    softmax = read_softmax(_unscaled(node))
    return softmax is not None and not scores_like(softmax.input)


def _unscaled(node: fx.Node) -> fx.Node:
    """What ``node`` is a view or a multiple of."""
    while True:
        op, inputs = dialect.read(node), _tensors(node)
        if op is None or len(inputs) != 1 or read_softmax(node) is not None:
            return node
        if op.name not in dialect.VIEWS | dialect.CASTS | {"mul", "div", "contiguous", "dropout"}:
            return node
        node = inputs[0]


def why_not_a_product(scores: fx.Node) -> Reason | None:
    """What stands in the place of the product of q and k, where it compares rows in another way.

    ``None`` where nothing of it looks like attention.
    """
    for node in _above(scores):
        op = dialect.read(node)
        if _target(node) == "cdist" or (_reduces(node, op) and _pairs_rows(node)):
            message = (
                f"the score is made of pairs of rows by `{node.name}`, which is not a product of q and k"
            )
            return Reason("pairwise_score", message, nodes.source(node))
        product = op is not None and op.name in dialect.PRODUCTS
        if (product or _target(node) in _MIXES) and any(scores_like(n) for n in _tensors(node)):
            message = f"`{node.name}` mixes scores of several heads or positions before the softmax"
            return Reason("scores_mixed", message, nodes.source(node))
    return None


_MIXES = ("linear", "conv1d", "conv2d", "conv3d")
_MADE_EMPTY = ("new_zeros", "new_empty", "new_full", "zeros", "empty", "full", "zeros_like", "empty_like")
_CHOICES = ("max", "argmax", "topk", "multinomial")
_REDUCTIONS = ("sum", "mean", "norm", "vector_norm", "linalg_vector_norm", "linear")


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target._schema.name.rpartition("::")[2]
    return (target if isinstance(target, str) else getattr(target, "__name__", "")).strip("_")


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if nodes.tensor(n) is not None and not nodes.is_parameter(n)]


def _reduces(node: fx.Node, op: dialect.Op | None) -> bool:
    return (op is not None and op.name in _REDUCTIONS) or _target(node) in _REDUCTIONS


def _above(scores: fx.Node) -> Iterator[fx.Node]:
    """``scores`` and the nodes above it, up to those that are not row by row."""
    pending, seen = [scores], {scores}
    while pending:
        node = pending.pop()
        yield node
        op = dialect.read(node)
        inputs = _tensors(node)
        same_shape = len(inputs) == 1 and nodes.tensor(node) is not None and shape(node) == shape(inputs[0])
        if same_shape or (op is not None and op.name in _ROW_BY_ROW):
            new = [n for n in inputs if n not in seen]
            seen.update(new)
            pending += new


def _pairs_rows(node: fx.Node) -> bool:
    """Whether what ``node`` reduces is made, elementwise, of two tensors broadcast over each other."""
    pending, seen = _tensors(node)[:1], set()
    while pending:
        x = pending.pop()
        if x in seen:
            continue
        seen.add(x)
        inputs = _tensors(x)
        if len(inputs) == 2 and all(shape(n) != shape(x) for n in inputs) and nodes.tensor(x) is not None:
            return True
        if all(shape(n) == shape(x) for n in inputs):
            pending += inputs
    return False


_ROW_BY_ROW = (
    dialect.ARITHMETIC
    | dialect.CASTS
    | dialect.VIEWS
    | {"masked_fill", "where", "clamp", "tanh", "cat", "getitem", "clone", "contiguous"}
)
