"""Where attention is: from every product whose operand comes from a softmax, and every SDPA call.

A site is found by dataflow.  The product with v gives the index variables; the weights are followed
up to the softmax, and what the softmax normalises is lifted to an expression over the one product
of q and k in it.  Layout and axes follow from the indices; no spelling is assumed.
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, B, Expr, H, Q, S, const
from flashfuse.kernels.spec import AVERAGING, Reason, differentiable_loads
from flashfuse.passes import dialect, nodes
from flashfuse.passes.contraction import SUMMED, contraction
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index, NotLiftable
from flashfuse.passes.lift import Lift
from flashfuse.passes.near_miss import near_misses, scores_like, side_by_side, why_not_a_product
from flashfuse.passes.nodes import Memory, Size, same, shape
from flashfuse.passes.operands import Operand, copies
from flashfuse.passes.products import Reading, Rows, readings, reads
from flashfuse.passes.region import AttentionRegion, Frame, NearMiss, Refused, Weights, assemble, frames
from flashfuse.passes.row_results import row_results, with_results
from flashfuse.passes.sinks import Sink, cut_column, without_shift
from flashfuse.passes.weights_path import Path, follow, gates, handed_out, removals, softmax_above


def find_regions(graph: fx.Graph) -> tuple[AttentionRegion | NearMiss, ...]:
    """Every attention site of ``graph``, in graph order."""
    memory, live = Memory(graph), nodes.live(graph)
    found: list[AttentionRegion | NearMiss] = []
    claimed: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in live:
            continue
        for candidate in _candidates(node):
            try:
                region = candidate.region(memory, live)
            except Refused as refused:
                if refused.reason.code != "not_attention":
                    found.append(NearMiss(node.name, node, (refused.reason,), nodes.source(node)))
            except NotLiftable as stop:
                # Asked for outside of an operation: the sizes that name the indices of the output.
                reason = Reason("symbolic_size", f"the site's own sizes: {stop}", nodes.source(node))
                found.append(NearMiss(node.name, node, (reason,), nodes.source(node)))
            except Exception as error:
                # What a graph can hold has a reason of its own, so only a fault of ours comes here.  At one
                # site it must not cost the others, nor the compile.
                found.append(NearMiss(node.name, node, (_fault(error, node),), nodes.source(node)))
            else:
                found.append(region)
            claimed.update(candidate.softmax)
            break
    found += near_misses(graph, live, claimed)
    return tuple(sorted(found, key=lambda site: memory.position[site.output]))


def _fault(error: Exception, node: fx.Node) -> Reason:
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return Reason(
        "internal",
        f"a fault of FlashFuse's own search, not of this graph: {type(error).__name__}: {error}{at}",
        nodes.source(node),
        "please report this message with the lines of the model that make the site",
    )


def _candidates(node: fx.Node) -> Iterator[Candidate]:
    op = dialect.read(node)
    if op is None:
        return
    if op.name == "scaled_dot_product_attention":
        yield SdpaCall(node, op)
    elif op.name in dialect.PRODUCTS:
        for side in ("a", "b"):
            weights = _operand(node, op, side)
            if weights is not None and softmax_above(weights) is not None:
                yield WeightedSum(node, op, side)
                return


def _operand(node: fx.Node, op: Op, side: str) -> fx.Node | None:
    operands = op.args.get("operands") or (op.args.get("input"), op.args.get("other"))
    if len(operands) != 2:
        return None
    operand = operands[0 if side == "a" else 1]
    return operand if isinstance(operand, fx.Node) and nodes.tensor(operand) is not None else None


# --- candidates -------------------------------------------------------------------------------


class Candidate:
    """A node that may be the product with v, and how to read a site from it."""

    def __init__(self, node: fx.Node, op: Op) -> None:
        self.node = node
        self.op = op
        self.softmax: tuple[fx.Node, ...] = ()

    def region(self, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        """The site, read with the batch dimensions that let q, k and v stay views.

        Raises:
            Refused: it is left, and why.
        """
        read: list[AttentionRegion] = []
        refused: list[Refused] = []
        for frame in self.frames():
            try:
                read.append(self.read(frame, memory, live))
            except Refused as refusal:
                refused.append(refusal)
        if read:
            return min(read, key=lambda r: (_copies(r), same(r.shape.num_q_heads, 1)))
        raise refused[0]

    def frames(self) -> Iterator[Frame]:
        """The ways to name the output's indices; each may use what reading the one before showed."""
        raise NotImplementedError

    def read(self, frame: Frame, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        raise NotImplementedError


def _copies(region: AttentionRegion) -> int:
    return sum(copies(o) for o in region.operands)


class WeightedSum(Candidate):
    """``weights @ v`` (or ``vᵀ @ weightsᵀ``) where the weights come from a softmax."""

    def __init__(self, node: fx.Node, op: Op, side: str) -> None:
        super().__init__(node, op)
        self.side = side
        weights = _operand(node, op, side)
        assert weights is not None
        softmax = softmax_above(weights)
        assert softmax is not None
        self.found = softmax
        self.softmax = softmax.parts

    def frames(self) -> Iterator[Frame]:
        rows, d_at = self._places()
        for q_at in rows:
            yield from frames(shape(self.node), q_at, d_at, self._kv_len())

    def _kv_len(self) -> Size:
        """Columns of the weights that meet v: one less than are normalised, where one is a sink."""
        product = contraction(self.node, self.op, tuple(E.var(f"o{i}") for i in range(len(shape(self.node)))))
        return shape(self.found.input)[self.found.dim] if product is None else product.length

    def _places(self) -> tuple[list[int], int]:
        """Which output dimensions can run over queries, and which one over the columns of v."""
        rank = len(shape(self.node))
        if self.op.name != "einsum":
            return ([rank - 2], rank - 1) if self.side == "a" else ([rank - 1], rank - 2)
        marks = tuple(E.var(f"o{i}") for i in range(rank))
        product = contraction(self.node, self.op, marks)
        if product is None:
            raise Refused(Reason("einsum", f"an einsum of this form: {self.op.args.get('equation')!r}"))
        weights, values = (
            (product.a_index, product.b_index) if self.side == "a" else (product.b_index, product.a_index)
        )
        only_weights = [i for i, m in enumerate(marks) if m in weights and m not in values]
        only_values = [i for i, m in enumerate(marks) if m in values and m not in weights]
        if only_values and not only_weights and scores_like(self.found.input):
            message = "every query has keys and values of its own, so there are no rows that share them"
            raise Refused(Reason("keys_per_query", message, nodes.source(self.node)))
        if not only_weights or not only_values:
            raise Refused(Reason("not_attention", "a product without separate rows and columns"))
        return _longest_first(only_weights, shape(self.node)), only_values[-1]

    def read(self, frame: Frame, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        lift = frame.lift
        lift.opaque, lift.condensed = memory.barriers(self.node), memory.condensed
        if self.op.name == "baddbmm" and (self.op.get("beta", 1) != 0 or self.op.get("alpha", 1) != 1):
            raise Refused(Reason("output_bias", "the product with v is scaled or added to inside baddbmm"))
        # The contraction calls its summed index d; here that is kv, and d is the column of v.
        product = contraction(
            self.node, self.op, tuple(_COLUMN if e == SUMMED else e for e in frame.out_index)
        )
        if product is None:
            raise Refused(Reason("not_attention", "a product of this form"))
        renamed = {SUMMED: KV, _COLUMN: SUMMED}
        sides = [
            (node, tuple(renamed.get(e, e) for e in index))
            for node, index in ((product.a, product.a_index), (product.b, product.b_index))
        ]
        (weights, w_index), (v, v_index) = sides if self.side == "a" else sides[::-1]
        path = follow(weights, w_index, self.found, lift)
        index = path.index
        total, cut = shape(self.found.input)[self.found.dim], None
        along = E.contains(index[self.found.dim], KV) or same(product.length, 1)
        if along and not same(product.length, total):
            cut = cut_column(index[self.found.dim], product.length, total, lift)
            if cut is None:
                message, hint = "some weights are cut off before the product with v", ""
                joined = side_by_side(self.found.input)
                if joined is not None:
                    message = (
                        f"one softmax runs over several products, which `{joined.name}` lays side by side, "
                        "and its weights are cut apart again for products with other values"
                    )
                    hint = "lay the keys, and the values, side by side instead, for one product each"
                raise Refused(Reason("weights_path", message, nodes.source(self.node), hint))
        elif index[self.found.dim] != KV and not (
            same(product.length, 1) and index[self.found.dim] == const(0)
        ):
            raise Refused(
                Reason(
                    "softmax_axis", "the softmax does not run over the axis that the product with v sums over"
                )
            )
        if any(E.contains(e, KV) for i, e in enumerate(index) if i != self.found.dim):
            raise Refused(Reason("softmax_axis", "the key index also appears outside the softmax axis"))
        beside = self._beside(cut, index)
        handed = handed_out(path, self.found, lift)
        region = _region(self, frame, path, Operand(v, v_index), memory, live, handed, beside)
        # A stored mask can hold finite minima as well, of which nothing is known here.
        may_average = region.program.dead_rows in AVERAGING or bool(
            differentiable_loads(region.program.score)
        )
        if region.program.sink is not None and region.program.sink.is_const:
            may_average = False
        # What is NaN in a dead row stays NaN in its gradients, whatever becomes of it.
        may_average = may_average or (bool(path.steps) and region.program.dead_rows == "zero")
        if not self.found.shifted and may_average:
            message = "this softmax does not give the mean in a row of equal finite minima"
            hint = "subtract the row's maximum first, or use torch.softmax"
            raise Refused(Reason("dead_rows_unclear", message, nodes.source(self.found.output), hint))
        return region

    def _beside(self, cut: Expr | None, index: Index) -> tuple[fx.Node | float, Index] | None:
        """What is summed beside the scores at ``index``: a column that is cut off, or a term of the sum."""
        dim, sink = self.found.dim, self.found.sink
        if cut is not None:
            if sink is not None:
                raise Refused(Reason("sink", "a column is cut off, and the sum has another term"))
            return self.found.input, (*index[:dim], cut, *index[dim + 1 :])
        return None if sink is None else (sink, (*index[:dim], const(0), *index[dim + 1 :]))


_COLUMN = E.var("e")


def _longest_first(dims: list[int], sizes: tuple[Size, ...]) -> list[int]:
    """Dimensions that v lacks: one runs over queries, the others over heads that share v.

    A symbolic size is taken for a length.
    """

    def length(d: int) -> tuple[bool, int, int]:
        n = sizes[d]
        return (False, n, d) if isinstance(n, int) else (True, 0, d)

    return sorted(dims, key=length, reverse=True)


class SdpaCall(Candidate):
    """A call of ``scaled_dot_product_attention``."""

    def frames(self) -> Iterator[Frame]:
        key = self.op.args.get("key")
        if nodes.tensor(self.node) is None or not isinstance(key, fx.Node) or nodes.tensor(key) is None:
            raise Refused(Reason("sdpa_inputs", "q, k, v and the output are not all dense tensors"))
        value = self.op.args.get("value")
        if isinstance(value, fx.Node) and nodes.tensor(value) is not None:
            nodes.unify(nodes.value(key).shape[-2], nodes.value(value).shape[-2])
        sizes = shape(self.node)
        yield from frames(sizes, len(sizes) - 2, len(sizes) - 1, shape(key)[-2])

    def read(self, plain: Frame, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        args = self.op.args
        tensors = [args.get(name) for name in ("query", "key", "value")]
        if any(not isinstance(t, fx.Node) or nodes.tensor(t) is None for t in tensors):
            raise Refused(Reason("sdpa_inputs", "q, k and v are not all dense tensors"))
        q, k, v = (t for t in tensors if isinstance(t, fx.Node))
        sizes = shape(self.node)
        scale, dropout_p = nodes.constant(args.get("scale")), nodes.constant(args.get("dropout_p") or 0.0)
        if scale is None:
            if not isinstance(shape(q)[-1], int):
                raise Refused(Reason("head_dim", "the head dimension is dynamic"))
            scale = float(shape(q)[-1]) ** -0.5
        if (
            not isinstance(scale, (int, float))
            or not isinstance(dropout_p, (int, float))
            or not 0 <= dropout_p < 1
        ):
            raise Refused(Reason("sdpa_arguments", f"scale={scale!r}, dropout_p={dropout_p!r}"))
        lift, batch = plain.lift, tuple(plain.out_index[:-2])

        def lead(t: fx.Node) -> Index:
            """Batch indices of ``t``: broadcast, and divided by the group under ``enable_gqa``."""
            own = shape(t)[:-2]
            aligned = batch[len(batch) - len(own) :]
            out = []
            for e, n, full in zip(aligned, own, sizes[len(batch) - len(own) : -2], strict=True):
                if same(n, 1):
                    out.append(const(0))
                elif same(n, full):
                    out.append(e)
                elif (
                    args.get("enable_gqa") and isinstance(n, int) and isinstance(full, int) and full % n == 0
                ):
                    out.append(E.floordiv(e, const(full // n)))
                else:
                    raise Refused(Reason("sdpa_inputs", f"batch dimensions of sizes {n} and {full}"))
            return tuple(out)

        lift.opaque, lift.condensed = memory.barriers(self.node), memory.condensed
        score = E.mul(S, const(float(scale)))
        mask = args.get("attn_mask")
        try:
            if isinstance(mask, fx.Node):
                mask_tensor = nodes.tensor(mask)
                if mask_tensor is None:
                    raise Refused(Reason("sdpa_mask", "the mask is not a dense tensor"))
                value = lift.operand(mask, (*batch, Q, KV))
                if mask_tensor.dtype == torch.bool:
                    score = E.where(value, score, const(-torch.inf))
                else:
                    score = E.add(score, value)
        except NotLiftable as stop:
            raise Refused(Reason("sdpa_mask", str(stop))) from None
        if args.get("is_causal"):
            score = E.where(E.compare("<=", KV, Q), score, const(-torch.inf))
        rows = Rows(Operand(q, (*lead(q), Q, SUMMED)), Operand(k, (*lead(k), KV, SUMMED)), shape(q)[-1])
        return assemble(
            self.node, plain, (rows,), Operand(v, (*lead(v), KV, SUMMED)), score, nodes.value(q).dtype, [],
            float(dropout_p), memory, live, True,
        )  # fmt: skip


# --- from a reading to a region -----------------------------------------------------------------


def _region(
    candidate: WeightedSum,
    frame: Frame,
    path: Path,
    v: Operand,
    memory: Memory,
    live: set[fx.Node],
    handed: Mapping[fx.Node, Weights | None],
    beside: tuple[fx.Node | float, Index] | None,
) -> AttentionRegion:
    """The region whose softmax is at the end of ``path``, and sums what is ``beside`` the scores."""
    refused: list[Refused] = []
    found, node = candidate.found, candidate.node
    scores, chain = found.input, [*path.chain, *candidate.softmax, *path.beside]
    for reading in readings(frame.lift, scores, path.index):
        frame.lift = reading.lift
        try:
            _check_products(reading, frame, scores)
            score, sink = _unshifted(candidate, reading, scores, beside)
            removed = removals(path.steps, reading.lift)
            # What is shifted is reduced to something else.
            shifted = score != reading.score
            of_rows = {} if shifted else row_results(found, path.index, node, reading.lift, memory, live)
            region = assemble(
                node, frame, reading.products, v, score, _dtype(scores),
                [*chain, *(n for through in of_rows.values() for n in through)], path.dropout_p, memory, live,
                found.zero_dead_rows, handed, sink, tuple(removed.values()),
            )  # fmt: skip
            region = with_results(region, of_rows)
            factors = gates(path.steps, removed, region.program.mask, region.shape, reading.lift)
            unscaled = None
            if path.dropout is not None and path.unscaled is not None:
                unscaled = (path.dropout, path.unscaled)
            region = dataclasses.replace(region, gates=factors, unscaled=unscaled)
            readers = nodes.between(region.factors, node)
            changed = next((n for n in region.factors if memory.loads_change(n, node, readers)), None)
            if changed is not None:
                message = f"`{changed.name}` is written to between its use and the product with v"
                raise Refused(Reason("mutation", message, nodes.source(changed)))
            return region
        except Refused as refusal:
            refused.append(refusal)
    raise refused[-1]


def _unshifted(
    candidate: WeightedSum, reading: Reading, scores: fx.Node, beside: tuple[fx.Node | float, Index] | None
) -> tuple[Expr, Sink | None]:
    """Score and sink of a reading, without what both are shifted by."""
    lift = reading.lift
    lift.at_product = lambda product: None
    try:
        logit = None if beside is None else lift.operand(*beside)
    except NotLiftable as stop:
        raise Refused(Reason("sink", f"what is summed beside the scores: {stop}")) from None
    total = shape(scores)[candidate.found.dim] if candidate.found.sink is None else None
    unshifted = without_shift(reading.score, logit, total, lift)
    if isinstance(unshifted, Reason):
        raise Refused(unshifted)
    return unshifted


def _dtype(node: fx.Node) -> torch.dtype:
    example = nodes.tensor(node)
    assert example is not None
    return example.dtype


def _check_products(reading: Reading, frame: Frame, scores: fx.Node) -> None:
    if not E.contains(reading.score, S):
        if reading.products or scores_like(scores):
            raise Refused(_why_no_product(scores, reading.lift))
        reason = why_not_a_product(scores)
        if reason is not None:
            raise Refused(reason)
        raise Refused(Reason("not_attention", "the softmax input is not a product of two tensors"))
    shared = all(not reads(p.k, e) for p in reading.products for e in (B, H))
    if same(frame.lift.bounds["q"], 1) and shared and not same(frame.batch, 1):
        # A router of experts: every row against a matrix that all share is a projection.
        raise Refused(Reason("not_attention", "one query per entry of the batch, and the same keys for all"))


def _why_no_product(scores: fx.Node, lift: Lift) -> Reason:
    for node, message in lift.stops.items():
        return Reason(
            "score_path", f"between the product of q and k and the softmax: {message}", nodes.source(node)
        )
    for node in lift.leaves:
        op = dialect.read(node)
        if op is None and node.op not in ("placeholder", "get_attr"):
            message = (
                f"between the product of q and k and the softmax: `{node.name}`, which is not elementwise"
            )
            return Reason("score_path", message, nodes.source(node))
    return Reason(
        "score_path", "the softmax input is not a function of one product of q and k", nodes.source(scores)
    )
