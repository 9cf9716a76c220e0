"""Calls that hold attention inside: taken apart into what they do, so that the search can see it.

Dynamo keeps ``F.multi_head_attention_forward`` as one call, and without gradients ``TransformerEncoderLayer``
as one of ``torch._transformer_encoder_layer_fwd``; ``fx.symbolic_trace`` keeps the modules of ``torch.nn``
as leaves.  :func:`inline` puts the graph of such a call in its place, traced before autograd, so that it
stays differentiable and dropout stays dropout.  Which calls are worth it is known only after the search:
the pipeline asks again with those of which a site was fused, and the others stay as they were written.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from flashfuse.passes import dialect, nodes


@dataclass(frozen=True)
class Inlined:
    """A call that was taken apart: its name, and the nodes that stand for it."""

    name: str
    nodes: frozenset[fx.Node]


def inline(gm: fx.GraphModule, wanted: Collection[str] | None = None) -> tuple[Inlined, ...]:
    """Take apart the calls of ``gm`` (a copy) that hold attention, where that can be done exactly.

    Args:
        wanted: names of calls; all where ``None``.
    """
    calls: list[tuple[fx.Node, Callable[[], Inlined]]] = [
        (n, functools.partial(_inline, n)) for n in gm.graph.nodes if is_whole(n)
    ]
    calls += [(region[0], functools.partial(_without_vmap, region)) for region in vmapped(gm.graph)]
    done: list[Inlined] = []
    for node, take_apart in calls:
        if wanted is not None and node.name not in wanted:
            continue
        try:
            done.append(take_apart())
        except Exception:
            # Whatever a trace may run into: the call stays, and is reported as one.
            continue
    return tuple(done)


def is_whole(node: fx.Node) -> bool:
    """Whether ``node`` is one call of something known to compute attention inside."""
    if node.op == "call_module":
        return _attends(_module(node))
    return node.op == "call_function" and node.target in _MEANING


def _attends(module: nn.Module | None) -> bool:
    own = module is not None and type(module).__module__.startswith("torch.nn.")
    return own and any(isinstance(m, nn.MultiheadAttention) for m in module.modules())  # type: ignore[union-attr]


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


# --- one call -----------------------------------------------------------------------------------


def _inline(node: fx.Node) -> Inlined:
    example = nodes.value(node)
    results = example if isinstance(example, (tuple, list)) else (example,)
    mode = next((t.fake_mode for t in results if isinstance(t, FakeTensor)), None)
    pieces = _pieces(node, example)
    if mode is None or pieces is None:
        raise _NotInlined("a call whose values are not known, or that is used as a whole")
    inputs = [n for n in node.all_input_nodes if isinstance(nodes.value(n), (Tensor, torch.SymInt))]
    literals = {n: nodes.constant(n) for n in node.all_input_nodes if n not in inputs}
    state: dict[str, Tensor] = {}
    module = _module(node) if node.op == "call_module" else None
    if module is not None:
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def run(*values: Any) -> Any:
        given = literals | dict(zip(inputs, values, strict=False))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: given[n])
        if module is None:
            return _MEANING[node.target](*args, **kwargs)
        tensors = dict(zip(state, values[len(inputs) :], strict=True))
        return torch.func.functional_call(module, tensors, args, kwargs)

    values = [*(nodes.value(n) for n in inputs), *(mode.from_tensor(t) for t in state.values())]
    with _differentiable(), contextlib.ExitStack() as around:
        # Tensors that the call makes itself are fake too.
        for context in (mode, *autocast_at(node)):
            around.enter_context(context)
        traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(*values)
    (result,) = traced.graph.find_nodes(op="output")[0].args
    made = result if isinstance(result, (tuple, list)) else (result,)
    if len(made) != len(results) or not all(map(_alike, made, results)):
        raise _NotInlined("the trace gives something else than the call")
    if any(n.op == "get_attr" for n in traced.graph.nodes):
        raise _NotInlined("the trace holds constants of its own")
    replaced = [node, *(reader for reader, _ in pieces if reader is not node)]
    return _paste(node, traced.graph, [*inputs, *state], pieces, made, replaced)


def keeps_all(node: fx.Node) -> None:
    """Takes dropout out of a call of ``F.multi_head_attention_forward``."""
    if node.target is F.multi_head_attention_forward:
        bound = _ATTENTION.bind(*node.args, **node.kwargs)
        bound.arguments["dropout_p"] = 0.0
        node.args, node.kwargs = bound.args, bound.kwargs


def drops(node: fx.Node) -> bool:
    """Whether ``node`` is a call of ``F.multi_head_attention_forward`` with dropout."""
    if node.target is not F.multi_head_attention_forward:
        return False
    bound = _ATTENTION.bind(*node.args, **node.kwargs)
    return bool(bound.arguments["dropout_p"]) and bound.arguments.get("training", True) is not False


class _NotInlined(Exception):
    """The call stays as it is."""


def _pieces(node: fx.Node, example: Any) -> list[tuple[fx.Node, int]] | None:
    """Who reads which result of the call; ``None`` where somebody reads all results at once."""
    if not isinstance(example, (tuple, list)):
        return [(node, 0)]
    pieces = []
    for user in node.users:
        which = user.args[1] if user.target is operator.getitem else None
        if not isinstance(which, int) or user.args[0] is not node:
            return None
        pieces.append((user, which % len(example)))
    return pieces


def _alike(made: Any, expected: Any) -> bool:
    """Whether a traced result is what the call gives: same shape, dtype, device and strides."""
    value = nodes.value(made)
    if not isinstance(expected, Tensor):
        return value is expected
    return isinstance(value, Tensor) and (
        (value.shape, value.dtype, value.device, value.stride())
        == (expected.shape, expected.dtype, expected.device, expected.stride())
    )


def _paste(
    call: fx.Node,
    traced: fx.Graph,
    inputs: Sequence[fx.Node | str],
    pieces: Sequence[tuple[fx.Node, int]],
    results: Sequence[Any],
    replaced: Sequence[fx.Node],
) -> Inlined:
    """Copy the traced nodes before ``call``, let readers read their results, and erase ``replaced``.

    Args:
        inputs: what the placeholders of ``traced`` stand for: nodes, or names of parameters of ``call``.
        pieces: nodes, and the number of the result that each stands for.
    """
    graph, key = call.graph, "example_value" if "example_value" in call.meta else "val"
    kept = ("stack_trace", "nn_module_stack", "source_fn_stack")
    template = {k: v for k, v in call.meta.items() if k in kept}
    here: dict[fx.Node, fx.Node] = {}
    made: list[fx.Node] = []
    placeholders = traced.find_nodes(op="placeholder")
    with graph.inserting_before(call):
        for old in traced.nodes:
            if old.op == "output":
                continue
            if old.op == "placeholder":
                source = inputs[placeholders.index(old)]
                if isinstance(source, fx.Node):
                    here[old] = source
                    continue
                if not old.users:
                    continue
                here[old] = graph.get_attr(f"{call.target}.{source}")
            else:
                here[old] = graph.node_copy(old, lambda n: here[n])
            here[old].meta = {**template, key: nodes.value(old)}
            made.append(here[old])
    for reader, which in pieces:
        if not reader.users:
            continue
        reader.replace_all_uses_with(here[results[which]])
    for node in reversed(replaced):
        graph.erase_node(node)
    for node in reversed(made):
        # Sizes that the trace read and did not need.
        if (
            not node.users
            and node.op == "call_function"
            and not isinstance(nodes.value(node), (Tensor, tuple))
        ):
            graph.erase_node(node)
    return Inlined(call.name, frozenset(n for n in made if not n._erased))


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Modules of ``torch.nn`` take the way that has gradients, which computes the same."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def autocast_at(node: fx.Node) -> list[Any]:
    """The autocast regions of the graph that ``node`` is in, outermost first."""
    entered: dict[fx.Node, fx.Node] = {}
    for n in node.graph.nodes:
        if n is node:
            break
        if n.target is torch.amp.autocast_mode._enter_autocast:
            entered[n] = n
        elif n.target is torch.amp.autocast_mode._exit_autocast:
            entered.pop(n.args[0])
    return [torch.autocast(*n.args) for n in entered]  # type: ignore[arg-type]


# --- regions under vmap ------------------------------------------------------------------------------


def vmapped(graph: fx.Graph) -> list[list[fx.Node]]:
    """The runs of nodes that Dynamo traced under ``torch.vmap``, with what enters and leaves it."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        step = _nesting(node)
        if step == 1 and depth == 0:
            regions.append([])
        if depth or step == 1:
            regions[-1].append(node)
        depth = max(0, depth + step)
    return regions if depth == 0 else regions[:-1]


def _nesting(node: fx.Node) -> int:
    """1 where ``node`` enters a level of vmap, −1 where it leaves one."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}.get(name, 0)


def _without_vmap(region: list[fx.Node]) -> Inlined:
    """The operations on whole tensors that vmap makes of the region, by PyTorch's own rules.

    Of masks only, which need no gradient: what vmap makes is seen below autograd.
    """
    own = set(region)
    inputs = list(dict.fromkeys(i for n in region for i in n.all_input_nodes if i not in own))
    results = [n for n in region if any(u not in own for u in n.users)]
    examples = [nodes.value(n) for n in results]
    mode = next((t.fake_mode for t in examples if isinstance(t, FakeTensor)), None)
    if mode is None or any(not isinstance(t, Tensor) or t.is_floating_point() for t in examples):
        raise _NotInlined("a region under vmap that makes something else than masks")
    if any(n.target in _MODES or {*dialect.writes(n)} - own for n in region):
        raise _NotInlined("a region under vmap with effects")

    def run(*values: Any) -> Any:
        env: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
        depth = 0
        try:
            for node in region:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
                target = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
                env[node] = target(*args, **kwargs)
                depth += _nesting(node)
        finally:
            for _ in range(depth):
                torch._C._functorch._vmap_decrement_nesting()
        return [env[n] for n in results]

    with mode, torch.no_grad():
        traced = make_fx(run, tracing_mode="real")(*map(nodes.value, inputs))
    traced.graph.eliminate_dead_code()
    (made,) = traced.graph.find_nodes(op="output")[0].args
    if not all(map(_alike, made, examples)) or any(n.op == "get_attr" for n in traced.graph.nodes):
        raise _NotInlined("the trace gives something else than the region")
    pieces = [(n, i) for i, n in enumerate(results)]
    return _paste(region[0], traced.graph, inputs, pieces, made, region)


_MODES = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)

# --- what the calls compute -------------------------------------------------------------------------


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd`` by its definition: what it computes on [B, S, E].

    ``mask`` hides what is not zero in it, of whatever dtype it is; rows without a key are NaN.
    ``mask_type`` 0 is a mask [S, S], 1 one [B, S] of keys, 2 one [B, H, S, S].
    """

    def attend(x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, num_heads, embed_dim // num_heads).transpose(1, 2)
            for t in F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
        )
        scores = q * (embed_dim // num_heads) ** -0.5 @ k.transpose(-2, -1)
        if mask is not None:
            hidden = mask.to(torch.bool)
            if mask_type == 1:
                hidden = hidden.view(batch, 1, 1, length)
            scores = scores.masked_fill(hidden, float("-inf"))
        out = torch.softmax(scores, -1) @ v
        return F.linear(out.transpose(1, 2).reshape(batch, length, embed_dim), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if src.is_nested or mask_type not in (None, 0, 1, 2):
        raise ValueError(f"expected a dense tensor and a mask type of 0, 1 or 2, got {mask_type}")
    if norm_first:
        x = src + attend(first(src))
        return x + feed_forward(second(x))
    x = first(src + attend(src))
    return second(x + feed_forward(x))


_ATTENTION = inspect.signature(F.multi_head_attention_forward)

FORWARD_ONLY = frozenset({torch._transformer_encoder_layer_fwd})
"""Calls that have no gradient."""

_MEANING: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._transformer_encoder_layer_fwd: encoder_layer,
}
