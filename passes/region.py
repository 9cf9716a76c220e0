"""A site as a value, and how one reading of a graph becomes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import B, Expr, H, Q, S, const
from flashfuse.kernels.spec import AttentionShape, Reason, ScoreProgram
from flashfuse.passes import analyse, dialect, nodes
from flashfuse.passes.contraction import SUMMED
from flashfuse.passes.indices import Index
from flashfuse.passes.lift import Lift, Scope
from flashfuse.passes.nodes import Memory, Size, same, shape
from flashfuse.passes.operands import Operand, folded_heads_of, source
from flashfuse.passes.products import Rows
from flashfuse.passes.sinks import Sink, reductions
from flashfuse.passes.tables import Capture, Table, leaves


@dataclass(frozen=True)
class Weights:
    """A node whose value is the weights of a site, each once: ``index`` over ``b h q kv``."""

    node: fx.Node
    index: Index
    dropped: bool


@dataclass(frozen=True)
class RowResult:
    """A node whose value is a number for each row of what is normalised.

    Attributes:
        index: over ``b h q``.
        kind: the natural logarithm of the sum of exponentials, or the largest score.
        reduction: the node that takes it from the scores; ``node`` is that or follows it.
        detached: no gradient goes through it.
    """

    node: fx.Node
    index: Index
    kind: Literal["lse", "max"]
    reduction: fx.Node
    detached: bool


@dataclass(frozen=True)
class Gate:
    """A factor of the weights that the output or v takes instead.

    ``index`` is over ``b h q`` or ``b h kv``; it is empty for a number.  ``divides``: it is their divisor.
    """

    node: fx.Node | float
    index: Index
    onto: Literal["out", "v"]
    divides: bool = False


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
    """Nodes that depend on the scores.  Of those that something else uses, the weights are computed for
    that; others stay as they are."""
    masks: tuple[fx.Node, ...]
    """Other nodes that the lift looked through; removed where nothing else needs them."""
    notes: tuple[str, ...]
    source: str
    beside: tuple[tuple[Operand, Operand], ...] = ()
    """Rows of further products, laid beside those of q and of k: pairs of them."""
    weights: tuple[Weights, ...] = ()
    """Weights that something else uses: the site computes them too."""
    gates: tuple[Gate, ...] = ()
    unscaled: tuple[fx.Node, fx.Node] | None = None
    """Where dropout follows a factor: its node, and the weights without the factor, for which it draws."""
    row_results: tuple[RowResult, ...] = ()
    """What else comes from the scores; without them it stays the user's own."""

    @property
    def factors(self) -> tuple[fx.Node, ...]:
        """The tensors among the gates."""
        return tuple(g.node for g in self.gates if isinstance(g.node, fx.Node))

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What the site computes: the output, the weights that something else uses, and results of rows."""
        return (self.output, *(w.node for w in self.weights), *(r.node for r in self.row_results))

    @property
    def operands(self) -> tuple[Operand, ...]:
        """q, k, v and what is laid beside q and k."""
        return (self.q, self.k, self.v, *(o for pair in self.beside for o in pair))

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors that the site starts from: its operands and the captures."""
        captures = (self.scope.captures[name] for name in self.program.captures)
        loads = (leaf for c in captures for leaf in leaves(c))
        return (*(o.node for o in self.operands), *loads, *self.factors)

    def mapped(self, mapping: Mapping[fx.Node, fx.Node]) -> AttentionRegion:
        """The same site over the nodes of another graph that hold the same values."""
        captures: dict[str, Capture] = {}
        for name in self.program.captures:
            capture = self.scope.captures[name]
            captures[name] = capture.mapped(mapping) if isinstance(capture, Table) else mapping[capture]
        q, k, v, *rest = (Operand(mapping[o.node], o.index) for o in self.operands)
        beside = tuple(zip(rest[::2], rest[1::2], strict=True))
        gates = tuple(
            dataclasses.replace(g, node=mapping[g.node]) if isinstance(g.node, fx.Node) else g
            for g in self.gates
        )
        scope = dataclasses.replace(self.scope, captures=captures)
        return dataclasses.replace(self, scope=scope, q=q, k=k, v=v, beside=beside, gates=gates)


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


@dataclass
class Frame:
    """The index variables of one reading: expressions of the output's indices, and sizes."""

    out_index: list[Expr]
    batch: Size
    heads: Size
    lift: Lift


def frames(sizes: tuple[Size, ...], q_at: int, d_at: int, kv_len: Size) -> Iterator[Frame]:
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


def assemble(
    node: fx.Node,
    frame: Frame,
    products: Sequence[Rows],
    values: Operand,
    score: Expr,
    score_dtype: torch.dtype,
    chain: list[fx.Node],
    dropout_p: float,
    memory: Memory,
    live: set[fx.Node],
    zero_dead_rows: bool,
    handed_out: Mapping[fx.Node, Weights | None] | None = None,
    sink: Sink | None = None,
    removals: Sequence[analyse.Removal] = (),
) -> AttentionRegion:
    """The site that ends in ``node``; ``handed_out`` says what stands for weights used elsewhere.

    ``removals`` are the weights that are set to 0 after the softmax.
    """
    lift = frame.lift
    columns = lift.bounds["d"]
    chain_nodes = dict.fromkeys(chain)
    interior = dict.fromkeys(n for n, e in lift.visited.items() if _depends(e, lift)) | chain_nodes
    interior |= reductions(lift)
    interior |= dict.fromkeys(u for n in interior for u in n.users if u.target in _ASSERTIONS)
    masks = dict.fromkeys(n for n in lift.visited if n not in interior)
    inside = {*interior, node}
    weights = _escaping(inside, masks, lift, live, memory, node, handed_out or {})
    rows = [(_view(p.q, p.length, lift), _view(p.k, p.length, lift)) for p in products]
    (q, k), v = rows[0], _view(values, columns, lift)
    shape_ = _shape(frame, rows, v, node)
    if not score_dtype.is_floating_point:
        raise Refused(Reason("dtype", f"the scores are {str(score_dtype).removeprefix('torch.')}"))
    program = analyse.program(score, score_dtype, lift, shape_, zero_dead_rows, sink, removals)
    if isinstance(program, Reason):
        raise Refused(program)
    operands = [o.node for o in (q, k, v, *(o for pair in rows for o in pair))]
    captured = [lift.scope.captures[name] for name in program.captures]
    loads = dict.fromkeys((*(leaf for c in captured for leaf in leaves(c)), *operands))
    for leaf in loads:
        if leaf in inside:
            raise Refused(
                Reason("score_path", f"`{leaf.name}` depends on the scores themselves", nodes.source(leaf))
            )
    # What something else read before a write, such as a cache's own update of itself, is not the site's.
    readers = nodes.between(loads, node)
    changed = [n for n in loads if memory.loads_change(n, node, readers)]
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
    for name, capture in zip(program.captures, captured, strict=True):
        if isinstance(capture, Table):
            continue
        example = nodes.tensor(capture)
        if example is None or example.is_complex():
            raise Refused(Reason("capture", f"`{name}` is not a dense real tensor"))
    notes = _assumptions(score, program)
    notes += tuple(f"`{w.node.name}` is used elsewhere too, and computed for that alone" for w in weights)
    return AttentionRegion(
        node.name, node, tuple(frame.out_index), q, k, v, shape_, program, lift.scope, dropout_p,
        tuple(interior), tuple(masks), notes, nodes.source(node), tuple(rows[1:]), weights,
    )  # fmt: skip


def _depends(e: Expr, lift: Lift) -> bool:
    """Whether the scores, or a reduction over them, are in ``e``."""
    return any(n == S or (n.op == "load" and n.args[0] in lift.rows) for n in E.walk(e))


_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)
"""What export says of a tensor's dtype and sizes; it goes with the tensor."""


def _escaping(
    inside: set[fx.Node],
    masks: dict[fx.Node, None],
    lift: Lift,
    live: set[fx.Node],
    memory: Memory,
    end: fx.Node,
    handed_out: Mapping[fx.Node, Weights | None],
) -> tuple[Weights, ...]:
    """The weights that something outside the site uses; scores that it uses stay the user's own nodes.

    Masks shaped ``like`` the scores read their sizes only.

    Raises:
        Refused: something else needs a value that can neither be computed for it nor stay.
    """
    found: dict[fx.Node, Weights] = {}
    for n in sorted(inside - {end}, key=memory.position.__getitem__):
        for user in n.users:
            if user in inside or user not in live or (user in masks and user not in lift.leaves):
                continue
            where = nodes.source(user)
            if user in dialect.writes(user) or n in dialect.writes(user):
                message = f"`{n.name}` is written to by `{user.name}`, which is not understood"
                raise Refused(Reason("mutation", message, where, "use the out-of-place form of the update"))
            if _reaches(user, {*lift.leaves, *inside}, memory, end):
                message = f"the site also depends on `{user.name}`, which is made from its own scores"
                raise Refused(Reason("score_path", message, where))
            message = f"`{n.name}`, inside the site, is also used by `{user.name}`"
            if memory.written_after(n):
                hint = "use the out-of-place form of the update"
                raise Refused(Reason("weights_escape", f"{message}, and then written to", where, hint))
            weights = handed_out.get(n)
            if weights is not None:
                found[weights.node] = weights
            elif n in handed_out:
                hint = "do not use the weights elsewhere"
                raise Refused(Reason("weights_escape", message, where, hint))
    return tuple(found.values())


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


def _shape(
    frame: Frame, rows: Sequence[tuple[Operand, Operand]], v: Operand, node: fx.Node
) -> AttentionShape:
    def heads(operand: Operand) -> Size:
        own = [n for e, n in zip(operand.index, shape(operand.node), strict=True) if E.contains(e, H)]
        folded = any(folded_heads_of(e) is not None for e in operand.index)
        return frame.heads if folded else nodes.product(own)

    def column(operand: Operand) -> Size:
        return next((n for e, n in zip(operand.index, shape(operand.node), strict=True) if e == SUMMED), 1)

    # k and v may be shared by different numbers of heads; the larger is kept for both.
    shared = [heads(o) for o in (v, *(k for _, k in rows))]
    kv_heads = shared[0] if all(same(n, shared[0]) for n in shared) else frame.heads
    head_dim: Size = sum(column(q) for q, _ in rows)
    bounds = frame.lift.bounds
    dtype = _compute_dtype(node, *(o for pair in rows for o in pair), v)
    return AttentionShape(
        frame.batch, frame.heads, kv_heads, bounds["q"], bounds["kv"], head_dim, column(v), dtype
    )


def _compute_dtype(node: fx.Node, *operands: Operand) -> torch.dtype:
    """The dtype of the two products: autocast's where it was on, else the widest of q, k and v."""
    out = nodes.value(node).dtype
    dtypes = [nodes.value(o.node).dtype for o in operands]
    product_inputs = [nodes.value(n).dtype for n in node.all_input_nodes[:3] if nodes.tensor(n) is not None]
    op = dialect.read(node)
    # SDPA returns the dtype that it computes in; rotated q and k, not yet cast by autocast, may have another.
    if out not in product_inputs or (op is not None and op.name == "scaled_dot_product_attention"):
        return out
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
