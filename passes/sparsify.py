"""Approximate attention, where it was asked for: the proved program with ``and pattern`` in its mask.

A site is found, lifted and proved as ever, against the user's own nodes.  :func:`sparsify` then turns its
plan into one whose program reads, for example,

    s*0.125 where kv <= q  →  s*0.125 where kv <= q and (q//128 == kv//128 or kv < 128) else zero

so that what is approximate stands in the graph as text, and nothing else differs from the proved site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from flashfuse.kernels import dispatch
from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, SKV, SQ, ZERO, B, Expr, Q, const
from flashfuse.kernels.reference import environment, evaluate
from flashfuse.kernels.spec import AttentionShape, Reason, ScoreProgram, conditions
from flashfuse.passes import dialect, nodes
from flashfuse.passes.nodes import same
from flashfuse.passes.patterns import KEEP, MAP_BLOCK, Pattern, Sparsity, mask_of, read
from flashfuse.passes.plan import Approximation, Fuse, SitePlan, cost
from flashfuse.passes.region import AttentionRegion
from flashfuse.passes.tables import dtype_of

_SAMPLE = 1 << 22
"""Scores that are looked at for a density."""


def sparsify(
    gm: fx.GraphModule, plans: Sequence[SitePlan], sparsity: Sparsity, kernels: dispatch.Kernels = "auto"
) -> tuple[SitePlan, ...]:
    """The plans with ``sparsity`` in the masks of the sites that are fused.

    A site that the pattern does not fit stays exact, and a note says why.  Tensors of masks become buffers of
    ``gm``, the copy that will be rewritten.
    """
    buffers = _Buffers(gm)
    return tuple(_sparse(p, sparsity, buffers, kernels) if isinstance(p, Fuse) else p for p in plans)


def _sparse(plan: Fuse, sparsity: Sparsity, buffers: _Buffers, kernels: dispatch.Kernels) -> Fuse:
    shape = plan.region.shape
    is_chosen = not isinstance(sparsity, Pattern)
    chosen = sparsity if isinstance(sparsity, Pattern) else sparsity(shape)
    if chosen is None:
        return _exact(plan, "as chosen")
    pattern = read(chosen)
    place = position(plan.region, is_chosen)
    if place is None:
        return _exact(plan, "its queries have no known place among the keys, as in cross attention")
    mask = mask_of(pattern)
    misfit = mask.misfit(shape) if mask is not None else ""
    if misfit:
        return _exact(plan, misfit)
    captures = dict(plan.region.scope.captures)
    name = KEEP
    while name in captures or name in plan.region.scope.ints:
        name += "_"
    if mask is not None:
        captures[name] = buffers.node(mask.on(nodes.value(plan.region.output).device), plan.region.output)
        if place != Q:
            # What the model says of a position is not known to be one of a key.
            place = E.minimum(E.maximum(place, const(0)), E.sub(SKV, const(1)))
    condition = _placed(pattern.condition(), place, name)
    program = plan.region.program
    allowed = condition if program.mask is None else E.logical_and(program.mask, condition)
    if condition == E.TRUE or allowed == program.mask:
        return _exact(plan, "the pattern keeps every key")
    if allowed == E.FALSE:
        return _exact(plan, "the pattern keeps no key that the mask allows")
    dead = program.dead_rows
    if dead == "none" and E.substitute(allowed, {KV: place}.get) != E.TRUE:
        dead = "zero"
    sparse = ScoreProgram(program.score, allowed, dead, program.sink)
    scope = dataclasses.replace(plan.region.scope, captures=captures)
    region = dataclasses.replace(plan.region, program=sparse, scope=scope)
    selection = dispatch.select(shape, sparse, region.dropout_p, nodes.value(region.output).device, kernels)
    if isinstance(selection, Reason):
        return _exact(plan, selection.message)
    keep = {name: mask.keep.cpu()} if mask is not None else {}
    density = _density(allowed, shape, keep)
    approximation = Approximation(str(pattern), density, _density(program.mask, shape, {}))
    costs = dataclasses.replace(cost(region), density=density)
    return Fuse(region, selection, costs, approximation)


def _exact(plan: Fuse, why: str) -> Fuse:
    notes = (*plan.region.notes, f"not approximated: {why}")
    return dataclasses.replace(plan, region=dataclasses.replace(plan.region, notes=notes))


def _placed(condition: Expr, place: Expr, name: str) -> Expr:
    """``condition`` with ``place`` for the position of the query, and its load named ``name``."""

    def replace(node: Expr) -> Expr | None:
        if node.op == "load":
            return E.load(name, (E.substitute(i, {Q: place}.get) for i in node.operands))
        return place if node == Q else None

    return E.substitute(condition, replace)


# --- where the queries stand --------------------------------------------------------------------


def position(region: AttentionRegion, is_chosen: bool = False) -> Expr | None:
    """The position of the query ``q`` among the keys; ``None`` where nothing says it.

    It is ``q`` where there are as many keys as queries.  Else a causal condition ``kv <= x`` says that it is
    x.  Without one, queries stand at the end where the keys are some earlier ones with theirs behind, or
    where the site was ``is_chosen``.
    """
    s = region.shape
    if same(s.q_len, s.kv_len):
        return Q
    for condition in conditions(region.program.mask):
        last = _last_key(condition, region)
        # A limit that all queries share is the end of the keys, unless there is one query only.
        if last is not None and (E.contains(last, Q) or (same(s.q_len, 1) and not E.contains(last, B))):
            return last
    if not is_chosen and not _ends_with_own_keys(region):
        return None
    if isinstance(s.q_len, int) and isinstance(s.kv_len, int) and (s.kv_len - s.q_len) % MAP_BLOCK == 0:
        return E.add(Q, const(s.kv_len - s.q_len))
    return E.add(Q, SKV, E.neg(SQ))


def _last_key(condition: Expr, region: AttentionRegion) -> Expr | None:
    """x of ``kv <= x``, a whole number that does not depend on the key."""
    op, args = condition.op, condition.args
    if op == "not":
        # Of what is loaded it is not known by form that it is a number.
        op, args = {">": "<=", "<": ">="}.get(args[0].op, ""), args[0].args
    if op not in ("<=", ">="):
        return None
    key, last = args if op == "<=" else reversed(args)
    if key != KV or E.contains(last, KV):
        return None
    captures = region.scope.captures
    loads = [n.args[0] for n in E.walk(last) if n.op == "load"]
    whole = E.is_integral(E.substitute(last, lambda n: const(0) if n.op == "load" else None))
    is_floating = any(dtype_of(captures[name]).is_floating_point for name in loads)
    return last if whole and not is_floating else None


def _ends_with_own_keys(region: AttentionRegion) -> bool:
    """Whether k is a cache with as many new keys behind it as there are queries."""
    node = region.k.node
    while True:
        op = dialect.read(node)
        if op is None:
            return False
        if op.name == "cat":
            pieces, dim = op.args["tensors"], op.get("dim", 0)
            sizes = nodes.shape(pieces[-1]) if len(pieces) > 1 else ()
            return bool(sizes) and same(sizes[dim], region.shape.q_len)
        through = dialect.VIEWS | dialect.CASTS | {"contiguous", "clone", "repeat_interleave", "repeat"}
        if op.name not in through or not isinstance(op.input, fx.Node):
            return False
        node = op.input


# --- buffers ------------------------------------------------------------------------------------


@dataclass
class _Buffers:
    """Tensors of masks as buffers of a graph, one for all sites that read the same."""

    gm: fx.GraphModule
    made: dict[int, fx.Node] = field(default_factory=dict)

    def node(self, tensor: Tensor, like: fx.Node) -> fx.Node:
        if id(tensor) not in self.made:
            name = f"flashfuse_{KEEP}{len(self.made)}"
            self.gm.register_buffer(name, tensor, persistent=False)
            inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
            first = inputs[-1].next if inputs else next(iter(self.gm.graph.nodes))
            with self.gm.graph.inserting_before(first):
                node = self.gm.graph.get_attr(name)
            example = nodes.value(like)
            with unset_fake_temporarily():
                value = (
                    example.fake_mode.from_tensor(tensor, static_shapes=True)
                    if isinstance(example, FakeTensor)
                    else tensor
                )
            node.meta["example_value" if "example_value" in like.meta else "val"] = value
            self.made[id(tensor)] = node
        return self.made[id(tensor)]


# --- density ------------------------------------------------------------------------------------


def _density(mask: Expr | None, shape: AttentionShape, known: Mapping[str, Tensor]) -> float | None:
    """The fraction of scores that ``mask`` leaves, apart from what depends on data; ``None``: not known.

    Of long sequences a few hundred queries are looked at.
    """
    closed = [c for c in conditions(mask) if all(n.args[0] in known for n in E.walk(c) if n.op == "load")]
    condition = E.logical_and(*closed)
    used = E.variables(condition)
    lead = (shape.batch if "b" in used else 1, shape.num_q_heads if "h" in used else 1)
    sizes: tuple[Any, ...] = (*lead, shape.q_len, shape.kv_len)
    if not all(isinstance(n, int) for n in sizes) or used - {"b", "h", "q", "kv", "Sq", "Skv"}:
        return None
    with unset_fake_temporarily():
        program = ScoreProgram(ZERO, condition)
        env = environment(program, [known[name] for name in program.captures], (), sizes, "cpu")
        count = max(16, min(512, _SAMPLE // (sizes[0] * sizes[1] * sizes[3])))
        if count < shape.q_len:
            # One out of each stretch: rows at equal distances would be alike to a pattern.
            places = torch.rand(count, generator=torch.Generator().manual_seed(0)) + torch.arange(count)
            env["q"] = (places * (shape.q_len / count)).long().clamp(max=shape.q_len - 1).view(1, 1, -1, 1)
        allowed = torch.as_tensor(evaluate(condition, env)) != 0
        rows = env["q"]
        assert isinstance(rows, Tensor)
        return float(allowed.expand(*lead, rows.numel(), shape.kv_len).double().mean())
