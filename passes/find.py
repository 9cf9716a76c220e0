"""Where attention is: from every product whose operand comes from a softmax, and every SDPA call.

A site is found by dataflow.  The product with v gives the index variables; the weights are followed
up to the softmax, and what the softmax normalises is lifted to an expression over the one product
of q and k in it.  Layout and axes follow from the indices; no spelling is assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, B, Expr, H, Q, S, const
from flashfuse.kernels.spec import AttentionShape, Reason, ScoreProgram
from flashfuse.passes import analyse, dialect, nodes
from flashfuse.passes.dialect import Op
from flashfuse.passes.lift import SUMMED, Index, Lift, NotLiftable, Product, Scope, contraction, source_index
from flashfuse.passes.nodes import Memory, Size, same, shape

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph and the index at which the site reads it, over ``b h q|kv d``."""

    node: fx.Node
    index: Index


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
        moved = {
            name: Operand(mapping[getattr(self, name).node], getattr(self, name).index) for name in ("q", "k", "v")
        }
        captures = {name: mapping[self.scope.captures[name]] for name in self.program.captures}
        return dataclasses.replace(self, scope=dataclasses.replace(self.scope, captures=captures), **moved)


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
        for candidate in _candidates(node):
            try:
                region = candidate.region(memory, live)
            except Refused as refused:
                if refused.reason.code != "not_attention":
                    found.append(NearMiss(node.name, node, (refused.reason,), nodes.source(node)))
                claimed.update(candidate.softmax)
                break
            claimed.update(candidate.softmax)
            found.append(region)
            break
    found += _unreached(graph, live, claimed)
    return tuple(sorted(found, key=lambda site: memory.position[site.output]))


def _candidates(node: fx.Node) -> Iterator[Candidate]:
    op = dialect.read(node)
    if op is None:
        return
    if op.name == "scaled_dot_product_attention":
        yield SdpaCall(node, op)
    elif op.name in PRODUCTS:
        for side in ("a", "b"):
            weights = _operand(node, op, side)
            if weights is not None and _softmax_above(weights) is not None:
                yield WeightedSum(node, op, side)
                return


def _operand(node: fx.Node, op: Op, side: str) -> fx.Node | None:
    operands = op.args.get("operands") or (op.args.get("input"), op.args.get("other"))
    if len(operands) != 2:
        return None
    operand = operands[0 if side == "a" else 1]
    return operand if isinstance(operand, fx.Node) and nodes.tensor(operand) is not None else None


# --- the softmax ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Softmax:
    """A softmax in any spelling: what it normalises, and along which dimension."""

    output: fx.Node
    input: fx.Node
    dim: int
    parts: tuple[fx.Node, ...]
    zero_dead_rows: bool = False


def read_softmax(node: fx.Node) -> Softmax | None:
    op = dialect.read(node)
    if op is None:
        return None
    if op.name in ("softmax", "safe_softmax"):
        dim = op.args.get("dim")
        example = nodes.tensor(op.input)
        if example is None or not isinstance(dim, int):
            return None
        return Softmax(node, op.input, dim % example.ndim, (node,), op.name == "safe_softmax")
    return _decomposed_softmax(node, op)


def _decomposed_softmax(node: fx.Node, op: Op) -> Softmax | None:
    """``exp(x - max(x)) / sum(exp(x - max(x)))``, with or without the maximum."""
    if op.name != "div" or op.args.get("rounding_mode") is not None:
        return None
    numerator, denominator = op.args["input"], op.args["other"]
    total = dialect.read(denominator) if isinstance(denominator, fx.Node) else None
    if total is None or total.name != "sum" or total.input is not numerator or not total.get("keepdim", False):
        return None
    dim = _single_dim(total, numerator)
    exponential = dialect.read(numerator)
    if dim is None or exponential is None or exponential.name != "exp":
        return None
    x = exponential.input
    parts = [node, denominator, numerator]
    shifted = dialect.read(x) if isinstance(x, fx.Node) else None
    if shifted is not None and shifted.name == "sub" and shifted.get("alpha", 1) == 1:
        peak = _row_maximum(shifted.args["other"], shifted.input, dim)
        if peak is not None:
            return Softmax(node, shifted.input, dim, (*parts, x, *peak))
    return Softmax(node, x, dim, tuple(parts)) if isinstance(x, fx.Node) else None


def _single_dim(op: Op, of: fx.Node) -> int | None:
    dim = op.args.get("dim")
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        dim = dim[0]
    return dim % len(shape(of)) if isinstance(dim, int) and not isinstance(dim, bool) else None


def _row_maximum(peak: Any, x: fx.Node, dim: int) -> tuple[fx.Node, ...] | None:
    """The nodes of ``x.amax(dim, keepdim=True)`` or ``x.max(dim, keepdim=True)[0]``, if that is it."""
    through: list[fx.Node] = []
    while isinstance(peak, fx.Node):
        op = dialect.read(peak)
        if op is None:
            return None
        through.append(peak)
        if op.name in ("amax", "max"):
            fits = op.input is x and op.get("keepdim", False) and _single_dim(op, x) == dim
            return tuple(through) if fits else None
        if (op.name == "getitem" and op.args["index"] == 0) or op.name == "detach":
            peak = op.input
        else:
            return None
    return None


_BETWEEN = (
    {"contiguous", "clone", "alias", "dropout", "native_dropout", "repeat"} | dialect.CASTS | dialect.VIEWS
) - {"detach"}


def _softmax_above(weights: fx.Node) -> Softmax | None:
    """The softmax that ``weights`` come from through casts, dropout and index-only operations."""
    node: Any = weights
    while isinstance(node, fx.Node):
        softmax = read_softmax(node)
        if softmax is not None:
            return softmax
        op = dialect.read(node)
        if op is None or (op.name not in _BETWEEN and op.name != "getitem"):
            return None
        node = op.args.get("input")
        if op.name == "getitem" and isinstance(node, fx.Node) and isinstance(nodes.value(node), tuple):
            inner = dialect.read(node)
            if inner is None or inner.name != "native_dropout" or op.args["index"] != 0:
                return None
    return None


# --- candidates -------------------------------------------------------------------------------


class Candidate:
    """A node that may be the product with v, and how to read a site from it."""

    def __init__(self, node: fx.Node, op: Op) -> None:
        self.node = node
        self.op = op
        self.softmax: tuple[fx.Node, ...] = ()

    def region(self, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        raise NotImplementedError


@dataclass
class Frame:
    """The index variables of one reading: expressions of the output's indices, and sizes."""

    out_index: list[Expr]
    batch: Size
    heads: Size
    lift: Lift


def _frame(sizes: tuple[Size, ...], q_at: int, d_at: int, heads: int | None, kv_len: Size) -> Frame:
    """Names for the indices of an output of shape ``sizes`` with q and d at the given places.

    The other dimensions are batch dimensions: the last is ``h``, those before it are folded into
    ``b``.  A single one is ``b``, or ``b·heads + h`` when ``heads`` is given.
    """
    rest = [i for i in range(len(sizes)) if i not in (q_at, d_at)]
    index: list[Expr] = [const(0)] * len(sizes)
    batch: Size = 1
    num_heads: Size = 1
    scope = Scope()
    lift = Lift(scope, {})
    if len(rest) == 1 and heads is None:
        batch, index[rest[0]] = sizes[rest[0]], B
    elif len(rest) == 1:
        assert heads is not None
        batch, num_heads = sizes[rest[0]] // heads, heads
        index[rest[0]] = E.add(E.mul(B, const(heads)), H)
    elif rest:
        num_heads, index[rest[-1]] = sizes[rest[-1]], H
        batch = nodes.product(sizes[i] for i in rest[:-1])
        lift.bounds["b"] = batch
        stride: Size = 1
        for i in reversed(rest[:-1]):
            digit = E.floordiv(B, lift.size(stride))
            index[i] = digit if i == rest[0] else E.mod(digit, lift.size(sizes[i]))
            stride = stride * sizes[i]
    index[q_at], index[d_at] = Q, SUMMED
    lift.bounds |= {"b": batch, "h": num_heads, "q": sizes[q_at], "kv": kv_len, "d": sizes[d_at]}
    for i in rest:
        if same(sizes[i], 1):
            index[i] = const(0)
    for name, size in (("Skv", kv_len), ("Sq", sizes[q_at])):
        if not isinstance(size, int):
            scope.sizes[size] = E.var(name)
    return Frame(index, batch, num_heads, lift)


class WeightedSum(Candidate):
    """``weights @ v`` (or ``vᵀ @ weightsᵀ``) where the weights come from a softmax."""

    def __init__(self, node: fx.Node, op: Op, side: str) -> None:
        super().__init__(node, op)
        self.side = side
        weights = _operand(node, op, side)
        assert weights is not None
        softmax = _softmax_above(weights)
        assert softmax is not None
        self.found = softmax
        self.softmax = softmax.parts

    def region(self, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        q_at, d_at = self._places()
        plain = self._read(_frame(shape(self.node), q_at, d_at, None, self._kv_len()), memory, live)
        if len(shape(self.node)) != 3:
            return plain
        heads = _folded_heads(plain)
        if heads is None:
            return plain
        try:
            return self._read(_frame(shape(self.node), q_at, d_at, heads, self._kv_len()), memory, live)
        except (Refused, NotLiftable):
            return plain

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

    def _read(self, frame: Frame, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        lift = frame.lift
        if self.op.name == "baddbmm" and (self.op.get("beta", 1) != 0 or self.op.get("alpha", 1) != 1):
            raise Refused(Reason("output_bias", "the product with v is scaled or added to inside baddbmm"))
        # The contraction calls its summed index d; here that is kv, and d is the column of v.
        product = contraction(self.node, self.op, tuple(_COLUMN if e == SUMMED else e for e in frame.out_index))
        if product is None:
            raise Refused(Reason("not_attention", "a product of this form"))
        renamed = {SUMMED: KV, _COLUMN: SUMMED}
        sides = [
            (node, tuple(renamed.get(e, e) for e in index))
            for node, index in ((product.a, product.a_index), (product.b, product.b_index))
        ]
        (weights, w_index), (v, v_index) = sides if self.side == "a" else sides[::-1]
        chain, index, dropout_p = self._follow(weights, w_index, lift)
        if index[self.found.dim] != KV:
            raise Refused(
                Reason("softmax_axis", "the softmax does not run over the axis that the product with v sums over")
            )
        if any(E.contains(e, KV) for i, e in enumerate(index) if i != self.found.dim):
            raise Refused(Reason("softmax_axis", "the key index also appears outside the softmax axis"))
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
                    dropout_p = float(p)
                node = op.input
                continue
            if op.name in dialect.CASTS:
                after = nodes.tensor(node)
                if after is None or not after.dtype.is_floating_point:
                    raise Refused(Reason("weights_path", "the weights are cast to integers"))
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

    def region(self, memory: Memory, live: set[fx.Node]) -> AttentionRegion:
        args = self.op.args
        tensors = [args.get(name) for name in ("query", "key", "value")]
        if any(not isinstance(t, fx.Node) or nodes.tensor(t) is None for t in tensors):
            raise Refused(Reason("sdpa_inputs", "q, k and v are not all dense tensors"))
        q, k, v = (t for t in tensors if isinstance(t, fx.Node))
        if nodes.tensor(self.node) is None:
            raise Refused(Reason("sdpa_output", "the output is not a dense tensor"))
        sizes = shape(self.node)
        rank = len(sizes)
        k_sizes = shape(k)
        plain = _frame(sizes, rank - 2, rank - 1, None, k_sizes[-2])
        scale, dropout_p = nodes.constant(args.get("scale")), nodes.constant(args.get("dropout_p") or 0.0)
        if scale is None:
            if not isinstance(shape(q)[-1], int):
                raise Refused(Reason("head_dim", "the head dimension is dynamic"))
            scale = float(shape(q)[-1]) ** -0.5
        if not isinstance(scale, (int, float)) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
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
                elif args.get("enable_gqa") and isinstance(n, int) and isinstance(full, int) and full % n == 0:
                    out.append(E.floordiv(e, const(full // n)))
                else:
                    raise Refused(Reason("sdpa_inputs", f"batch dimensions of sizes {n} and {full}"))
            return tuple(out)

        lift.opaque = memory.opaque
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
        return _assemble(self, plain, operands, score, nodes.value(q).dtype, [], float(dropout_p), memory, live, True)


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
    products: list[tuple[Operand, Operand]] = []

    def at_product(product: Product) -> Expr | None:
        a, b = Operand(product.a, product.a_index), Operand(product.b, product.b_index)
        if _reads(a, KV) or _reads(b, Q):
            a, b = b, a
        if not _reads(a, Q) or not _reads(b, KV) or _reads(a, KV) or _reads(b, Q):
            return None
        if (a, b) not in products:
            if products:
                return None
            products.append((a, b))
        return S

    lift.at_product, lift.opaque = at_product, memory.opaque
    score = lift.element(scores, index)
    if not E.contains(score, S):
        if products or any(_dot_like(n) for n in (*lift.leaves, *lift.visited)):
            raise Refused(_why_no_product(scores, lift))
        raise Refused(Reason("not_attention", "the softmax input is not a product of two tensors"))
    q, k = products[0]
    scores_value = nodes.tensor(scores)
    assert scores_value is not None
    return _assemble(
        candidate, frame, (q, k, v), score, scores_value.dtype, chain, dropout_p, memory, live, zero_dead_rows
    )


def _reads(operand: Operand, variable: Expr) -> bool:
    return any(E.contains(e, variable) for e in operand.index)


def _dot_like(node: fx.Node) -> bool:
    op = dialect.read(node)
    return op is not None and op.name in PRODUCTS


def _why_no_product(scores: fx.Node, lift: Lift) -> Reason:
    for node, message in lift.stops.items():
        return Reason("score_path", f"between the product of q and k and the softmax: {message}", nodes.source(node))
    return Reason("score_path", "the softmax input is not a function of one product of q and k", nodes.source(scores))


def _assemble(
    candidate: Candidate,
    frame: Frame,
    operands: tuple[Operand, Operand, Operand],
    score: Expr,
    score_dtype: torch.dtype,
    chain: list[fx.Node],
    dropout_p: float,
    memory: Memory,
    live: set[fx.Node],
    zero_dead_rows: bool,
) -> AttentionRegion:
    node, lift = candidate.node, frame.lift
    interior = [n for n, e in lift.visited.items() if E.contains(e, S)] + chain
    masks = [n for n in lift.visited if n not in interior]
    inside = {*interior, node}
    for n in interior:
        for user in n.users:
            if user not in inside and user in live:
                raise Refused(
                    Reason(
                        "weights_escape",
                        f"`{n.name}`, inside the site, is also used by `{user.name}`",
                        nodes.source(n),
                        "do not return the attention weights (output_attentions=False)",
                    )
                )
    q, k, v = (_source(operand, lift) for operand in operands)
    shape_ = _shape(frame, q, k, v, lift, node)
    program = analyse.program(score, score_dtype, lift, shape_, zero_dead_rows)
    if isinstance(program, Reason):
        raise Refused(program)
    loads = dict.fromkeys((*(lift.scope.captures[name] for name in program.captures), q.node, k.node, v.node))
    for leaf in loads:
        if leaf in inside:
            raise Refused(Reason("score_path", f"`{leaf.name}` depends on the scores themselves", nodes.source(leaf)))
    changed = [n for n in loads if memory.loads_change(n, node)]
    changed += [n for n in (*interior, *masks) if n not in loads and memory.meaning_changes(n, node, lift.visited)]
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
        tuple(dict.fromkeys(interior)), tuple(masks), notes, nodes.source(node),
    )  # fmt: skip


def _assumptions(score: Expr, program: ScoreProgram) -> tuple[str, ...]:
    values = sorted(
        {n.value for n in E.walk(score) if n.is_const and not isinstance(n.value, bool) and n.value <= analyse.FINITE_MASK}
        - {n.value for n in E.walk(program.score) if n.is_const}
    )
    return tuple(f"the constant {v:.4g} is taken as a mask" for v in values if v != float("-inf"))


def _source(operand: Operand, lift: Lift) -> Operand:
    """The earliest tensor of which ``operand`` is a plain view: permuted, expanded, or grouped heads."""
    best = operand if _is_view(operand, lift) else None
    node, index = operand.node, operand.index
    while True:
        op = dialect.read(node)
        if op is None or op.mutates:
            break
        if op.name == "cat":
            tensors = [t for t in op.args["tensors"] if len(shape(t)) != 1]
            moved = index if len(tensors) == 1 else None
            parent = tensors[0] if tensors else None
        else:
            try:
                moved = source_index(lift, node, op, index) if op.name != "detach" else None
            except NotLiftable:
                break
            parent = op.args.get("input")
        if moved is None or not isinstance(parent, fx.Node):
            break
        node, index = parent, tuple(lift.simplify(e) for e in moved)
        if _is_view(Operand(node, index), lift):
            best = Operand(node, index)
    if best is None:
        raise Refused(Reason("layout", f"`{operand.node.name}` is read in an order that is not a view of it"))
    return best


def _is_view(operand: Operand, lift: Lift) -> bool:
    """Each dimension runs over one variable of its own in full, over ``h // group``, or has size 1."""
    seen: set[str] = set()
    for e, n in zip(operand.index, shape(operand.node), strict=True):
        if e == const(0):
            if not same(n, 1):
                return False
            continue
        names = E.variables(e) & {"b", "h", "q", "kv", "d"}
        if names & seen:
            return False
        seen |= names
        if e.op == "var":
            # A shorter range would be a slice; it starts at 0 but does not end at the end.
            if e != SUMMED and not same(n, lift.bounds[e.args[0]]):
                return False
        elif e.op == "//" and e.args[0] == H and isinstance(n, int):
            if not same(n * e.args[1].value, lift.bounds["h"]):
                return False
        elif not (folded_heads_of(e) is not None and same(n, lift.bounds["b"] * lift.bounds["h"])):
            return False
    return True


def folded_heads_of(e: Expr) -> int | None:
    """``heads`` where ``e`` is ``b·heads + h``."""
    for part in e.operands if e.op == "+" else ():
        if part.op == "*" and part.args[0] == B and part.args[1].is_const and e == E.add(part, H):
            return int(part.args[1].value)
    return None


def _folded_heads(region: AttentionRegion) -> int | None:
    """The number of heads that a folded batch dimension holds, read off ``b // n`` and ``b % n``."""
    found = set()
    indices = [e for o in (region.q, region.k, region.v) for e in o.index]
    program = [e for e in (region.program.score, region.program.mask) if e is not None]
    lift = Lift(Scope(), {})
    for operand in (region.q, region.k, region.v):
        node, index = operand.node, operand.index
        while (op := dialect.read(node)) is not None:
            try:
                moved = source_index(lift, node, op, index)
            except NotLiftable:
                break
            if moved is None:
                break
            node, index = op.input, moved
            indices += index
    for e in (*indices, *program):
        for n in E.walk(e):
            if n.op in ("%", "//") and n.args[0] == B and n.args[1].is_const:
                found.add(int(n.args[1].value))
    return max(found) if found else None


def _shape(frame: Frame, q: Operand, k: Operand, v: Operand, lift: Lift, node: fx.Node) -> AttentionShape:
    def heads(operand: Operand) -> Size:
        for e, n in zip(operand.index, shape(operand.node), strict=True):
            if e == H or e.op == "//" or folded_heads_of(e) is not None:
                return n if folded_heads_of(e) is None else frame.heads
        return 1

    def column(operand: Operand) -> Size:
        return next(n for e, n in zip(operand.index, shape(operand.node), strict=True) if e == SUMMED)

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
        if softmax is None or not _scores_like(softmax.input):
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


def _scores_like(scores: fx.Node) -> bool:
    """A product of two computed tensors above ``scores``, through elementwise operations."""
    pending, seen = [scores], set()
    elementwise = dialect.ARITHMETIC | dialect.CASTS | dialect.VIEWS | {"masked_fill", "where", "clamp", "tanh"}
    while pending:
        node = pending.pop()
        op = dialect.read(node)
        if op is None or node in seen:
            continue
        seen.add(node)
        if op.name in PRODUCTS:
            return all(n.op not in ("placeholder", "get_attr") for n in node.all_input_nodes)
        if op.name in elementwise:
            pending += node.all_input_nodes
    return False
