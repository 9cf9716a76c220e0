"""Where attention is: from every product whose operand comes from a softmax, and every SDPA call.

A site is found by dataflow.  The product with v gives the index variables; the weights are followed
up to the softmax, and what the softmax normalises is lifted to an expression over the one product
of q and k in it.  Layout and axes follow from the indices; no spelling is assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, B, Expr, H, Q, S, const
from flashfuse.kernels.spec import AttentionShape, Reason, ScoreProgram
from flashfuse.passes import analyse, dialect, nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index, NotLiftable, source_index
from flashfuse.passes.lift import Lift, Scope
from flashfuse.passes.nodes import Memory, Size, same, shape
from flashfuse.passes.operands import Operand, copies, folded_heads_of, source
from flashfuse.passes.rules import SUMMED, Product, contraction
from flashfuse.passes.softmax import read_softmax, softmax_above


@dataclass(frozen=True)
class AttentionRegion:
    """One site: what it computes and which nodes it stands for."""

    name: str
    output: fx.Node
    out_index: Index
    """Index of each dimension of the output, over ``b h q d``."""
    q: Operand
    k: Operand
    v: Operand
    shape: AttentionShape
    program: ScoreProgram
    scope: Scope
    dropout_p: float
    interior: tuple[fx.Node, ...]
    """Nodes that depend on the scores; nothing outside the site uses them."""
    masks: tuple[fx.Node, ...]
    """Other nodes that the lift looked through; removed where nothing else needs them."""
    notes: tuple[str, ...]
    source: str

    def mapped(self, mapping: Mapping[fx.Node, fx.Node]) -> AttentionRegion:
        """The same site over the nodes of another graph that hold the same values."""
        captures = {name: mapping[self.scope.captures[name]] for name in self.program.captures}
        q, k, v = (Operand(mapping[o.node], o.index) for o in (self.q, self.k, self.v))
        return dataclasses.replace(
            self, scope=dataclasses.replace(self.scope, captures=captures), q=q, k=k, v=v
        )


@dataclass(frozen=True)
class NearMiss:
    """A place that looks like attention and is left alone."""

    name: str
    output: fx.Node
    reasons: tuple[Reason, ...]
    source: str


class Refused(Exception):
    """Inside the search: this candidate is left, for ``reason``."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.message)
        self.reason = reason


def find_regions(graph: fx.Graph) -> tuple[AttentionRegion | NearMiss, ...]:
    """Every attention site of ``graph``, in graph order."""
    memory, live = Memory(graph), nodes.live(graph)
    found: list[AttentionRegion | NearMiss] = []
    claimed: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in live:
            continue
        if node.target is torch.nn.functional.multi_head_attention_forward:
            found.append(NearMiss(node.name, node, (_WHOLE,), nodes.source(node)))
        for candidate in _candidates(node):
            try:
                region = candidate.region(memory, live)
            except Refused as refused:
                if refused.reason.code != "not_attention":
                    found.append(NearMiss(node.name, node, (refused.reason,), nodes.source(node)))
            except Exception as error:
                # A fault of ours at one site must not cost the others, nor the compile.
                reason = Reason("internal", f"the search failed here: {type(error).__name__}: {error}")
                found.append(NearMiss(node.name, node, (reason,), nodes.source(node)))
            else:
                found.append(region)
            claimed.update(candidate.softmax)
            break
    found += _unreached(graph, live, claimed)
    return tuple(sorted(found, key=lambda site: memory.position[site.output]))


_WHOLE = Reason(
    "whole_module",
    "Dynamo keeps multi_head_attention_forward as a single call and does not trace what is inside",
    hint="capture the model with torch.export and rewrite that graph",
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
    return sum(copies(o) for o in (region.q, region.k, region.v))


@dataclass
class Frame:
    """The index variables of one reading: expressions of the output's indices, and sizes."""

    out_index: list[Expr]
    batch: Size
    heads: Size
    lift: Lift


def _frames(sizes: tuple[Size, ...], q_at: int, d_at: int, kv_len: Size) -> Iterator[Frame]:
    """Names for the indices of an output of shape ``sizes`` with q and d at the given places.

    The other dimensions are batch dimensions: the first ones are folded into ``b``, the others into
    ``h``.  A single one is ``b``, and where the site splits it, ``b·heads + h``.
    """
    rest = [i for i in range(len(sizes)) if i not in (q_at, d_at)]
    if len(rest) > 1:
        for cut in range(len(rest) - 1, 0, -1):
            yield _frame(sizes, rest[:cut], rest[cut:], q_at, d_at, kv_len)
        return
    plain = _frame(sizes, rest, [], q_at, d_at, kv_len)
    yield plain
    heads = _folded_heads(plain.lift) if rest else None
    if heads is not None and rest:
        folded = _frame(sizes, [], [], q_at, d_at, kv_len)
        folded.batch, folded.heads = sizes[rest[0]] // heads, heads
        folded.out_index[rest[0]] = E.add(E.mul(B, const(heads)), H)
        folded.lift.bounds |= {"b": folded.batch, "h": heads}
        yield folded


def _frame(
    sizes: tuple[Size, ...], b_at: list[int], h_at: list[int], q_at: int, d_at: int, kv_len: Size
) -> Frame:
    index: list[Expr] = [const(0)] * len(sizes)
    lift = Lift(Scope(), {})
    totals: list[Size] = []
    for variable, places in ((B, b_at), (H, h_at)):
        lift.bounds[variable.args[0]] = total = nodes.product(sizes[i] for i in places)
        totals.append(total)
        stride: Size = 1
        for i in reversed(places):
            digit = E.floordiv(variable, lift.size(stride))
            index[i] = digit if i == places[0] else E.mod(digit, lift.size(sizes[i]))
            stride = stride * sizes[i]
            index[i] = const(0) if same(sizes[i], 1) else lift.simplify(index[i])
    index[q_at], index[d_at] = Q, SUMMED
    lift.bounds |= {"q": sizes[q_at], "kv": kv_len, "d": sizes[d_at]}
    for name, size in (("Skv", kv_len), ("Sq", sizes[q_at])):
        if not isinstance(size, int):
            lift.scope.sizes[size] = E.var(name)
    return Frame(index, totals[0], totals[1], lift)


def _folded_heads(lift: Lift) -> int | None:
    """The number of heads that a folded batch dimension holds, read off ``b // n`` and ``b % n``."""
    found = {
        int(n.args[1].value)
        for e in lift.indices
        for n in E.walk(e)
        if n.op in ("%", "//") and n.args[0] == B and n.args[1].is_const
    }
    return max(found) if found else None


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
        q_at, d_at = self._places()
        yield from _frames(shape(self.node), q_at, d_at, self._kv_len())

    def _kv_len(self) -> Size:
        return shape(self.found.input)[self.found.dim]

    def _places(self) -> tuple[int, int]:
        """Which output dimension runs over queries, and which over the columns of v."""
        rank = len(shape(self.node))
        if self.op.name != "einsum":
            return (rank - 2, rank - 1) if self.side == "a" else (rank - 1, rank - 2)
        marks = tuple(E.var(f"o{i}") for i in range(rank))
        product = contraction(self.node, self.op, marks)
        if product is None:
            raise Refused(Reason("einsum", f"an einsum of this form: {self.op.args.get('equation')!r}"))
        weights, values = (
            (product.a_index, product.b_index) if self.side == "a" else (product.b_index, product.a_index)
        )
        only_weights = [i for i, m in enumerate(marks) if m in weights and m not in values]
        only_values = [i for i, m in enumerate(marks) if m in values and m not in weights]
        if not only_weights or not only_values:
            raise Refused(Reason("not_attention", "a product without separate rows and columns"))
        return only_weights[-1], only_values[-1]

    def read(self, frame: Frame, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        lift = frame.lift
        lift.opaque = memory.barriers(self.node)
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
        chain, index, dropout_p = self._follow(weights, w_index, lift)
        if index[self.found.dim] != KV and not (
            same(self._kv_len(), 1) and index[self.found.dim] == const(0)
        ):
            raise Refused(
                Reason(
                    "softmax_axis", "the softmax does not run over the axis that the product with v sums over"
                )
            )
        if any(E.contains(e, KV) for i, e in enumerate(index) if i != self.found.dim):
            raise Refused(Reason("softmax_axis", "the key index also appears outside the softmax axis"))
        if not same(product.length, self._kv_len()):
            raise Refused(
                Reason(
                    "weights_path",
                    "some weights are cut off before the product with v",
                    nodes.source(self.node),
                )
            )
        return _region(
            self, frame, self.found.input, index, Operand(v, v_index), chain, dropout_p, memory, live,
            self.found.zero_dead_rows,
        )  # fmt: skip

    def _follow(self, weights: fx.Node, index: Index, lift: Lift) -> tuple[list[fx.Node], Index, float]:
        """From the operand of the product up to the softmax: nodes passed, index there, dropout."""
        chain: list[fx.Node] = []
        dropout_p = 0.0
        node = weights
        while node is not self.found.output:
            chain.append(node)
            op = dialect.read(node)
            assert op is not None
            if node in lift.opaque:
                raise Refused(
                    Reason(
                        "weights_path",
                        f"`{node.name}` is written to later, or lets no gradient through",
                        nodes.source(node),
                    )
                )
            if op.name == "getitem" and isinstance(nodes.value(op.input), tuple):
                node = op.input
                continue
            if op.name in ("dropout", "native_dropout"):
                p = nodes.constant(op.get("p", 0.5))
                if op.get("training", True) and p != 0:
                    if dropout_p:
                        raise Refused(Reason("two_dropouts", "the weights are dropped out twice"))
                    if not isinstance(p, (int, float)) or not 0 <= p < 1:
                        raise Refused(Reason("dropout", f"dropout with p={p}"))
                    names: set[str] = set().union(*(E.variables(e) for e in index))
                    if any(
                        not same(n, 1)
                        for name, n in lift.bounds.items()
                        if name in {"b", "h", "q", "kv"} - names
                    ):
                        raise Refused(Reason("dropout", "several weights share one draw of the dropout"))
                    dropout_p = float(p)
                node = op.input
                continue
            if op.name in dialect.CASTS:
                after = nodes.tensor(node)
                if after is None or not after.dtype.is_floating_point:
                    dtype = "something else" if after is None else str(after.dtype).removeprefix("torch.")
                    raise Refused(
                        Reason("weights_path", f"the weights are cast to {dtype}", nodes.source(node))
                    )
                node = op.input
                continue
            try:
                moved = source_index(lift, node, op, index)
            except NotLiftable as stop:
                raise Refused(Reason("weights_path", f"between softmax and product: {stop}")) from None
            if moved is None:
                raise Refused(
                    Reason("weights_path", f"`{op.name}` between softmax and product", nodes.source(node))
                )
            node, index = op.input, moved
        return [*chain, *self.softmax], index, dropout_p


_COLUMN = E.var("e")


class SdpaCall(Candidate):
    """A call of ``scaled_dot_product_attention``."""

    def frames(self) -> Iterator[Frame]:
        key = self.op.args.get("key")
        if nodes.tensor(self.node) is None or not isinstance(key, fx.Node) or nodes.tensor(key) is None:
            raise Refused(Reason("sdpa_inputs", "q, k, v and the output are not all dense tensors"))
        sizes = shape(self.node)
        yield from _frames(sizes, len(sizes) - 2, len(sizes) - 1, shape(key)[-2])

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

        lift.opaque = memory.barriers(self.node)
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
        operands = (
            Operand(q, (*lead(q), Q, SUMMED)),
            Operand(k, (*lead(k), KV, SUMMED)),
            Operand(v, (*lead(v), KV, SUMMED)),
        )
        return _assemble(
            self,
            plain,
            operands,
            shape(q)[-1],
            score,
            nodes.value(q).dtype,
            [],
            float(dropout_p),
            memory,
            live,
            True,
        )


# --- from a reading to a region -----------------------------------------------------------------


def _region(
    candidate: Candidate,
    frame: Frame,
    scores: fx.Node,
    index: Index,
    v: Operand,
    chain: list[fx.Node],
    dropout_p: float,
    memory: Memory,
    live: set[fx.Node],
    zero_dead_rows: bool,
) -> AttentionRegion:
    """The region whose softmax normalises ``scores`` at ``index``."""
    lift = frame.lift
    products: list[tuple[Operand, Operand, Size]] = []

    def at_product(product: Product) -> Expr | None:
        a, b = Operand(product.a, product.a_index), Operand(product.b, product.b_index)
        if _reads(a, KV) or _reads(b, Q):
            a, b = b, a
        one_row, one_key = (same(lift.bounds[name], 1) for name in ("q", "kv"))
        if not (_reads(a, Q) or one_row) or not (_reads(b, KV) or one_key) or _reads(a, KV) or _reads(b, Q):
            return None
        if (a, b, product.length) not in products:
            if products:
                return None
            products.append((a, b, product.length))
        return S

    lift.at_product = at_product
    score = lift.element(scores, index)
    if not E.contains(score, S):
        if products or scores_like(scores):
            raise Refused(_why_no_product(scores, lift))
        raise Refused(Reason("not_attention", "the softmax input is not a product of two tensors"))
    q, k, head_dim = products[0]
    if same(lift.bounds["q"], 1) and not any(_reads(k, e) for e in (B, H)) and not same(frame.batch, 1):
        # A router of experts: every row against a matrix that all share is a projection.
        raise Refused(Reason("not_attention", "one query per entry of the batch, and the same keys for all"))
    scores_value = nodes.tensor(scores)
    assert scores_value is not None
    return _assemble(
        candidate,
        frame,
        (q, k, v),
        head_dim,
        score,
        scores_value.dtype,
        chain,
        dropout_p,
        memory,
        live,
        zero_dead_rows,
    )


def _reads(operand: Operand, variable: Expr) -> bool:
    return any(E.contains(e, variable) for e in operand.index)


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


def _assemble(
    candidate: Candidate,
    frame: Frame,
    operands: tuple[Operand, Operand, Operand],
    head_dim: Size,
    score: Expr,
    score_dtype: torch.dtype,
    chain: list[fx.Node],
    dropout_p: float,
    memory: Memory,
    live: set[fx.Node],
    zero_dead_rows: bool,
) -> AttentionRegion:
    node, lift = candidate.node, frame.lift
    lengths = (head_dim, head_dim, lift.bounds["d"])
    chain_nodes = dict.fromkeys(chain)
    interior = dict.fromkeys(n for n, e in lift.visited.items() if E.contains(e, S)) | chain_nodes
    interior |= dict.fromkeys(u for n in interior for u in n.users if u.target in _ASSERTIONS)
    masks = dict.fromkeys(n for n in lift.visited if n not in interior)
    inside = {*interior, node}
    _check_escapes(inside, masks, lift, live, memory, node)
    q, k, v = (_view(operand, length, lift) for operand, length in zip(operands, lengths, strict=True))
    shape_ = _shape(frame, q, k, v, lift, node)
    if not score_dtype.is_floating_point:
        raise Refused(Reason("dtype", f"the scores are {str(score_dtype).removeprefix('torch.')}"))
    program = analyse.program(score, score_dtype, lift, shape_, zero_dead_rows)
    if isinstance(program, Reason):
        raise Refused(program)
    loads = dict.fromkeys((*(lift.scope.captures[name] for name in program.captures), q.node, k.node, v.node))
    for leaf in loads:
        if leaf in inside:
            raise Refused(
                Reason("score_path", f"`{leaf.name}` depends on the scores themselves", nodes.source(leaf))
            )
    changed = [n for n in loads if memory.loads_change(n, node)]
    read = lift.visited.keys() | chain_nodes.keys()
    changed += [n for n in (*interior, *masks) if n not in loads and memory.meaning_changes(n, node, read)]
    if changed:
        raise Refused(
            Reason(
                "mutation",
                f"`{changed[0].name}` is written to between its use and the product with v",
                nodes.source(changed[0]),
                "use the out-of-place form of the update",
            )
        )
    for name in program.captures:
        example = nodes.tensor(lift.scope.captures[name])
        if example is None or example.is_complex():
            raise Refused(Reason("capture", f"`{name}` is not a dense real tensor"))
    notes = _assumptions(score, program)
    return AttentionRegion(
        node.name, node, tuple(frame.out_index), q, k, v, shape_, program, lift.scope, dropout_p,
        tuple(interior), tuple(masks), notes, nodes.source(node),
    )  # fmt: skip


_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)
"""What export says of a tensor's dtype and sizes; it goes with the tensor."""


def _check_escapes(
    inside: set[fx.Node],
    masks: dict[fx.Node, None],
    lift: Lift,
    live: set[fx.Node],
    memory: Memory,
    end: fx.Node,
) -> None:
    """Refuses a site of which something else needs a value that the fused kernel does not make.

    Masks shaped ``like`` the scores read their sizes only.
    """
    for n in inside - {end}:
        for user in n.users:
            if user in inside or user not in live or (user in masks and user not in lift.leaves):
                continue
            where = nodes.source(user)
            if user in dialect.writes(user) or n in dialect.writes(user):
                message = f"`{n.name}` is written to by `{user.name}`, which is not understood"
                raise Refused(Reason("mutation", message, where, "use the out-of-place form of the update"))
            if _reaches(user, {*lift.leaves, *inside}, memory, end):
                message = f"what is normalised also depends on `{user.name}`, made from the scores themselves"
                raise Refused(Reason("score_path", message, where))
            hint = "do not return the attention weights (output_attentions=False)"
            message = f"`{n.name}`, inside the site, is also used by `{user.name}`"
            raise Refused(Reason("weights_escape", message, where, hint))


def _reaches(start: fx.Node, ends: set[fx.Node], memory: Memory, last: fx.Node) -> bool:
    """Whether something in ``ends`` depends on ``start``."""
    pending, seen = [start], {start}
    while pending:
        node = pending.pop()
        if node in ends:
            return True
        for user in node.users:
            if user not in seen and memory.position[user] <= memory.position[last] and user is not last:
                seen.add(user)
                pending.append(user)
    return False


def _view(operand: Operand, length: Size, lift: Lift) -> Operand:
    found = source(operand, length, lift)
    if found is None:
        raise Refused(Reason("layout", f"`{operand.node.name}` is read in an order that is not a view of it"))
    return found


def _assumptions(score: Expr, program: ScoreProgram) -> tuple[str, ...]:
    values = sorted(
        {
            n.value
            for n in E.walk(score)
            if n.is_const and not isinstance(n.value, bool) and n.value <= analyse.FINITE_MASK
        }
        - {n.value for n in E.walk(program.score) if n.is_const}
    )
    return tuple(f"the constant {v:.4g} is taken as a mask" for v in values if v != float("-inf"))


def _shape(frame: Frame, q: Operand, k: Operand, v: Operand, lift: Lift, node: fx.Node) -> AttentionShape:
    def heads(operand: Operand) -> Size:
        own = [n for e, n in zip(operand.index, shape(operand.node), strict=True) if E.contains(e, H)]
        folded = any(folded_heads_of(e) is not None for e in operand.index)
        return frame.heads if folded else nodes.product(own)

    def column(operand: Operand) -> Size:
        return next((n for e, n in zip(operand.index, shape(operand.node), strict=True) if e == SUMMED), 1)

    # k and v may be shared by different numbers of heads; the larger is kept for both.
    return AttentionShape(
        frame.batch, frame.heads, heads(k) if same(heads(k), heads(v)) else frame.heads,
        lift.bounds["q"], lift.bounds["kv"], column(q), column(v), _compute_dtype(node, q, k, v),
    )  # fmt: skip


def _compute_dtype(node: fx.Node, *operands: Operand) -> torch.dtype:
    """The dtype of the two products: autocast's where it was on, else the widest of q, k and v."""
    out = nodes.value(node).dtype
    dtypes = [nodes.value(o.node).dtype for o in operands]
    product_inputs = [nodes.value(n).dtype for n in node.all_input_nodes[:3] if nodes.tensor(n) is not None]
    if out not in product_inputs:
        return out
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _unreached(graph: fx.Graph, live: set[fx.Node], claimed: set[fx.Node]) -> Iterator[NearMiss]:
    """Softmaxes of a product of two activations whose weights meet no product we can follow."""
    for node in graph.nodes:
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
