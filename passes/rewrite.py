"""Emit: put one operator in the place of each planned site, and leave every other node alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from flashfuse.kernels import expr as E
from flashfuse.kernels.expr import KV, B, Expr, H, Q, const
from flashfuse.kernels.ops import OPERATORS
from flashfuse.kernels.spec import Reason
from flashfuse.passes import dialect, nodes
from flashfuse.passes.contraction import SUMMED
from flashfuse.passes.indices import Index
from flashfuse.passes.operands import Operand, digit, folded_heads_of
from flashfuse.passes.plan import Fuse, Left, SitePlan
from flashfuse.passes.region import AttentionRegion
from flashfuse.passes.tables import Call, Capture, Length, Table, arguments


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be changed; parameters and submodules are shared."""
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, mapping)
    if result is not None:
        graph.output(result)
        next(iter(reversed(graph.nodes))).meta = dict(next(iter(reversed(gm.graph.nodes))).meta)
    copied = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    copied.meta = dict(gm.meta)
    copied.train(gm.training)
    return copied


def rewrite(gm: fx.GraphModule, plans: Sequence[SitePlan]) -> tuple[SitePlan, ...]:
    """Change ``gm`` (a copy that the plans were made on); returns what came of each plan.

    A site whose replacement would not have the original's shape, dtype and device is left.
    """
    emitter = Emitter(gm.graph)
    used = [n for n in gm.graph.nodes if n.users]
    done: list[SitePlan] = []
    for plan in plans:
        done.append(emitter.replace(plan) if isinstance(plan, Fuse) else plan)
    fused = [p.region for p in done if isinstance(p, Fuse)]
    ours = {n for region in fused for n in (region.output, *region.interior, *region.masks)}
    _erase_unused(gm.graph, ours)
    emitter.erase_unused_weights()
    if fused:
        left = set(gm.graph.nodes)
        for node in reversed([n for n in used if n in left]):
            # Views that only a site read, such as the transposed k.
            if not node.users and dialect.read(node) is not None and not dialect.writes(node):
                gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return tuple(done)


def _erase_unused(graph: fx.Graph, candidates: set[fx.Node]) -> None:
    """Remove what only the rewritten sites needed; nodes with effects stay."""
    pending = sorted(candidates, key={n: i for i, n in enumerate(graph.nodes)}.__getitem__, reverse=True)
    outside = {w for n in graph.nodes if n not in candidates for w in dialect.writes(n)}
    for node in pending:
        effect = [w for w in dialect.writes(node) if w not in candidates]
        if not node.users and node.op not in ("placeholder", "output") and not effect and node not in outside:
            graph.erase_node(node)


@dataclass
class Emitter:
    """Adds nodes to a graph, with example values where the graph has them."""

    graph: fx.Graph
    maps: dict[Any, list[fx.Node]] = field(default_factory=dict)
    seeds: dict[fx.Node, tuple[Any, fx.Node]] = field(default_factory=dict)
    """By the dropped weights that several products may share: how they are indexed, and the seed."""
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What stands for outputs and weights of earlier sites, which later ones may read."""
    tables: dict[Any, Any] = field(default_factory=dict)
    """What recipes of tables made: one node for all sites that ask for the same."""
    batch_holders: list[tuple[fx.Node, int]] = field(default_factory=list)
    """Where the size of the batch can be read, for an operand that the batch shares."""
    _key: str = "val"
    _template: dict[str, Any] = field(default_factory=dict)
    _mode: Any = None
    _for_weights: list[fx.Node] = field(default_factory=list)
    """Nodes added for weights that something else uses; maybe only another site that is replaced too."""

    # --- nodes ----------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node with its example value."""
        op = "call_method" if isinstance(target, str) else "call_function"
        values = fx.map_arg((args, kwargs), nodes.value)
        run = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with self._mode or contextlib.nullcontext():
            example = run(*values[0], **values[1])
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta = dict(self._template)
        node.meta[self._key] = example
        return node

    def size(self, size: Any, holders: Iterable[tuple[fx.Node, int]]) -> Any:
        """A size as a literal, an integer node of the graph, or the size of a tensor in ``holders``."""
        if isinstance(size, int):
            return size
        for node in self.graph.nodes:
            example = nodes.value(node)
            known = node.op == "placeholder" and isinstance(example, torch.SymInt)
            if known and nodes.same(nodes.size_of(example), size):
                return node
        for node, dim in holders:
            if nodes.same(nodes.shape(node)[dim], size):
                return self.call(torch.ops.aten.sym_size.int, node, dim)
        raise NotEmittable(f"no tensor of the graph has the size {size}")

    # --- sites ----------------------------------------------------------------------------------

    def replace(self, plan: Fuse) -> SitePlan:
        """Put the operator in the place of the site."""
        region = self.with_used_results(plan.region)
        before = set(self.graph.nodes)
        self._key = "example_value" if "example_value" in region.output.meta else "val"
        self._template = {
            k: v
            for k, v in region.output.meta.items()
            if k in ("stack_trace", "nn_module_stack", "source_fn_stack")
        }
        for_weights, seeds = len(self._for_weights), dict(self.seeds)
        try:
            with self.graph.inserting_before(region.output):
                current = region.mapped({n: self.replaced.get(n, n) for n in region.inputs})
                results = self.site(
                    current, plan.selection.variant.name, plan.selection.variant.needs_block_map
                )
            for node, result in results.items():
                made, example = nodes.value(result), nodes.value(node)
                if (made.shape, made.dtype, made.device) != (example.shape, example.dtype, example.device):
                    raise NotEmittable(
                        f"{made.shape} {made.dtype} instead of {example.shape} {example.dtype}"
                    )
        except Exception as error:
            # Whatever goes wrong here, the user's graph must stay as it was.
            for node in reversed([n for n in self.graph.nodes if n not in before]):
                self.graph.erase_node(node)
            self.maps = {k: v for k, v in self.maps.items() if all(n in before for n in v)}
            self.seeds = seeds
            del self._for_weights[for_weights:]
            self.tables = {k: n for k, n in self.tables.items() if n in before}
            return Left(
                region, (Reason("emit", f"the replacement could not be built: {error}", region.source),)
            )
        of_rows = {r.node for r in region.row_results}
        for node, result in results.items():
            # A row's maximum may be what the site's own nodes, which stand before it, are shifted by.
            own = set(region.interior if node in of_rows else ())
            node.replace_all_uses_with(result, delete_user_cb=functools.partial(_is_other, own))
            self.replaced.setdefault(node, result)
        return plan

    def with_used_results(self, region: AttentionRegion) -> AttentionRegion:
        """Without results of rows that an earlier site with the same scores has taken over."""
        used = [r for r in region.row_results if any(user not in region.interior for user in r.node.users)]
        return dataclasses.replace(region, row_results=tuple(used))

    def site(self, region: AttentionRegion, variant: str, needs_block_map: bool) -> dict[fx.Node, fx.Node]:
        """The operator calls for ``region`` and what brings inputs and outputs into order.

        Returns what stands for the region's output, for each of its weights that something else uses, and
        for its results of rows.
        """
        s, program = region.shape, region.program
        example = nodes.value(region.output)
        self.batch_holders = [(o.node, d) for o in region.operands for d in range(len(nodes.shape(o.node)))]
        # randint and the like take no tensor that would say that values are fake.
        self._mode = example.fake_mode if isinstance(example, FakeTensor) else None
        seed: fx.Node | None = None
        results: dict[fx.Node, fx.Node] = {}
        if region.weights:
            seed, results = self.weights(region, variant)
        q, k = self.queries_and_keys(region)
        v = self.bhsd(region.v, KV, s.batch, s.num_q_heads, s.num_kv_heads, s.dtype)
        v = self.scaled(v, region, "v")
        if nodes.value(v).dtype != s.dtype:
            v = self.call("to", v, s.dtype)
        captures = [self.capture(region.scope.captures[name], q) for name in program.captures]
        holders = [(n, d) for n in (q, k, v, *captures) for d in range(len(nodes.shape(n)))]
        ints = [self.size(region.scope.ints[name], holders) for name in program.ints]
        maps: list[fx.Node] = []
        if needs_block_map and program.mask is not None:
            maps = self.block_map(region, q, k, holders)
        if region.dropout_p and seed is None:
            seed = self.seed(q)
        has_max = any(r.kind == "max" for r in region.row_results)
        made = self.call(
            OPERATORS[has_max],
            q, k, v, captures, ints, maps, seed, program.text, region.dropout_p, variant,
        )  # fmt: skip
        out = self.scaled(self.call(operator.getitem, made, 0), region, "out")
        results[region.output] = self.restore(out, region.output, region.out_index, (SUMMED,), region)
        for r in region.row_results:
            rows = self.call(operator.getitem, made, 1 if r.kind == "lse" else 2)
            rows = self.restore(rows, r.node, r.index, (), region)
            results[r.node] = self.call("detach", rows) if r.kind == "lse" and r.detached else rows
        return results

    def scaled(self, x: fx.Node, region: AttentionRegion, onto: str) -> fx.Node:
        """[B, H, S, D] times the factors of the weights that it takes."""
        for gate in region.gates:
            if gate.onto != onto:
                continue
            factor: Any = gate.node
            if isinstance(factor, fx.Node):
                factor = self.ordered(Operand(factor, gate.index), KV if onto == "v" else Q)
                own, heads = nodes.shape(factor)[1], nodes.shape(x)[1]
                if not nodes.same(own, 1) and not nodes.same(own, heads):
                    factor = self.call("repeat_interleave", factor, heads // own, 1)
            x = self.call("div" if gate.divides else "mul", x, factor)
        return x

    def queries_and_keys(self, region: AttentionRegion) -> tuple[fx.Node, fx.Node]:
        """q [B, H, Sq, D] and k [B, H_kv, Skv, D]; rows of further products lie beside them."""
        s = region.shape
        qs, ks = [region.q, *(q for q, _ in region.beside)], [region.k, *(k for _, k in region.beside)]
        q = self.side_by_side([self.bhsd(o, Q, s.batch, s.num_q_heads, s.num_q_heads, s.dtype) for o in qs])
        k = self.side_by_side([self.bhsd(o, KV, s.batch, s.num_q_heads, s.num_kv_heads, s.dtype) for o in ks])
        return q, k

    def seed(self, q: fx.Node) -> fx.Node:
        return self.call(torch.randint, 0, 2**62, (1,), dtype=torch.int64, device=nodes.value(q).device)

    def weights(self, region: AttentionRegion, variant: str) -> tuple[fx.Node | None, dict[fx.Node, fx.Node]]:
        """The weights of ``region`` that something else uses, and the seed of those that are dropped.

        They are made where the first of them is in the user's graph.
        """
        s, program = region.shape, region.program
        before = set(self.graph.nodes)
        seed, results = None, {}
        wanted = {w.node for w in region.weights}
        first = next((n for n in self.graph.nodes if n in wanted), None)
        with self.graph.inserting_before(first) if first is not None else contextlib.nullcontext():
            dropped = next((w for w in region.weights if w.dropped), None)
            q, k = self.queries_and_keys(region)
            captures = [self.capture(region.scope.captures[name], q) for name in program.captures]
            holders = [(n, d) for n in (q, k, *captures) for d in range(len(nodes.shape(n)))]
            ints = [self.size(region.scope.ints[name], holders) for name in program.ints]
            if dropped is not None:
                way = (dropped.index, s.batch, s.num_q_heads, s.q_len, s.kv_len, region.dropout_p, variant)
                if dropped.node not in self.seeds:
                    self.seeds[dropped.node] = (way, self.seed(q))
                known, seed = self.seeds[dropped.node]
                if known != way:
                    raise NotEmittable("two products read the dropped weights in different ways")
            for w in region.weights:
                made = self.call(
                    torch.ops.flashfuse.attention_weights.default,
                    q, k, captures, ints, seed if w.dropped else None, program.text,
                    region.dropout_p if w.dropped else 0.0, variant, nodes.value(w.node).dtype,
                )  # fmt: skip
                results[w.node] = self.restore(made, w.node, w.index, (KV,), region)
        self._for_weights += [n for n in self.graph.nodes if n not in before]
        return seed, results

    def erase_unused_weights(self) -> None:
        """Remove weights that only other sites used, which make them themselves."""
        for node in reversed(self._for_weights):
            if not node.users:
                self.graph.erase_node(node)
        self._for_weights.clear()

    def block_map(self, region: AttentionRegion, q: fx.Node, k: fx.Node, holders: Any) -> list[fx.Node]:
        """The block map of the site's mask, made once for all sites that share it."""
        mask = region.program.mask_program
        sources = [region.scope.captures[name] for name in mask.captures]
        s = region.shape
        key = (mask.text, tuple(sources), s.batch, s.num_q_heads, s.q_len, s.kv_len)
        if key not in self.maps:
            ints = [self.size(region.scope.ints[name], holders) for name in mask.ints]
            sizes = [self.size(n, holders) for n in (s.batch, s.num_q_heads, s.q_len, s.kv_len)]
            captures = [self.capture(source, q) for source in sources]
            pair = self.call(torch.ops.flashfuse.block_map.default, captures, ints, q, *sizes, mask.text)
            self.maps[key] = [self.call(operator.getitem, pair, i) for i in (0, 1)]
        return self.maps[key]

    def capture(self, capture: Capture, q: fx.Node) -> fx.Node:
        """A captured tensor as the program indexes it, where q is; one without dimensions has one element."""
        if isinstance(capture, Table):
            node = self.made(capture.recipe)
            if nodes.value(node).dtype != capture.dtype:
                raise NotEmittable(f"a table of {nodes.value(node).dtype} instead of {capture.dtype}")
        else:
            node = capture if nodes.shape(capture) else self.call("reshape", capture, (1,))
        device = nodes.value(q).device
        return node if nodes.value(node).device == device else self.made(Call("to", node, device))

    def made(self, x: Any) -> Any:
        """What a recipe makes: a node, or the number that a length is."""
        if isinstance(x, fx.Node):
            return x
        if x not in self.tables:
            if isinstance(x, Length):
                self.tables[x] = self.length(x.size)
            else:
                args, kwargs = arguments(x.args, self.made), arguments(x.kwargs, self.made)
                self.tables[x] = self.call(x.target, *args, **kwargs)
        return self.tables[x]

    def length(self, size: Any) -> Any:
        """A sum of products of sizes as a number or a node."""
        if isinstance(size, (sympy.Add, sympy.Mul)):
            join = operator.add if isinstance(size, sympy.Add) else operator.mul
            return functools.reduce(functools.partial(self.call, join), map(self.length, size.args))
        if isinstance(size, sympy.Integer):
            return int(size)
        return self.size(size, self.batch_holders)

    def side_by_side(self, rows: list[fx.Node]) -> fx.Node:
        return rows[0] if len(rows) == 1 else self.call(torch.cat, rows, -1)

    def bhsd(
        self, operand: Operand, row: Expr, batch: Any, heads: Any, own_heads: Any, dtype: torch.dtype
    ) -> fx.Node:
        """A view of ``operand`` as [B, own_heads, S, D]; ``dtype`` where autocast would have cast."""
        node = self.ordered(operand, row)
        present = nodes.shape(node)
        if not nodes.same(present[0], batch):
            node = self.call("expand", node, self.size(batch, self.batch_holders), -1, -1, -1)
        if not nodes.same(present[1], own_heads):
            node = self.call("repeat_interleave", node, heads // present[1], 1)
        if nodes.value(node).dtype != dtype:
            node = self.call("to", node, dtype)
        return node

    def ordered(self, operand: Operand, row: Expr) -> fx.Node:
        """A view of ``operand`` with its own batch, heads, rows and columns, 1 of what it has none of."""
        node, labels = operand.node, list(operand.index)
        for dim, e in enumerate(labels):
            count = folded_heads_of(e)
            if count is not None:
                node = self.call("unflatten", node, dim, (-1, count))
                labels[dim : dim + 1] = [B, H]
                break
        labels = _named(labels, [role for role in (B, H) if all(not E.contains(e, role) for e in labels)])
        for dim in reversed(range(len(labels))):
            if labels[dim] == const(0):
                node = self.call("select", node, dim, 0)
                del labels[dim]
        roles = (B, H, row, SUMMED)
        digits = [d for d in map(digit, labels) if d is not None]
        ordered = sorted(digits, key=lambda d: (roles.index(d.variable), -d.divisor))
        permutation = [digits.index(d) for d in ordered]
        if permutation != sorted(permutation):
            node = self.call("permute", node, permutation)
        for position, role in enumerate(roles):
            count = sum(1 for d in digits if d.variable == role)
            if count > 1:
                node = self.call("flatten", node, position, position + count - 1)
            elif count == 0:
                node = self.call("unsqueeze", node, position)
        return node

    def restore(
        self, out: fx.Node, node: fx.Node, index: Index, columns: tuple[Expr, ...], region: AttentionRegion
    ) -> fx.Node:
        """An operator's [B, H, Sq, *``columns``] result in the shape, dtype and strides of ``node``."""
        labels: list[Expr] = [B, H, Q, *columns]
        flat = next((e for e in index if folded_heads_of(e) is not None), None)
        target = _named(index, [role for role in labels if all(not E.contains(e, role) for e in index)])
        sizes = dict(zip(target, nodes.shape(node), strict=True))
        for position, role in reversed([*enumerate(labels)]):
            own = [e for e in target if e != flat and E.contains(e, role)]
            own.sort(key=lambda e: -_divisor(e))
            if not own and (flat is None or role not in (B, H)):
                out = self.call("select", out, position, 0)
            elif len(own) > 1:
                holders = [(region.q.node, d) for d in range(len(nodes.shape(region.q.node)))]
                lengths = [-1, *(self.size(sizes[e], holders) for e in own[1:])]
                out = self.call("unflatten", out, position, lengths)
            labels[position : position + 1] = own if own or flat is None or role not in (B, H) else [role]
        wanted: list[Expr] = []
        for e in target:
            if e != const(0):
                wanted += [B, H] if e == flat else [e]
        permutation = [labels.index(e) for e in wanted]
        if permutation != sorted(permutation):
            out = self.call("permute", out, permutation)
        if flat is not None:
            at = wanted.index(B)
            out = self.call("flatten", out, at, at + 1)
        for position, e in enumerate(target):
            if e == const(0):
                out = self.call("unsqueeze", out, position)
        original = nodes.value(node)
        if nodes.value(out).dtype != original.dtype:
            out = self.call("to", out, original.dtype)
        if nodes.written_to(node):
            # The operator keeps its output for the backward, and autograd lets nobody write to a view of it.
            return self.call("clone", out, memory_format=torch.contiguous_format)
        if nodes.value(out).stride() != original.stride():
            with self._mode or contextlib.nullcontext():
                seen = _strides_seen(node, nodes.value(out))
            if seen:
                out = self.laid_out_like(original, out)
        return out

    def laid_out_like(self, original: torch.Tensor, out: fx.Node) -> fx.Node:
        """A copy of ``out`` with the strides of ``original``, whose memory has no gaps."""
        order = next(
            filter(functools.partial(_is_order_of, original), itertools.permutations(range(original.ndim))),
            None,
        )
        if order is None or list(order) == sorted(order):
            return self.call("contiguous", out)
        copied = self.call("contiguous", self.call("permute", out, order))
        return self.call("permute", copied, [order.index(d) for d in range(original.ndim)])


def _is_other(own: set[fx.Node], user: fx.Node) -> bool:
    return user not in own


def _is_order_of(original: torch.Tensor, order: Sequence[int]) -> bool:
    """Whether the dimensions of ``original`` lie in memory in this order, the last one closest."""
    expected: Any = 1
    for d in reversed(order):
        size, stride = (nodes.size_of(n) for n in (original.shape[d], original.stride(d)))
        if not nodes.same(size, 1):
            if not nodes.same(stride, expected):
                return False
            expected = expected * size
    return True


def _divisor(e: Expr) -> int:
    found = digit(e)
    assert found is not None
    return found.divisor


def _named(labels: Sequence[Expr], roles: list[Expr]) -> list[Expr]:
    """``labels`` with dimensions of size 1 named by the roles that nothing else plays."""
    return [roles.pop(0) if e == const(0) and roles else e for e in labels]


class NotEmittable(Exception):
    """The replacement cannot be written down in this graph."""


def _strides_seen(node: fx.Node, ours: torch.Tensor, depth: int = 4) -> bool:
    """True when the graph can tell ``ours`` from the value of ``node``, which has other strides."""
    if depth == 0 or not node.users:
        return True
    for user in node.users:
        op = dialect.read(user)
        if op is None or dialect.writes(user):
            return True
        if op.name == "matmul":
            continue
        others = [n for n in user.all_input_nodes if n is not node and nodes.tensor(n) is not None]
        example = nodes.tensor(user)
        if op.name not in dialect.VIEWS | {"contiguous"} or others or example is None:
            return True
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: ours if n is node else nodes.value(n))
        run = getattr(torch.Tensor, user.target) if isinstance(user.target, str) else user.target
        try:
            result = run(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):
            # A view that these strides do not allow.
            return True
        if result.stride() != example.stride() and _strides_seen(user, result, depth - 1):
            return True
    return False
