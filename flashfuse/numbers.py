"""Numbers: an original graph against its replacement on the real kernels, under one rule.

Equal means: our error against float64 is at most twice the error of the original in its own dtype
against float64, plus the rounding of the value itself; and NaN and infinity stand in the same places.

For the gradients of one site with huge scores or one key only, the value whose rounding is allowed is not the
gradient but what it is the difference of: a fused backward recomputes weights from ``lse`` and takes
``P ∘ (dP - delta)``, so one rounding of the scores and of ``P ∘ dP`` is inherent in it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashfuse.footprint import devices_of, random_state
from flashfuse.kernels.ops import OPERATORS
from flashfuse.kernels.reference import sdpa_by_definition
from flashfuse.passes import dialect, inline, nodes
from flashfuse.passes.rewrite import copy_graph_module
from flashfuse.report import CheckItem, ModelCheck

FACTOR = 2.0


def compare(
    name: str,
    ours: Tensor,
    original: Tensor,
    exact: Tensor,
    magnitude: float = 0.0,
    computed_in: torch.dtype | None = None,
) -> CheckItem:
    """One tensor under the rule.

    Args:
        ours, original: results in their own dtype.
        exact: the float64 reference.
        magnitude: of what is rounded, where that is larger than the value itself.
        computed_in: the dtype of the computation, where autocast makes it another than the value's.

    Returns:
        Largest absolute errors over the elements that are finite in the original, and the limit.
    """
    info = torch.finfo(computed_in or original.dtype)
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
    # Numbers below the smallest normal one have its spacing, and a sum of them is rounded at every term.
    limit = FACTOR * error_original + info.eps * max(largest, magnitude, 8 * info.smallest_normal)
    if original.dtype == torch.float64:
        # The reference is then no more exact than the original, only rounded in another order.
        limit += 8 * info.eps * largest
    if error_ours <= limit:
        return CheckItem(name, error_ours, error_original, limit, True)
    where = tuple(int(i) for i in (finite & ((a - x).abs() > limit)).nonzero()[0])
    note = f"{float(a[where]):.9g} instead of {float(b[where]):.9g} at {where}"
    return CheckItem(name, error_ours, error_original, limit, False, note)


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
        if node.target is torch.amp.autocast_mode._enter_autocast:
            node.args = (node.args[0], None, False)
            continue
        node.args = torch.fx.node.map_aggregate(node.args, promote)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, promote)
        if node.op == "call_method" and node.target in _CAST_METHODS:
            node.target = "double"
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # Export's own check of the dtypes that it saw.
            copied.graph.erase_node(node)
            continue
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
        if getattr(node.target, "__name__", "").partition(".")[0] in ("grouped_mm", "_grouped_mm"):
            node.target = _grouped_mm
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


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """PyTorch's ``grouped_mm`` in float64, which it does not take: rows up to offs[i] times b[i].

    Raises:
        NotImplementedError: a is not [rows, D], b is not [groups, D, N], or there is a bias.
    """
    if offs is None or bias is not None or a.ndim != 2 or b.ndim != 3:
        raise NotImplementedError(
            "flashfuse: grouped_mm in float64 is only known of [rows, D] and [groups, D, N], without a bias"
        )
    ends = offs.tolist()
    parts = [a[i:j] @ m for i, j, m in zip([0, *ends], ends, b, strict=False)]
    # Rows behind the last group belong to none, and have no defined product.
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])


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
        elif inline.drops(node):
            inline.keeps_all(node)
        elif node.target in OPERATORS:
            node.args = (*node.args[:6], None, node.args[7], 0.0, *node.args[9:])
        elif node.target is torch.ops.flashfuse.attention_weights.default:
            node.args = (*node.args[:4], None, node.args[5], 0.0, *node.args[7:])
    for node in reversed(list(copied.graph.nodes)):
        if node.target is torch.randint and not node.users:
            # The seed of a site: other numbers that the model draws would be others after it.
            copied.graph.erase_node(node)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, without_dropout(child))
    copied.recompile()
    return copied


# --- running ------------------------------------------------------------------------------------


def _run(
    run: Callable[..., Any],
    inputs: Sequence[Any],
    exact: bool,
    backward: bool,
    without_grad: Collection[int] = (),
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Float outputs of ``run``, and the gradients of float inputs for fixed cotangents."""
    own = [_leaf(x, exact, backward and i not in without_grad) for i, x in enumerate(inputs)]
    with torch.inference_mode(False), random_state(devices_of(own), seed=0):
        with torch.set_grad_enabled(backward):
            result = run(*own)
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


def _leaf(x: Any, exact: bool, backward: bool) -> Any:
    """A copy of an input with its strides, also those of broadcast and of strided storage."""
    if not isinstance(x, Tensor):
        return x
    with torch.inference_mode(False), torch.no_grad():
        dtype = torch.float64 if exact and x.is_floating_point() else x.dtype
        # One element stands for each broadcast dimension.
        base = x.detach().as_strided(
            [1 if s == 0 else n for n, s in zip(x.shape, x.stride(), strict=True)], x.stride()
        )
        try:
            copy = torch.empty_strided(base.shape, base.stride(), dtype=dtype, device=x.device).copy_(base)
        except RuntimeError:
            # Elements that overlap in another way.
            return x.detach().to(dtype, copy=True).requires_grad_(backward and x.is_floating_point())
        return copy.expand(x.shape).requires_grad_(backward and x.is_floating_point())


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
    computed_in: torch.dtype | None = None,
    without_grad: Collection[int] = (),
) -> tuple[CheckItem, ...]:
    """Outputs, and with ``backward`` the gradient of every float input, under the rule.

    Args:
        note: goes into the names of the items.
        magnitudes, computed_in: see :func:`compare`; magnitudes by the name of the input.
        without_grad: positions of inputs that have no gradient.
    """
    magnitudes = magnitudes or {}
    out_a, grad_a = _run(ours, inputs, False, backward, without_grad)
    out_b, grad_b = _run(original, inputs, False, backward, without_grad)
    out_x, grad_x = _run(reference, inputs, True, backward, without_grad)
    items = []
    for i, (a, b, x) in enumerate(zip(out_a, out_b, out_x, strict=True)):
        name = "out" if len(out_a) == 1 else f"out[{i}]"
        magnitude = magnitudes.get("out" if i == 0 else name, 0.0)
        items.append(compare(name, a, b, x, magnitude, computed_in))
    floats = _floats(inputs, names, without_grad)
    grads: Iterable[tuple[str, Any, Any, Any]] = zip(floats, grad_a, grad_b, grad_x, strict=False)
    for name, a, b, x in grads:
        if b is None and a is None:
            continue
        if x is None or b is None:
            b = torch.zeros_like(a) if b is None else b
            x = torch.zeros_like(b, dtype=torch.float64) if x is None else x
        a = torch.zeros_like(b) if a is None else a
        items.append(compare(f"d{name}", a, b, x, magnitudes.get(name, 0.0), computed_in))
    if note:
        items = [dataclasses.replace(i, name=f"{i.name} ({note})") for i in items]
    return tuple(items)


def same_bits(
    run: Callable[..., Any], inputs: Sequence[Any], names: Sequence[str], claimed: Sequence[str]
) -> CheckItem:
    """Whether two runs give the same bits in the outputs and in the gradients of ``claimed``."""
    (out, grads), (out_again, grads_again) = (_run(run, inputs, False, True) for _ in range(2))
    pairs = [("out", a, b) for a, b in zip(out, out_again, strict=True)]
    for name, a, b in zip(_floats(inputs, names), grads, grads_again, strict=False):
        if name in claimed and a is not None and b is not None:
            pairs.append((f"d{name}", a, b))
    other = [n for n, a, b in pairs if not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))]
    note = f"{', '.join(other)} differs from run to run" if other else ""
    title = f"same bits in a second run ({', '.join(n for n, _, _ in pairs)})"
    return CheckItem(title, math.inf if other else 0.0, 0.0, 0.0, not other, note)


def _floats(inputs: Sequence[Any], names: Sequence[str], without_grad: Collection[int] = ()) -> list[str]:
    """Names of the inputs that have gradients."""
    return [
        n
        for i, (n, t) in enumerate(zip(names, inputs, strict=True))
        if isinstance(t, Tensor) and t.is_floating_point() and i not in without_grad
    ]


def check_graph(
    original: fx.GraphModule, rewritten: fx.GraphModule, inputs: Sequence[Any], backward: bool
) -> ModelCheck:
    """A whole graph against its rewrite on real inputs, dropout taken out of both."""
    plain, ours = without_dropout(original), without_dropout(rewritten)
    placeholders = [n for n in original.graph.nodes if n.op == "placeholder"]
    names = [_user_name(n) for n in placeholders]
    # Running statistics and the like: some operations refuse to be differentiated by them.
    buffers = {i for i, n in enumerate(placeholders) if "_buffers_" in n.name}
    graphs = [m.graph for m in original.modules() if isinstance(m, fx.GraphModule)]
    backward = backward and not any(n.target in inline.FORWARD_ONLY for g in graphs for n in g.nodes)
    items = check_runs(plain, ours, exact_copy(plain), inputs, names, backward, without_grad=buffers)
    notes = (NO_DROPOUT,) if _has_dropout(original) else ()
    return ModelCheck(all(i.ok for i in items), items, notes=notes)


NO_DROPOUT = "without dropout, which the checks of the sites include"


def _has_dropout(gm: fx.GraphModule) -> bool:
    for node in gm.graph.nodes:
        if inline.drops(node):
            return True
        op = dialect.read(node)
        if op is None:
            continue
        p = op.args.get("dropout_p" if op.name == "scaled_dot_product_attention" else "p")
        on = op.get("training", op.get("train", True)) if op.name in ("dropout", "native_dropout") else True
        if p and on and op.name in ("dropout", "native_dropout", "scaled_dot_product_attention"):
            return True
    return any(_has_dropout(child) for child in gm.children() if isinstance(child, fx.GraphModule))


def _user_name(placeholder: fx.Node) -> str:
    """``h.0.attn.weight`` rather than Dynamo's ``l_self_modules_h_modules_0_…_parameters_weight_``."""
    name = re.sub(r"^L?l?_?(model_|self_)*(modules_|kwargs_|args_)?", "", placeholder.name).strip("_")
    return re.sub(r"_(?:modules|parameters|buffers)_", ".", name)


def drop(weights: Tensor, keep: Tensor, p: float) -> Tensor:
    """What dropout does, with the mask given."""
    # As PyTorch has it, by a product: NaN stays NaN.
    return weights * torch.where(keep.reshape(weights.shape), 1 / (1 - p), 0.0).to(weights.dtype)


def sdpa_math(*args: Any, dropout_p: float = 0.0, keep: Tensor | None = None, **kwargs: Any) -> Tensor:
    """SDPA by its documented definition; ``keep`` is the dropout mask where there is dropout."""
    assert not dropout_p or keep is not None

    def dropped(weights: Tensor) -> Tensor:
        return weights if keep is None else drop(weights, keep, dropout_p)

    return sdpa_by_definition(*args, **(kwargs | {"dropped": dropped}))
