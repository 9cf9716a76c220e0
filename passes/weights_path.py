"""From the product with v up to the softmax: what happens to the weights on the way.

Casts and index-only operations change no weight.  Dropout is the operator's own.  The other steps are

    factors   P ∘ M                         where M does not depend on kv, (P ∘ M) v = M ∘ (P v), and
                                            where it does not depend on q, (P ∘ M) v = P (M ∘ v)
    fills     0 where a condition holds     nothing is changed where the mask of the scores removes the
                                            same key, but for rows without a key, which become 0
    rescues   0 where P is NaN              the same

A factor of zeros and ones that removes what the mask removes is a fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, Expr, H, Q, const
from flashfuse.kernels.spec import AttentionShape, Reason
from flashfuse.passes import dialect, nodes
from flashfuse.passes.analyse import Removal, implied
from flashfuse.passes.dialect import Op
from flashfuse.passes.indices import Index, NotLiftable, source_index
from flashfuse.passes.lift import Lift
from flashfuse.passes.near_miss import scores_like
from flashfuse.passes.nodes import same, shape
from flashfuse.passes.operands import Operand, folded_heads_of, is_view
from flashfuse.passes.region import Gate, Refused, Weights
from flashfuse.passes.softmax import Softmax, is_zero, read_softmax

_BETWEEN = (
    {"contiguous", "clone", "dropout", "native_dropout", "repeat", "repeat_interleave", "getitem"}
    | dialect.CASTS
    | dialect.VIEWS
) - {"detach"}
"""What may stand between the softmax and the product with v without changing a weight, but for dropout."""

Kind = Literal["times", "over", "fill", "keep", "triangle", "nan"]


@dataclass(frozen=True)
class Step:
    """An operation that changes weights.

    Attributes:
        kind: ``times`` and ``over`` a factor, ``fill`` with 0 where, and ``keep`` only where a condition
            holds, ``triangle``, and 0 in the place of ``nan``.
        weights: the weights above it.
        other: the factor or the condition.
        index: of the result, over ``b h q kv``; empty until it is known.
        beside: nodes that this step alone needs, and that are made from the weights.
    """

    node: fx.Node
    kind: Kind
    weights: fx.Node
    other: Any = None
    index: Index = ()
    beside: tuple[fx.Node, ...] = ()

    @property
    def above(self) -> Index:
        """The index at which it reads the weights."""
        return _aligned(self.weights, self.index)

    @property
    def scales(self) -> bool:
        return self.kind in ("times", "over")

    def kept(self, lift: Lift) -> Expr | None:
        """Where the weights stay what they are and are not 0; ``None`` where this says no such thing.

        Raises:
            NotLiftable: the condition cannot be read.
        """
        if self.kind == "triangle":
            op = dialect.read(self.node)
            assert op is not None
            row, column = self.index[-2], E.sub(self.index[-1], lift.number(op.get("diagonal", 0)))
            return lift.simplify(E.compare("<=" if op.name == "tril" else ">=", column, row))
        if self.kind in ("fill", "keep"):
            condition = E.truth(lift.operand(self.other, self.index))
            return E.truth(lift.simplify(E.logical_not(condition) if self.kind == "fill" else condition))
        if self.kind != "times" or not isinstance(self.other, fx.Node) or nodes.tensor(self.other) is None:
            return None
        factor = lift.operand(self.other, self.index)
        if nodes.value(self.other).dtype == torch.bool or E.is_bool(factor):
            return E.truth(lift.simplify(E.truth(factor)))
        if factor.op == "where" and all(a.is_const and a.value in (0, 1) for a in factor.args[1:]):
            return lift.simplify(E.truth(factor))
        return None


def _aligned(x: fx.Node, index: Index) -> Index:
    """The index at which an elementwise operation reads ``x`` for an element of its result."""
    sizes = shape(x)
    aligned = index[len(index) - len(sizes) :]
    return tuple(const(0) if same(n, 1) else i for i, n in zip(aligned, sizes, strict=True))


def _steps(node: fx.Node, op: Op) -> Iterator[Step]:
    """The ways to read ``node`` as a step; which operand the weights are is not known here."""
    a: Any = op.args.get("input")
    b: Any = op.args.get("other")
    if op.name in ("mul", "div"):
        if op.args.get("rounding_mode") is None:
            yield from _if_weights(Step(node, "times" if op.name == "mul" else "over", a, b))
        if op.name == "mul" and not op.mutates:
            yield from _if_weights(Step(node, "times", b, a))
    elif op.name == "masked_fill":
        if is_zero(op.args.get("value")):
            yield from _filled(node, a, op.args.get("mask"), "fill", op.args["value"])
    elif op.name == "where":
        if is_zero(b):
            yield from _filled(node, a, op.args.get("condition"), "keep", b)
        elif is_zero(a):
            yield from _filled(node, b, op.args.get("condition"), "fill", a)
    elif op.name in ("tril", "triu"):
        yield from _if_weights(Step(node, "triangle", a))
    elif op.name == "nan_to_num" and nodes.constant(op.get("nan", 0)) == 0:
        yield from _if_weights(Step(node, "nan", a))


def _filled(node: fx.Node, weights: Any, condition: Any, kind: Kind, zero: Any) -> Iterator[Step]:
    beside = (zero,) if isinstance(zero, fx.Node) else ()
    asked: list[fx.Node] = []
    inner, of_nan = condition, kind == "fill"
    while isinstance(inner, fx.Node):
        op = dialect.read(inner)
        asked.append(inner)
        if op is not None and op.name == "isnan" and op.input is weights and of_nan:
            yield from _if_weights(Step(node, "nan", weights, beside=(*beside, *asked)))
            return
        if op is None or op.name != "not":
            break
        inner, of_nan = op.input, not of_nan
    yield from _if_weights(Step(node, kind, weights, condition, beside=beside))


def _if_weights(step: Step) -> Iterator[Step]:
    weights, made = nodes.tensor(step.weights), nodes.tensor(step.node)
    if weights is None or made is None or weights.ndim > made.ndim:
        return
    if weights.is_floating_point() and made.is_floating_point():
        yield step


def softmax_above(weights: fx.Node) -> Softmax | None:
    """The softmax that ``weights`` come from through casts, dropout, index-only operations and steps."""
    pending: list[tuple[Any, bool]] = [(weights, False)]
    seen: set[fx.Node] = set()
    while pending:
        node, changed = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        softmax = read_softmax(node)
        if softmax is not None:
            if changed and not scores_like(softmax.input):
                # Experts weighted by a router, say.
                continue
            return softmax
        op = dialect.read(node)
        if op is None:
            continue
        if op.name in _BETWEEN:
            above = op.args.get("input")
            if op.name == "getitem" and isinstance(above, fx.Node) and isinstance(nodes.value(above), tuple):
                inner = dialect.read(above)
                if inner is None or inner.name != "native_dropout" or op.args["index"] != 0:
                    continue
            pending.append((above, changed))
        else:
            pending += [(step.weights, True) for step in reversed(list(_steps(node, op)))]
    return None


# --- the way --------------------------------------------------------------------------------------


@dataclass
class Path:
    """The way from the operand of a product up to the softmax.

    Attributes:
        chain: nodes passed, the softmax not among them.
        at: the index of each of them, over ``b h q kv``.
        index: that of the softmax.
        steps: from the softmax on.
        dropped: what dropout makes of the weights.
        unscaled: weights that are scaled before the dropout, as they are without that.
    """

    chain: list[fx.Node] = field(default_factory=list)
    at: dict[fx.Node, Index] = field(default_factory=dict)
    index: Index = ()
    steps: list[Step] = field(default_factory=list)
    dropout_p: float = 0.0
    dropout: fx.Node | None = None
    dropped: Weights | None = None
    unscaled: fx.Node | None = None

    @property
    def beside(self) -> tuple[fx.Node, ...]:
        """Nodes that steps need beside the weights."""
        return tuple(n for step in self.steps for n in step.beside)


def follow(weights: fx.Node, index: Index, softmax: Softmax, lift: Lift) -> Path:
    """The way from ``weights[index]`` up to ``softmax``.

    Raises:
        Refused: something on it is not understood.
    """
    path = Path()
    node = weights
    while node is not softmax.output:
        path.chain.append(node)
        path.at[node] = index
        op = dialect.read(node)
        assert op is not None
        if node in lift.opaque:
            message = f"`{node.name}` is written to later, or lets no gradient through"
            raise Refused(Reason("weights_path", message, nodes.source(node)))
        if op.name == "getitem" and isinstance(nodes.value(op.input), tuple):
            node = op.input
        elif op.name in ("dropout", "native_dropout"):
            _dropout(path, node, op, index, lift)
            node = op.input
        elif op.name in dialect.CASTS:
            after = nodes.tensor(node)
            if after is None or not after.dtype.is_floating_point:
                dtype = "something else" if after is None else str(after.dtype).removeprefix("torch.")
                raise Refused(Reason("weights_path", f"the weights are cast to {dtype}", nodes.source(node)))
            node = op.input
        elif op.name in _BETWEEN:
            node, index = op.input, _moved(lift, node, op, index)
        else:
            step = _step(node, op, index, softmax)
            path.steps.insert(0, step)
            node, index = step.weights, step.above
    path.index = index
    path.at[node] = index
    _mark_unscaled(path, softmax)
    return path


def _step(node: fx.Node, op: Op, index: Index, softmax: Softmax) -> Step:
    for step in _steps(node, op):
        above = softmax_above(step.weights)
        if above is not None and above.output is softmax.output:
            return Step(node, step.kind, step.weights, step.other, index, step.beside)
    raise Refused(Reason("weights_path", f"`{op.name}` between softmax and product", nodes.source(node)))


def _moved(lift: Lift, node: fx.Node, op: Op, index: Index) -> Index:
    try:
        moved = source_index(lift, node, op, index)
    except NotLiftable as stop:
        raise Refused(Reason("weights_path", f"between softmax and product: {stop}")) from None
    if moved is None:
        message = f"`{op.name}` between softmax and product"
        raise Refused(Reason("weights_path", message, nodes.source(node)))
    return moved


def _dropout(path: Path, node: fx.Node, op: Op, index: Index, lift: Lift) -> None:
    p = nodes.constant(op.get("p", 0.5))
    if not op.get("training", True) or p == 0:
        return
    if path.dropout_p:
        raise Refused(Reason("two_dropouts", "the weights are dropped out twice"))
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise Refused(Reason("dropout", f"dropout with p={p}"))
    names: set[str] = set().union(*(E.variables(e) for e in index))
    if any(not same(n, 1) for name, n in lift.bounds.items() if name in {"b", "h", "q", "kv"} - names):
        raise Refused(Reason("dropout", "several weights share one draw of the dropout"))
    sizes = [n for e, n in zip(index, shape(op.input), strict=True) if E.contains(e, KV)]
    others = [n for n in sizes if not same(n, lift.bounds["kv"])]
    if others:
        what = (
            "the sink's column"
            if same(others[0], lift.bounds["kv"] + 1)
            else "columns that this product leaves out"
        )
        message = f"dropout draws for {what} too, before the cut"
        hint = "cut the weights before the dropout"
        raise Refused(Reason("dropout", message, nodes.source(node), hint))
    path.dropout_p, path.dropout = float(p), node
    path.dropped = Weights(node if op.name == "dropout" else path.chain[-2], index, True)


def _mark_unscaled(path: Path, softmax: Softmax) -> None:
    """Dropout keeps weights alike, whatever they were scaled by before."""
    if path.dropout is None:
        return
    before = path.chain[path.chain.index(path.dropout) + 1 :]
    scaling = next((s for s in path.steps if s.scales and s.node in before), None)
    if scaling is None:
        return
    path.unscaled = scaling.weights
    if path.at[scaling.weights] != path.at[path.dropout]:
        message = f"`{scaling.node.name}` scales the weights, which are dropped out in another layout"
        hint = "scale them after the dropout"
        raise Refused(Reason("weights_path", message, nodes.source(scaling.node), hint))


def handed_out(path: Path, softmax: Softmax, lift: Lift) -> dict[fx.Node, Weights | None]:
    """For each node from the softmax on: the weights to compute where something else uses it.

    What follows those is made from them by the user's own nodes.  ``None``: nothing stands for it, such as
    the keep mask.  Other nodes may stay as they are, among them weights that a sink's column is still beside.
    """
    steps = {s.node: s for s in path.steps}
    handed: dict[fx.Node, Weights | None] = {}
    current: Weights | None = _whole(Weights(softmax.output, path.index, False), lift)
    drawn = scaled = False
    for node in (softmax.output, *reversed(path.chain)):
        step = steps.get(node)
        if node is path.dropout:
            drawn, current = True, None
        if path.dropped is not None and node is path.dropped.node:
            current = None if scaled else _whole(path.dropped, lift)
        if step is not None:
            scaled = scaled or step.scales
            if not step.scales or _may_remove(step, lift):
                # In a row without a key, what comes before is not what the operator computes.
                handed = dict.fromkeys(n for n in path.chain if n in handed) if drawn else {}
                current = None if scaled else _whole(Weights(node, path.at[node], drawn), lift)
        if current is None and not (drawn or scaled) and nodes.tensor(node) is not None:
            current = _whole(Weights(node, path.at[node], False), lift)
        if drawn or current is not None:
            handed[node] = current
    return handed


def _may_remove(step: Step, lift: Lift) -> bool:
    """Whether a factor may be read as a condition."""
    try:
        return step.kept(lift.copy()) is not None
    except NotLiftable:
        return False


def _whole(weights: Weights, lift: Lift) -> Weights | None:
    """``weights``, where each of b, h, q, kv has one of its own there."""
    sizes = [lift.bounds[name] for name in E.INDEX_VARS]
    complete = same(nodes.product(shape(weights.node)), nodes.product(sizes))
    return weights if complete and is_view(Operand(weights.node, weights.index), lift) else None


# --- what the steps come to -----------------------------------------------------------------------


def removals(steps: Sequence[Step], lift: Lift) -> dict[Step, Removal]:
    """What each step removes; a factor of which that is not known is not among them.

    Raises:
        Refused: the condition of a fill cannot be read.
    """
    found: dict[Step, Removal] = {}
    for step in steps:
        if step.kind == "nan":
            found[step] = Removal(None, False)
            continue
        try:
            kept = step.kept(lift if not step.scales or _may_remove(step, lift) else lift.copy())
        except NotLiftable as stop:
            if step.scales:
                continue
            message = f"`{step.node.name}` sets weights to 0 by a condition that is not understood: {stop}"
            raise Refused(Reason("weights_path", message, nodes.source(step.node))) from None
        if kept is not None:
            found[step] = Removal(kept, step.scales)
    return found


def gates(
    steps: Sequence[Step], removed: Mapping[Step, Removal], mask: Expr | None, of: AttentionShape, lift: Lift
) -> tuple[Gate, ...]:
    """The factors that remain beside the operator, given the ``mask`` of its program.

    Raises:
        Refused: a step changes weights of which neither rows nor keys can be scaled instead.
    """
    found: list[Gate] = []
    for step in steps:
        removal = removed.get(step)
        if removal is not None and (removal.kept is None or implied(mask, removal.kept)):
            continue
        where = nodes.source(step.node)
        if not step.scales:
            assert removal is not None and removal.kept is not None
            raise Refused(_removes_more(step, removal.kept, mask, steps, lift))
        found.append(_gate(step, of, lift, where))
    return tuple(found)


def _removes_more(step: Step, kept: Expr, mask: Expr | None, steps: Sequence[Step], lift: Lift) -> Reason:
    message = f"`{step.node.name}` keeps weights only where `{kept}`"
    loads = {lift.scope.captures.get(n.args[0]) for n in E.walk(kept) if n.op == "load"}
    if any(s.weights in loads for s in steps):
        message += ", which depends on the weights themselves: they are known when the whole row is"
        return Reason("weights_path", message, nodes.source(step.node))
    if mask is None:
        message += ", and the scores have no mask that removes the others"
    else:
        message += f", which removes more than the mask of the scores, `{mask}`"
    hint = "mask the scores before the softmax instead"
    return Reason("weights_path", message, nodes.source(step.node), hint)


def _gate(step: Step, of: AttentionShape, lift: Lift, where: str) -> Gate:
    divides = step.kind == "over"
    value = nodes.constant(step.other)
    if isinstance(value, (int, float)):
        return Gate(float(value), (), "out", divides)
    if not isinstance(step.other, fx.Node) or nodes.tensor(step.other) is None or value.is_complex():
        message = f"`{step.node.name}` scales the weights by `{step.other}`, which is no real tensor"
        raise Refused(Reason("weights_path", message, where))
    index = tuple(lift.simplify(e) for e in _aligned(step.other, step.index))
    by_key, by_query = (any(E.contains(e, x) for e in index) for x in (KV, Q))
    if by_key and by_query:
        message = (
            f"`{step.node.name}` scales each weight by a factor of its own, `{step.other.name}`, "
            "which neither the output nor v can take"
        )
        raise Refused(Reason("weights_path", message, where))
    operand = Operand(step.other, index)
    if not is_view(operand, lift) or (by_key and not _by_key_head(operand, of)):
        message = f"`{step.other.name}`, which scales the weights, does not lie by batch, head and row"
        raise Refused(Reason("weights_path", message, where))
    return Gate(step.other, index, "v" if by_key else "out", divides)


def _by_key_head(factor: Operand, of: AttentionShape) -> bool:
    """Whether the heads of a factor of v are those of v, or it has none."""
    if any(folded_heads_of(e) is not None for e in factor.index):
        return same(of.num_q_heads, of.num_kv_heads)
    own = [n for e, n in zip(factor.index, shape(factor.node), strict=True) if E.contains(e, H)]
    return not own or same(nodes.product(own), of.num_kv_heads)
