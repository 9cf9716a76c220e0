"""One site on its own: the user's nodes and their replacement as graphs, and what to feed them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flashfuse.approximation import by_definition
from flashfuse.footprint import devices_of
from flashfuse.inputs import Draw, InputSet, input_sets, normal
from flashfuse.kernels import dispatch
from flashfuse.kernels.ops import OPERATORS
from flashfuse.kernels.reference import environment, evaluate
from flashfuse.kernels.spec import ScoreProgram, differentiable_loads
from flashfuse.numbers import check_runs, drop, exact_copy, same_bits, sdpa_math
from flashfuse.passes import dialect, nodes
from flashfuse.passes.plan import Fuse
from flashfuse.passes.region import AttentionRegion
from flashfuse.passes.rewrite import Emitter
from flashfuse.proof.key import BESIDE, FACTOR, cut_nodes, site_nodes
from flashfuse.report import CheckItem

# --- the user's nodes ---------------------------------------------------------------------------


def original_graph(
    region: AttentionRegion, given: Mapping[str, Tensor] | None = None
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The user's own nodes of ``region`` in a graph of their own, and where each went.

    The inputs are those ``given``, the cut (``q k v`` and the captures, by these names), and then the
    other leaves.  Where a ``dropout_keep`` mask is given, dropout of the weights takes it.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    names: set[str] = set()

    def placeholder(name: str, example: Any) -> fx.Node:
        while name in names:
            name += "_"
        names.add(name)
        new = graph.placeholder(name)
        new.meta["val"] = example
        return new

    extra = {name: placeholder(name, value) for name, value in (given or {}).items()}
    for node, name in cut_nodes(region).items():
        mapping[node] = placeholder(name, nodes.value(node))
    found = [(node, is_leaf) for node, is_leaf in site_nodes(region) if node not in mapping]
    for node, is_leaf in found:
        if is_leaf:
            mapping[node] = placeholder(node.name, nodes.value(node))
    for node, is_leaf in found:
        if is_leaf:
            continue
        new = None
        if "dropout_keep" in extra:
            new = _with_mask(region, graph, node, mapping, extra["dropout_keep"])
        mapping[node] = new or graph.node_copy(node, lambda n: mapping[n])
    outputs = tuple(mapping[n] for n in region.outputs)
    graph.output(outputs if len(outputs) > 1 else outputs[0])
    return graph, mapping


def _with_mask(
    region: AttentionRegion, graph: fx.Graph, node: fx.Node, mapping: dict[fx.Node, fx.Node], keep: fx.Node
) -> fx.Node | None:
    """``node`` with the mask ``keep`` where it is the dropout of the weights, else ``None``."""
    op = dialect.read(node)
    if op is None:
        return None
    if op.name == "scaled_dot_product_attention":
        args = fx.map_arg(op.args, lambda n: mapping[n])
        return graph.call_function(sdpa_math, (), {**args, "keep": keep})
    if node not in region.interior or op.name not in ("dropout", "native_dropout"):
        return None
    dropped = graph.call_function(drop, (mapping[op.input], keep, region.dropout_p))
    return dropped if op.name == "dropout" else graph.call_function(_pair, (dropped, keep))


def _pair(dropped: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return dropped, keep


def autocast_around(region: AttentionRegion) -> list[tuple[Any, ...]]:
    """The arguments of the autocast regions that the site stands in, within its graph, outermost first."""
    entered: dict[fx.Node, tuple[Any, ...]] = {}
    for node in region.output.graph.nodes:
        if node is region.output:
            break
        if node.target is torch.amp.autocast_mode._enter_autocast:
            entered[node] = node.args
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            entered.pop(node.args[0], None)
    if not entered:
        operands = [nodes.value(o.node) for o in (region.q, region.k, region.v)]
        widest = torch.promote_types(operands[0].dtype, operands[1].dtype)
        if torch.promote_types(widest, operands[2].dtype) != region.shape.dtype:
            # A graph inside an autocast region, which says so outside of it.
            return [(operands[0].device.type, region.shape.dtype)]
    return list(entered.values())


def _within(autocasts: Sequence[tuple[Any, ...]], run: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for autocast in autocasts:
                stack.enter_context(torch.autocast(*autocast))
            return run(*args)

    return inside if autocasts else run


# --- original and replacement -------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A site on its own: three functions of the same inputs.

    Attributes:
        original, ours: in the dtypes and the autocast regions of the model.
        reference: the original in float64.
        operator: the graph of ``ours``, for :meth:`arguments`.
        program: what it computes, and in which dtype.
        names, examples: of the inputs, with fake values.
        given: inputs that are not drawn: the keep mask of dropout and its seed.
        weights: the names of weights among the outputs.
        repeatable: whether two runs are to give the same bits.
    """

    original: Callable[..., Any]
    ours: Callable[..., Any]
    reference: fx.GraphModule
    operator: fx.GraphModule
    program: ScoreProgram
    computed_in: torch.dtype
    names: tuple[str, ...]
    examples: tuple[Any, ...]
    given: Mapping[str, Tensor]
    weights: tuple[str, ...] = ()
    repeatable: bool = True

    def check(self) -> tuple[CheckItem, ...]:
        """Outputs and gradients under the rule on every set of inputs, and twice for the same bits.

        Kernels that do not promise the same bits are not asked for them.
        """
        items: tuple[CheckItem, ...] = ()
        for kind in input_sets(self):
            try:
                items += check_runs(
                    self.original, self.ours, self.reference, kind.inputs, self.names, True, kind.name,
                    self.inherent(kind), self.computed_in,
                )  # fmt: skip
            except RuntimeError:
                if not kind.may_not_run or _runs(self.original, kind.inputs):
                    raise
        if not self.repeatable:
            return items
        return (*items, same_bits(self.ours, self.random_inputs(), self.names, ("q", "k", "v")))

    def inherent(self, kind: InputSet) -> dict[str, float]:
        """By name: the size of what a fused kernel has to round, where that is larger than the result."""
        found = self.sizes_of_sums(kind.inputs)
        if kind.cancels:
            q, k, v, captures, ints = self.arguments(kind.inputs)[:5]
            found |= magnitudes(q, k, v, captures, ints, self.program, self.weights)
            found |= {name: found["out"] for name in self.names if FACTOR.match(name)}
            return found | {name: found[name[0]] for name in self.names if BESIDE.match(name)}
        if self.program.sink is not None and not self.program.sink.is_const:
            # A sum over rows of P_sink · Σ P dP, each of which is rounded, and which cancel each other.
            q, k, v, captures, ints = self.arguments(kind.inputs)[:5]
            sizes = magnitudes(q, k, v, captures, ints, self.program, of_scores=False)
            sinks = differentiable_loads(self.program.sink)
            sums = {n: c.numel() for n, c in zip(self.program.captures, captures, strict=True) if n in sinks}
            # Σ |terms| / √n: n roundings of independent signs.
            rows = q[..., 0].numel()
            return found | {
                n: sizes[n] / math.sqrt(max(1, rows / size)) for n, size in sums.items() if n in sizes
            }
        if kind.flushes and any(device.type == "cuda" for device in devices_of(kind.inputs)):
            # A few products below the smallest normal number, each taken for 0.
            size = 4 * torch.finfo(torch.float32).smallest_normal / torch.finfo(self.computed_in).eps
            return dict.fromkeys(("out", *self.weights, *self.names), size) | found
        return found

    def sizes_of_sums(self, inputs: Sequence[Any]) -> dict[str, float]:
        """For each factor of the weights: how far its gradient moves, which is a sum of n rounded outputs.

        Roundings have independent signs, so by √n of them; the smallest numbers have one of their own.
        """
        factors = {n: x for n, x in zip(self.names, inputs, strict=True) if FACTOR.match(n)}
        if not factors:
            return {}
        q, _, v = self.arguments(inputs)[:3]
        rounded, least = float(v.square().mean().sqrt()), torch.finfo(self.computed_in).smallest_normal
        terms = {n: q[..., 0].numel() * v.shape[-1] / max(1, x.numel()) for n, x in factors.items()}
        return {name: math.sqrt(n) * rounded + n * least for name, n in terms.items()}

    def random_inputs(self, draws: Mapping[str, Draw] | None = None) -> list[Any]:
        """Real inputs like the examples; ``draws`` says by name how some are drawn."""
        generator = torch.Generator().manual_seed(0)
        draws = draws or {}
        return [
            self.given[name] if name in self.given else draws.get(name, normal)(example, generator)
            for name, example in zip(self.names, self.examples, strict=True)
        ]

    def arguments(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What the fused operator is called with, in float64."""
        found: list[tuple[Any, ...]] = []

        def probe(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
            found.append(args)
            q, _, v = args[:3]
            rows = q.new_zeros(q.shape[:3])
            return q.new_zeros((*q.shape[:3], v.shape[-1])), rows, rows

        probing = exact_copy(self.operator)
        for node in probing.graph.nodes:
            if node.target in OPERATORS:
                node.target = probe
        probing.recompile()
        with torch.no_grad():
            probing(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))
        return found[0]


def _runs(run: Callable[..., Any], inputs: Sequence[Any]) -> bool:
    try:
        with torch.no_grad():
            run(*inputs)
    except RuntimeError:
        return False
    return True


def extract(plan: Fuse) -> Site:
    """The site of ``plan`` with its replacement, cut at q, k, v and the captures."""
    region, s = plan.region, plan.region.shape
    given: dict[str, Tensor] = {}
    if region.dropout_p:
        seed = torch.tensor([20_260_101], dtype=torch.int64, device=nodes.value(region.q.node).device)
        sizes = (s.batch, s.num_q_heads, s.q_len, s.kv_len)
        kernels = dispatch.implementation(plan.selection.variant.name)
        given = {"dropout_keep": kernels.dropout_mask(seed, region.dropout_p, sizes), "dropout_seed": seed}
    graph, mapping = original_graph(region, given)
    owner = region.output.graph.owning_module
    original = fx.GraphModule(owner if owner is not None else {}, graph)
    ours = _replacement(original, region, mapping, plan)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    autocasts = autocast_around(region)
    coarsest = max(s.dtype, nodes.value(region.output).dtype, key=lambda d: torch.finfo(d).eps)
    return Site(
        _within(autocasts, original), _within(autocasts, ours), exact_copy(original), ours,
        region.program, coarsest,
        tuple(str(node.target) for node in inputs), tuple(node.meta["val"] for node in inputs), given,
        tuple(f"out[{i}]" for i in range(1, 1 + len(region.weights))), plan.selection.variant.repeatable,
    )  # fmt: skip


def extract_approximation(plan: Fuse) -> Site:
    """The site of an approximate ``plan``, whose original is attention by definition under the pattern."""
    site = extract(plan)
    defined = by_definition(site.operator)
    original = _within(autocast_around(plan.region), defined)
    return dataclasses.replace(site, original=original, reference=exact_copy(defined))


def _replacement(
    original: fx.GraphModule, region: AttentionRegion, mapping: dict[fx.Node, fx.Node], plan: Fuse
) -> fx.GraphModule:
    """The operator over the inputs of ``original``, as the rewrite emits it."""
    graph = fx.Graph()
    inputs = {n: graph.node_copy(n) for n in original.graph.nodes if n.op == "placeholder"}
    here = {old: inputs[new] for old, new in mapping.items() if new in inputs}
    variant = plan.selection.variant
    results = Emitter(graph).site(region.mapped(here), variant.name, variant.needs_block_map)
    outputs = tuple(results[n] for n in region.outputs)
    graph.output(outputs if len(outputs) > 1 else outputs[0])
    seed = next((new for new in inputs.values() if new.target == "dropout_seed"), None)
    for node in graph.nodes:
        if seed is not None and node.target is torch.randint:
            node.replace_all_uses_with(seed)
            graph.erase_node(node)
    return fx.GraphModule({}, graph)


# --- what rounding is inherent ------------------------------------------------------------------


def magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    program: ScoreProgram,
    outputs: Sequence[str] = (),
    of_scores: bool = True,
) -> dict[str, float]:
    """What one rounding of the scores makes of the output and of each gradient, per eps.

    The output moves by ``P(1 − P) |v|``, weights among the ``outputs`` by ``P(1 − P)``; gradients are sums of
    ``P ∘ dP``; all times 1 + the largest score.  Without ``of_scores``, what one rounding of the terms makes:
    not times that.
    """
    group = q.shape[1] // k.shape[1]
    products = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)).requires_grad_()
    leaves = [c.clone().requires_grad_(c.is_floating_point()) for c in captures]
    sizes = (*q.shape[:3], k.shape[2])
    env = environment(program, leaves, ints, sizes, q.device) | {"s": products}
    with torch.enable_grad():
        scores = torch.as_tensor(evaluate(program.score, env)).expand(sizes)
        floats = {n: c for n, c in zip(program.captures, leaves, strict=True) if c.requires_grad}
        allowed: Any = True if program.mask is None else evaluate(program.mask, env)
        masked = torch.where(torch.as_tensor(allowed, device=q.device) != 0, scores.detach(), -math.inf)
        logits = [scores]
        if program.sink is not None:
            sink = torch.as_tensor(evaluate(program.sink, env), dtype=q.dtype, device=q.device)
            sink = sink.expand(*sizes[:3], 1)
            masked = torch.cat([masked, sink.detach()], -1)
            logits += [sink] if sink.requires_grad else []
        weights = torch.ops.aten._safe_softmax(masked, -1)
        weights, sink_weight = weights[..., : sizes[3]], weights[..., sizes[3] :]
        do = torch.randn((*sizes[:3], v.shape[-1]), generator=torch.Generator().manual_seed(0), dtype=q.dtype)
        do = do.to(q.device)
        # Weights that are returned have cotangents of their own, of size 1.
        dp = (do @ v.repeat_interleave(group, 1).transpose(-1, -2)).abs() + len(outputs)
        dp = dp * weights
        slopes = [dp, sink_weight * dp.sum(-1, keepdim=True)][: len(logits)]
        grads = torch.autograd.grad(logits, [products, *floats.values()], slopes, allow_unused=True)
    ds = grads[0].abs()
    largest = float(masked[masked.isfinite()].abs().max()) if bool(masked.isfinite().any()) else 0.0

    def by_key(x: Tensor) -> float:
        return float(x.sum(2).unflatten(1, (k.shape[1], group)).sum(2).max())

    found = {
        "out": float((weights * (1 - weights)).sum(-1).max() * v.abs().max()),
        "q": float(ds.sum(-1).max() * k.abs().max()),
        "k": by_key(ds) * float(q.abs().max()),
        "v": by_key(weights) * float(do.abs().max()),
    }
    found |= dict.fromkeys(outputs, float((weights * (1 - weights)).max()))
    found |= {n: float(g.abs().max()) for n, g in zip(floats, grads[1:], strict=True) if g is not None}
    return {name: ((1 + largest) if of_scores else 1.0) * size for name, size in found.items()}
