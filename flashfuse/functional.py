"""``flashfuse.attention``: fused attention for a score and a mask that are written in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported

from flashfuse import pipeline, recall
from flashfuse.api import counted_apart
from flashfuse.kernels import kept_maps
from flashfuse.options import Options
from flashfuse.passes import dialect
from flashfuse.passes.nodes import live
from flashfuse.report import SiteReport

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class NotFusible(ValueError):
    """What a score or a mask computes cannot become part of the kernels."""


class AttentionOutput(NamedTuple):
    """What :func:`attention` returns where more than the output is asked for; ``None`` is what was not.

    Attributes:
        out: [B, H, Sq, Dv].
        lse: [B, H, Sq], the natural logarithm of the sum of exponentials; differentiable.
        max_scores: [B, H, Sq], the largest score of each row; without a gradient.
    """

    out: Tensor
    lse: Tensor | None = None
    max_scores: Tensor | None = None


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_max_scores: bool = False,
) -> AttentionOutput: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_max_scores: bool = False,
) -> Tensor | AttentionOutput:
    """Attention with a score and a mask of your own, in linear memory, forward and backward.

        s    = score_mod(scale · q kᵀ, b, h, q, kv)        −∞ where mask_mod(b, h, q, kv) is false
        out  = dropout(softmax(s)) v                       0 in a row that may attend to no key
        lse  = ln Σ exp(s)        max_scores = max s       −∞ in such a row; both before dropout

    Both functions are given whole tensors that broadcast to [B, H, Sq, Skv], and compute elementwise with
    them: arithmetic, comparisons, ``torch.where``, ``tanh``, ``exp``, and reads of other tensors at indices
    made of ``b``, ``h``, ``q`` and ``kv``.  Tensors that they read from around them get gradients if they
    require them.  Nothing of the size [Sq, Skv] is made, and blocks that the mask empties are skipped.

    The rule that holds everywhere holds here: PyTorch's own nodes are traced once, lifted, and proved equal
    to what the kernels compute.  From the second length on, other lengths need no new trace.

    Args:
        query: [B, H, Sq, D], floating-point.
        key: [B, H_kv, Skv, D], where H_kv divides H: heads of a group follow one another.
        value: [B, H_kv, Skv, Dv].
        score_mod: ``(score, b, h, q, kv) -> score``; the score is float32 for 16-bit inputs.
        mask_mod: ``(b, h, q, kv) -> bool``.
        scale: 1/√D if not given.
        dropout_p: the rate at which weights are dropped; ``torch.manual_seed`` reproduces it.
        return_lse: return ``lse`` as well, in natural units and differentiable: d lse / d s = softmax(s).
            Partial results over parts of the keys are merged by it.
        return_max_scores: return ``max_scores`` as well, of which no gradient is taken.

    Returns:
        [B, H, Sq, Dv] of the dtype of ``query``, laid out as [B, Sq, H, Dv], which is what models reshape
        next.  As with ``scaled_dot_product_attention``, the backward needs it as it is: do not write to it.
        An :class:`AttentionOutput` where more is asked for, with [B, H, Sq] of float32 (float64 for float64).

    Raises:
        NotFusible: a function computes what the kernels cannot, such as a sort; the message says what.
        ValueError: sizes do not fit together.

    Inside a function that ``torch.compile`` compiles this is the formula above, which
    ``backend="flashfuse"`` fuses like any other attention.
    """
    more = return_lse, return_max_scores
    if torch.compiler.is_compiling():
        return formula(query, key, value, score_mod, mask_mod, scale, dropout_p, *more)
    tensors = query, key, value
    known = None if any(more) else recall.key(tensors, (score_mod, mask_mod), (scale, dropout_p))
    again = recall.find(known)
    if again is not None:
        return again(tensors)
    _check(query, key, value, dropout_p)
    if 0 in (*query.shape, *value.shape):
        return formula(query, key, value, score_mod, mask_mod, scale, dropout_p, *more)
    # Numbers of heads that change from call to call would become symbols, of which groups are not known.
    widths = (query.shape[1], query.shape[3], key.shape[1], value.shape[3])
    run = _compiled(score_mod, mask_mod, (*more, *widths), query)
    recall.forget()
    # Dynamo wraps what a backend raises, and its own refusals, in pages that say nothing to the caller.
    try:
        out = run(query, key, value, score_mod, mask_mod, scale, dropout_p, *more)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, NotFusible):
            raise error.inner_exception from None
        raise
    except (Unsupported, FailOnRecompileLimitHit) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NotFusible(f"score_mod or mask_mod could not be traced: {reason}") from error
    recall.keep(known, tensors, out)
    return out


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    scale: float | None,
    dropout_p: float,
    return_lse: bool = False,
    return_max_scores: bool = False,
) -> Tensor | AttentionOutput:
    """What :func:`attention` means, in plain PyTorch, with matrices of [Sq, Skv]."""
    batch, heads, q_len, _ = query.shape
    group = heads // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    b, h, q, kv = (
        torch.arange(n, device=query.device).view([-1 if d == axis else 1 for d in range(4)])
        for axis, n in enumerate((batch, heads, q_len, key.shape[2]))
    )
    scores = query @ key.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, b, h, q, kv)
    if mask_mod is not None:
        scores = torch.where(mask_mod(b, h, q, kv), scores, -math.inf)
    weights = torch.softmax(scores, -1)
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, weights)
    weights = torch.dropout(weights, dropout_p, True)
    out = weights.to(value.dtype) @ value
    if not return_lse and not return_max_scores:
        return out
    # The operator in the place of the product gives both: they come after it.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    lse = torch.logsumexp(scores, -1) if return_lse else None
    max_scores = None
    if return_max_scores:
        none = torch.full(scores.shape[:-1], -math.inf, dtype=scores.dtype, device=scores.device)
        max_scores = none if scores.shape[-1] == 0 else scores.detach().amax(-1)
    return AttentionOutput(out, lse, max_scores)


Run = Callable[..., Tensor | AttentionOutput]
_runs: dict[tuple[Any, ...], Run] = {}
_MOST_RUNS = 256


def _compiled(
    score_mod: ScoreMod | None, mask_mod: MaskMod | None, fixed: tuple[int, ...], like: Tensor
) -> Run:
    """:func:`formula` compiled for functions of this code, of which closures may differ from call to call.

    ``fixed`` numbers do not.
    """
    code = (*_identity(score_mod), *_identity(mask_mod), *fixed)
    if code not in _runs:
        _try(score_mod, mask_mod, like)
        if len(_runs) == _MOST_RUNS:
            del _runs[next(iter(_runs))]
        name = "formula_" + "_".join(map(str, fixed))
        _runs[code] = torch.compile(counted_apart(formula, name), backend=_fused, fullgraph=True)
    return _runs[code]


def _identity(function: Any) -> tuple[Any, ...]:
    """The code, and the defaults of arguments: PyTorch 2.11 does not see that they are others."""
    defaults = getattr(function, "__defaults__", None) or ()
    named = getattr(function, "__kwdefaults__", None) or {}
    given = ((type(x), x) for x in (*defaults, *named.values()) if isinstance(x, (int, float, str, Tensor)))
    return getattr(function, "__code__", function), tuple(given)


@torch.no_grad()
def _try(score_mod: ScoreMod | None, mask_mod: MaskMod | None, like: Tensor) -> None:
    """Run both functions on one element, so that their own mistakes are raised as such."""
    score = torch.zeros(1, 1, 1, 1, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    indices = [torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=like.device) for _ in range(4)]
    if score_mod is not None:
        _check_element("score_mod", score_mod(score, *indices), {torch.float32, torch.float64, like.dtype})
    if mask_mod is not None:
        _check_element("mask_mod", mask_mod(*indices), {torch.bool})


def _check_element(name: str, made: object, dtypes: set[torch.dtype]) -> None:
    if not isinstance(made, Tensor) or made.dtype not in dtypes:
        expected = " or ".join(sorted(map(str, dtypes)))
        got = made.dtype if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"{name}: expected a tensor of {expected}, got {got}")
    if made.numel() != 1:
        raise ValueError(
            f"{name}: expected one element for one element of b, h, q and kv, got {list(made.shape)}; "
            "read tensors at these indices, as in bias[h, q, kv]"
        )


def _fused(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    rewritten, report = pipeline.run(gm, Options())
    if report.num_fused != 1:
        raise NotFusible(_why(report.sites))
    operations = filter(None, map(dialect.read, rewritten.graph.nodes))
    if any(op.name in ("logsumexp", "amax") for op in operations):
        notes = (note for note in report.sites[0].notes if "of the scores stays as it is" in note)
        raise NotFusible(f"not fusible: {next(notes, 'a result of the rows')}; mask in mask_mod instead")
    _lighten(rewritten)
    return recall.noted(rewritten)


def _lighten(gm: fx.GraphModule) -> None:
    """Take out of ``gm``, of which each node costs time at each call, what the operator does not need."""
    graph = gm.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        # The layout of the formula's output: of this function nobody expects it.
        if node.op == "call_method" and node.target == "contiguous" and len(node.users) == 1:
            node.replace_all_uses_with(node.all_input_nodes[0])
    for node in graph.nodes:
        if node.target is torch.ops.flashfuse.block_map.default:
            node.target = kept_maps.block_map
    needed = live(graph)
    for node in reversed(graph.nodes):
        # Such as b and h, if neither the score nor the mask reads them.
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)
    gm.recompile()


def _why(sites: Sequence[SiteReport]) -> str:
    reasons = [reason for site in sites for reason in site.reasons]
    if not reasons:
        return "not fusible: score_mod does not return an elementwise function of the score it is given"
    reason = reasons[0]
    return ". ".join(x for x in (f"not fusible: {reason.message}", reason.where, reason.hint) if x)


def _check(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.ndim != 4 or not t.is_floating_point():
            expected = "[batch, heads, length, head_dim] of a floating-point dtype"
            raise ValueError(f"{name}: expected {expected}, got {list(t.shape)} {t.dtype}")
    if len({query.dtype, key.dtype, value.dtype}) > 1 or len({query.device, key.device, value.device}) > 1:
        given = ", ".join(f"{t.dtype} on {t.device}" for t in (query, key, value))
        raise ValueError(f"query, key and value: expected one dtype and device, got {given}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key: expected head_dim {query.shape[-1]} as query has, got {key.shape[-1]}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"value: expected {list(key.shape[:3])} as key has, got {list(value.shape[:3])}")
    if query.shape[0] != key.shape[0] or not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key: expected batch {query.shape[0]} and a number of heads that divides {query.shape[1]}, "
            f"got {list(key.shape[:2])}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 ≤ p < 1, got {dropout_p}")
