"""Numbers: the original against its replacement on the real kernels, under one rule.

Equal means: our error against float64 is at most twice the error of the original in its own dtype
against float64, plus the rounding of the value itself; and NaN and infinity stand in the same places.

For the gradients of one site with huge scores, the value whose rounding is allowed is not the
gradient but what it is the difference of: a fused backward recomputes weights from ``lse`` and takes
``P ∘ (dP - delta)``, so one rounding of the scores and of ``P ∘ dP`` is inherent in it.
"""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from flashfuse.kernels import dispatch
from flashfuse.kernels.reference import environment, evaluate
from flashfuse.kernels.spec import Reason, ScoreProgram
from flashfuse.passes import dialect, nodes
from flashfuse.passes.plan import Fuse, Left, SitePlan
from flashfuse.passes.region import AttentionRegion
from flashfuse.passes.rewrite import Emitter, copy_graph_module
from flashfuse.report import CheckItem, ModelCheck, SiteCheck

FACTOR = 2.0
MAX_SITE_BYTES = 6 << 30
"""A site whose float64 score matrices would take more is checked with the whole model only."""


def compare(name: str, ours: Tensor, original: Tensor, exact: Tensor, magnitude: float = 0.0) -> CheckItem:
    """One tensor under the rule.

    Args:
        ours, original: results in their own dtype.
        exact: the float64 reference.
        magnitude: of what is rounded, where that is larger than the value itself.

    Returns:
        Largest absolute errors over the elements that are finite in the original, and the limit.
    """
    eps = torch.finfo(original.dtype).eps
    a, b, x = (t.detach().double() for t in (ours, original, exact))
    if a.shape != b.shape:
        return CheckItem(
            name, math.inf, 0.0, 0.0, False, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        )
    same_special = ((a == b) | (a.isnan() & b.isnan())) | (a.isfinite() & b.isfinite())
    if not bool(same_special.all()):
        where = tuple(int(i) for i in (~same_special).nonzero()[0])
        note = f"{float(a[where])} instead of {float(b[where])} at {where}"
        return CheckItem(name, math.inf, 0.0, 0.0, False, note)
    finite = b.isfinite() & x.isfinite()
    if not bool(finite.any()):
        return CheckItem(name, 0.0, 0.0, 0.0, True, "no finite element" if b.numel() else "empty")
    largest = float(x[finite].abs().max())
    error_ours = float((a - x)[finite].abs().max())
    error_original = float((b - x)[finite].abs().max())
    limit = FACTOR * error_original + eps * max(largest, magnitude)
    if original.dtype == torch.float64:
        # The reference is then no more exact than the original, only rounded in another order.
        limit += 8 * eps * largest
    return CheckItem(name, error_ours, error_original, limit, error_ours <= limit)


# --- float64 copies of graphs -------------------------------------------------------------------

_LOW = {torch.finfo(d).min for d in (torch.float32, torch.bfloat16, torch.float16)}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MADE = {"zeros", "ones", "full", "new_full", "scalar_tensor", "tensor"}
"""What makes a tensor of the default dtype, or of a literal one."""
_CAST_METHODS = {"float", "half", "bfloat16"}


def exact_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` in float64: explicit casts and finite minima are promoted too.

    A ``.double()`` module is no reference by itself: its own ``softmax(dtype=float32)`` would cast
    back, and float32's minimum is not absorbing in float64.
    """
    copied = copy_graph_module(gm)

    def promote(x: Any) -> Any:
        if isinstance(x, torch.dtype) and x in _FLOATS:
            return torch.float64
        if isinstance(x, float) and x in _LOW:
            return torch.finfo(torch.float64).min
        return x

    for node in copied.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, promote)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, promote)
        if node.op == "call_method" and node.target in _CAST_METHODS:
            node.target = "double"
        op = dialect.read(node)
        if (
            op is not None
            and op.name == "where"
            and not any(isinstance(x, fx.Node) for x in (op.get("input"), op.get("other")))
        ):
            # A choice between two numbers has the default dtype, whose range may be smaller.
            node.op, node.target, node.args, node.kwargs = (
                "call_function",
                _choose,
                tuple(op.args.values()),
                {},
            )
        if op is not None and op.name == "scaled_dot_product_attention":
            # By definition: fused kernels have errors of their own, in float64 too.
            node.op, node.target, node.args, node.kwargs = "call_function", sdpa_math, (), op.args
        if op is not None and op.name in _MADE and "dtype" not in node.kwargs:
            example = nodes.tensor(node)
            if example is not None and example.is_floating_point():
                node.kwargs = {**node.kwargs, "dtype": torch.float64}
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, exact_copy(child))
    copied.recompile()
    return copied


def _choose(condition: Tensor, a: bool | int | float, b: bool | int | float) -> Tensor:
    dtype = torch.float64 if isinstance(a, float) or isinstance(b, float) else None
    x, y = (torch.tensor(n, dtype=dtype, device=condition.device) for n in (a, b))
    return torch.where(condition, x, y)


def without_dropout(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with every dropout taken out, so that two graphs can be compared exactly."""
    copied = copy_graph_module(gm)
    for node in list(copied.graph.nodes):
        op = dialect.read(node)
        if op is not None and op.name == "native_dropout":
            node.target, node.args, node.kwargs = torch.native_dropout, (op.input, 0.0, True), {}
        elif op is not None and op.name == "dropout":
            node.replace_all_uses_with(op.input)
            copied.graph.erase_node(node)
        elif op is not None and op.name == "scaled_dot_product_attention" and op.args.get("dropout_p"):
            args = list(node.args)
            if len(args) > 4:
                args[4] = 0.0
            node.args = tuple(args)
            if "dropout_p" in node.kwargs:
                node.kwargs = {**node.kwargs, "dropout_p": 0.0}
        elif node.target is torch.ops.flashfuse.attention.default:
            node.args = (*node.args[:6], None, node.args[7], 0.0, *node.args[9:])
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, without_dropout(child))
    copied.recompile()
    return copied


# --- running ------------------------------------------------------------------------------------


def _run(
    gm: Callable[..., Any], inputs: Sequence[Any], exact: bool, backward: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Float outputs of ``gm``, and the gradients of every float input for fixed cotangents."""

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x.clone() if isinstance(x, Tensor) else x
        x = x.detach().double() if exact else x.detach()
        # clone(preserve_format) keeps strides of dense tensors; expanded ones stay views of a copy.
        return x.clone().requires_grad_(backward)

    own = [fresh(x) for x in inputs]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        torch.manual_seed(0)
        with torch.set_grad_enabled(backward):
            result = gm(*own)
        outputs = [t for t in _tensors(result) if t.is_floating_point()]
        if not backward:
            return outputs, []
        leaves = [x for x in own if isinstance(x, Tensor) and x.requires_grad]
        roots = [t for t in outputs if t.requires_grad]
        if not roots or not leaves:
            return outputs, [None] * len(leaves)
        cotangents = []
        for t in roots:
            generator = torch.Generator().manual_seed(1234)
            # float16 can hold every cotangent exactly, so all three runs see the same ones.
            drawn = torch.randn(t.shape, generator=generator).half()
            cotangents.append(drawn.to(t.device, t.dtype))
        grads = torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)
    return outputs, list(grads)


def _tensors(result: Any) -> Iterable[Tensor]:
    from torch.utils._pytree import tree_leaves

    return (t for t in tree_leaves(result) if isinstance(t, Tensor))


def check_runs(
    original: Callable[..., Any],
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    names: Sequence[str],
    backward: bool,
    note: str = "",
    magnitudes: Mapping[str, float] | None = None,
) -> tuple[CheckItem, ...]:
    """Outputs, and with ``backward`` the gradient of every float input, under the rule."""
    magnitudes = magnitudes or {}
    out_a, grad_a = _run(ours, inputs, False, backward)
    out_b, grad_b = _run(original, inputs, False, backward)
    out_x, grad_x = _run(reference, inputs, True, backward)
    items = []
    for i, (a, b, x) in enumerate(zip(out_a, out_b, out_x, strict=True)):
        items.append(compare("out" if len(out_a) == 1 else f"out[{i}]", a, b, x))
    floats = [
        n for n, t in zip(names, inputs, strict=True) if isinstance(t, Tensor) and t.is_floating_point()
    ]
    grads: Iterable[tuple[str, Any, Any, Any]] = zip(floats, grad_a, grad_b, grad_x, strict=False)
    for name, a, b, x in grads:
        if b is None and a is None:
            continue
        if x is None or b is None:
            b = torch.zeros_like(a) if b is None else b
            x = torch.zeros_like(b, dtype=torch.float64) if x is None else x
        a = torch.zeros_like(b) if a is None else a
        items.append(compare(f"d{name}", a, b, x, magnitudes.get(name, 0.0)))
    if note:
        items = [
            CheckItem(f"{i.name} ({note})", i.error_ours, i.error_original, i.limit, i.ok, i.note)
            for i in items
        ]
    return tuple(items)


def check_graph(
    original: fx.GraphModule, rewritten: fx.GraphModule, inputs: Sequence[Any], backward: bool
) -> ModelCheck:
    """A whole graph against its rewrite on real inputs, dropout taken out of both."""
    plain, ours = without_dropout(original), without_dropout(rewritten)
    names = [_user_name(n) for n in original.graph.nodes if n.op == "placeholder"]
    items = check_runs(plain, ours, exact_copy(plain), inputs, names, backward)
    return ModelCheck(all(i.ok for i in items), items, peak_bytes())


def _user_name(placeholder: fx.Node) -> str:
    """``h.0.attn.weight`` rather than Dynamo's ``l_self_modules_h_modules_0_…_parameters_weight_``."""
    name = re.sub(r"^L?l?_?(model_|self_)*(modules_|kwargs_|args_)?", "", placeholder.name).strip("_")
    return re.sub(r"_(?:modules|parameters|buffers)_", ".", name)


def peak_bytes() -> int:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- one site -----------------------------------------------------------------------------------


@dataclass
class SiteChecker:
    """Checks sites before they are rewritten; identical ones once."""

    done: dict[tuple[Any, ...], SiteCheck] = field(default_factory=dict)

    def check_all(self, plans: Sequence[SitePlan]) -> tuple[tuple[SitePlan, ...], dict[str, SiteCheck]]:
        """The plans with every differing site left, and the check of each site by name."""
        checks: dict[str, SiteCheck] = {}
        kept: list[SitePlan] = []
        for plan in plans:
            check = self.check(plan) if isinstance(plan, Fuse) else None
            if check is not None and isinstance(plan, Fuse):
                checks[plan.region.name] = check
                if not check.ok:
                    failed = next(i for i in check.items if not i.ok)
                    detail = failed.note or f"error {failed.error_ours:.3g}, allowed {failed.limit:.3g}"
                    reason = Reason(
                        "check_failed",
                        f"the fused site differs in {failed.name}: {detail}",
                        plan.region.source,
                    )
                    kept.append(Left(plan.region, (reason,)))
                    continue
            kept.append(plan)
        return tuple(kept), checks

    def check(self, plan: Fuse) -> SiteCheck | None:
        """Original against replacement on random and hostile inputs; ``None`` if it is too large."""
        region = plan.region
        s = region.shape
        sizes = (s.batch, s.num_q_heads, s.q_len, s.kv_len)
        if not all(isinstance(n, int) for n in sizes) or 8 * 6 * math.prod(sizes) > MAX_SITE_BYTES:
            return None
        tensors = [o.node for o in (region.q, region.k, region.v)]
        layout = tuple((nodes.value(n).dtype, nodes.value(n).stride()) for n in tensors)
        key = (region.program.text, s, region.dropout_p, plan.selection.variant.name, layout)
        if key not in self.done:
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                self.done[key] = _check_site(plan)
        return self.done[key]


def _check_site(plan: Fuse) -> SiteCheck:
    region = plan.region
    site = extract(region, plan)
    items: tuple[CheckItem, ...] = ()
    for note, inputs in site.input_sets():
        magnitudes = site.magnitudes(inputs) if note == HUGE else None
        items += check_runs(
            site.original, site.ours, site.reference, inputs, site.names, True, note, magnitudes
        )
    return SiteCheck(all(i.ok for i in items), items)


HUGE = "scores of 1e4"


@dataclass(frozen=True)
class Site:
    """A site on its own: three graphs over the same inputs."""

    original: fx.GraphModule
    ours: fx.GraphModule
    reference: fx.GraphModule
    names: tuple[str, ...]
    examples: tuple[Any, ...]
    keep: Tensor | None
    seed: Tensor | None

    def input_sets(self) -> Iterable[tuple[str, list[Any]]]:
        """Random inputs, then hostile ones: large scores, ties, masked-out rows."""
        yield "", self._inputs(1.0, 0.7)
        yield HUGE, self._inputs(100.0, 0.7)
        yield "ties", self._inputs(0.0, 0.7)
        if any(isinstance(e, Tensor) and not e.is_floating_point() for e in self.examples):
            yield "nothing allowed by stored masks", self._inputs(1.0, 0.0)

    def magnitudes(self, inputs: Sequence[Any]) -> dict[str, float]:
        """By input: the size of what its gradient is the difference of, times the size of the scores."""
        found: dict[str, float] = {}

        def probe(*args: Any) -> tuple[Tensor, Tensor]:
            q, k, v, captures, ints = args[:5]
            found.update(_magnitudes(q, k, v, captures, ints, ScoreProgram.parse(args[7])))
            return q.new_zeros((*q.shape[:3], v.shape[-1])), q.new_zeros(q.shape[:3])

        probing = exact_copy(self.ours)
        for node in probing.graph.nodes:
            if node.target is torch.ops.flashfuse.attention.default:
                node.target = probe
        probing.recompile()
        with torch.no_grad():
            probing(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))
        return found

    def _inputs(self, scale: float, allowed: float) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        made = []
        for name, example in zip(self.names, self.examples, strict=True):
            if name == "dropout_keep":
                made.append(self.keep)
            elif name == "dropout_seed":
                made.append(self.seed)
            else:
                factor = scale if name in ("q", "k") else 1.0
                made.append(_random_like(example, factor, allowed, generator))
        return made


def _random_like(example: Tensor, scale: float, allowed: float, generator: torch.Generator) -> Tensor:
    """A real tensor with the sizes, strides, dtype and device of ``example``."""
    base = [1 if stride == 0 else n for n, stride in zip(example.shape, example.stride(), strict=True)]
    if example.is_floating_point():
        drawn = torch.randn(base, generator=generator) * scale
    else:
        drawn = torch.rand(base, generator=generator) < allowed
    strides = example.stride()
    order = sorted(range(len(base)), key=lambda d: (-strides[d], d))
    laid_out = drawn.permute(order).contiguous().permute([order.index(d) for d in range(len(base))])
    return laid_out.to(example.device, example.dtype).expand(example.shape)


def extract(region: AttentionRegion, plan: Fuse) -> Site:
    """The nodes of ``region`` as graphs of their own, cut at q, k, v and the captures."""
    roles = {region.q.node: "q"}
    for node, role in ((region.k.node, "k"), (region.v.node, "v")):
        roles.setdefault(node, role)
    cut = dict(roles)
    for name in region.program.captures:
        cut.setdefault(region.scope.captures[name], name)
    graph, mapping = fx.Graph(), {}
    names: list[str] = []
    examples: list[Any] = []

    def placeholder(name: str, example: Any) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = example
        names.append(name)
        examples.append(example)
        return node

    for node, name in cut.items():
        mapping[node] = placeholder(name, nodes.value(node))
    needed, pending = set(), [region.output]
    while pending:
        node = pending.pop()
        if node in needed or node in mapping:
            continue
        needed.add(node)
        pending += node.all_input_nodes
    p = region.dropout_p
    s = region.shape
    keep = seed = None
    keep_node = seed_node = None
    if p:
        device = nodes.value(region.q.node).device
        seed = torch.tensor([20_260_101], dtype=torch.int64, device=device)
        sizes = (s.batch, s.num_q_heads, s.q_len, s.kv_len)
        keep = dispatch.implementation(plan.selection.variant.name).dropout_mask(seed, p, sizes)
        keep_node, seed_node = placeholder("dropout_keep", keep), placeholder("dropout_seed", seed)
    for node in region.output.graph.nodes:
        if node not in needed:
            continue
        if node.op in ("placeholder", "get_attr"):
            mapping[node] = placeholder(node.name, nodes.value(node))
            continue
        op = dialect.read(node)
        if p and op is not None and op.name == "dropout" and node in region.interior:
            mapping[node] = graph.call_function(_drop, (mapping[op.input], keep_node, p))
        elif p and op is not None and op.name == "native_dropout" and node in region.interior:
            dropped = graph.call_function(_drop, (mapping[op.input], keep_node, p))
            mapping[node] = graph.call_function(lambda x, keep: (x, keep), (dropped, keep_node))
        elif p and op is not None and op.name == "scaled_dot_product_attention":
            args = fx.map_arg(op.args, lambda n: mapping[n])
            mapping[node] = graph.call_function(sdpa_math, (), {**args, "keep": keep_node})
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(mapping[region.output])
    owner = region.output.graph.owning_module
    original = fx.GraphModule(owner if owner is not None else {}, graph)
    ours = _replacement(original, region, mapping, plan, seed_node)
    return Site(original, ours, exact_copy(original), tuple(names), tuple(examples), keep, seed)


def _replacement(
    original: fx.GraphModule,
    region: AttentionRegion,
    mapping: dict[fx.Node, fx.Node],
    plan: Fuse,
    seed: fx.Node | None,
) -> fx.GraphModule:
    """``original`` with the operator in the place of its output, as the rewrite emits it."""
    graph = fx.Graph()
    to_new: dict[fx.Node, fx.Node] = {}
    for node in original.graph.nodes:
        if node.op == "placeholder":
            to_new[node] = graph.node_copy(node)
    here = {old: to_new[new] for old, new in mapping.items() if new in to_new}
    emitter = Emitter(graph)
    moved = region.mapped(here)
    out = emitter.site(moved, plan.selection.variant.name, plan.selection.variant.needs_block_map)
    graph.output(out)
    if seed is not None:
        for node in graph.nodes:
            if node.target is torch.randint:
                node.replace_all_uses_with(to_new[seed])
                graph.erase_node(node)
    return fx.GraphModule({}, graph)


def _drop(weights: Tensor, keep: Tensor, p: float) -> Tensor:
    """What dropout does, with the mask given."""
    return torch.where(keep.reshape(weights.shape), weights / (1 - p), 0)


def sdpa_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """SDPA by its documented definition; ``keep`` is the dropout mask where there is dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    weights = torch.ops.aten._safe_softmax(scores, -1)
    assert not dropout_p or keep is not None
    return (weights if keep is None else _drop(weights, keep, dropout_p)) @ value


def _magnitudes(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], ints: Sequence[int], program: ScoreProgram
) -> dict[str, float]:
    """Sizes of ``P ∘ dP`` summed as each gradient sums it, times 1 + the largest score."""
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
        weights = torch.ops.aten._safe_softmax(masked, -1)
        do = torch.randn((*sizes[:3], v.shape[-1]), generator=torch.Generator().manual_seed(0), dtype=q.dtype)
        do = do.to(q.device)
        dp = (do @ v.repeat_interleave(group, 1).transpose(-1, -2)).abs() * weights
        grads = torch.autograd.grad(scores, [products, *floats.values()], dp, allow_unused=True)
    ds = grads[0].abs()
    largest = float(masked[masked.isfinite()].abs().max()) if bool(masked.isfinite().any()) else 0.0

    def by_key(x: Tensor) -> float:
        return float(x.sum(2).unflatten(1, (k.shape[1], group)).sum(2).max())

    found = {
        "q": float(ds.sum(-1).max() * k.abs().max()),
        "k": by_key(ds) * float(q.abs().max()),
        "v": by_key(weights) * float(do.abs().max()),
    }
    found |= {n: float(g.abs().max()) for n, g in zip(floats, grads[1:], strict=True) if g is not None}
    return {name: (1 + largest) * size for name, size in found.items()}
