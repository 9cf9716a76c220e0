"""The oracle: attention by its definition in plain PyTorch, every score materialised.

Nothing optimised imports the functions that compute attention here; tests and the checker compare
against them.  ``evaluate`` also builds the masks of the CPU variant, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flashfuse.kernels.expr import COMPARISONS, INDEX_VARS, Expr
from flashfuse.kernels.spec import NAN, REACHING, SCORES_ONLY, ScoreProgram

Value = Tensor | int | float | bool

_FUNCTIONS = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "sigmoid": torch.sigmoid,
}


def evaluate(e: Expr, env: Mapping[str, Value]) -> Value:
    """The value of ``e`` where ``env`` gives every variable and capture, with broadcasting.

    Index variables are integer tensors that broadcast against each other; captures are whole
    tensors.  Loads outside a capture are an error of the program, not of the caller.
    """
    memo: dict[Expr, Value] = {}

    def visit(node: Expr) -> Value:
        if node not in memo:
            memo[node] = compute(node)
        return memo[node]

    def compute(node: Expr) -> Value:
        op = node.op
        if op == "const":
            return node.value
        if op == "var":
            return env[node.args[0]]
        if op == "load":
            source = env[node.args[0]]
            assert isinstance(source, Tensor)
            # A number stays one: an index of no dimensions would be read back from its device.
            indices = (visit(i) for i in node.operands)
            return source[tuple(i if isinstance(i, Tensor) else int(i) for i in indices)]
        values = [visit(a) for a in node.operands]
        if op in ("+", "*", "/", "//", "%", "min", "max"):
            # PyTorch adds booleans as "or"; here they are 0 and 1.
            values = [v.long() if isinstance(v, Tensor) and v.dtype == torch.bool else v for v in values]
        if op == "+":
            total = values[0]
            for value in values[1:]:
                total = total + value
            return total
        if op in ("*", "/", "//", "%"):
            a, b = values
            return {
                "*": lambda: a * b,
                "/": lambda: a / b,
                "//": lambda: a // b,
                "%": lambda: a % b,
            }[op]()
        if op in COMPARISONS:
            return COMPARISONS[op](values[0], values[1])
        device = next((v.device for v in values if isinstance(v, Tensor)), None)
        # A choice between two numbers must not be one of float32, whatever it is multiplied by later.
        tensors = [as_tensor(v, device, torch.float64 if isinstance(v, float) else None) for v in values]
        if op in ("min", "max"):
            return (torch.minimum if op == "min" else torch.maximum)(tensors[0], tensors[1])
        if op == "where":
            return torch.where(_truth(tensors[0]), tensors[1], tensors[2])
        if op == "not":
            return ~_truth(tensors[0])
        if op in ("and", "or"):
            result = _truth(tensors[0])
            for t in tensors[1:]:
                result = result & _truth(t) if op == "and" else result | _truth(t)
            return result
        if op == "abs" or tensors[0].is_floating_point():
            return _FUNCTIONS[op](tensors[0])
        return _FUNCTIONS[op](tensors[0].double())

    return visit(e)


def as_tensor(value: Value, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
    """``value`` as a tensor, made on ``device``: a CUDA graph can record it, a copy of a number not."""
    if isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=dtype, device=device)
    return torch.full((), value, device=device, dtype=dtype)


def _truth(t: Tensor) -> Tensor:
    return t if t.dtype == torch.bool else t != 0


def environment(
    program: ScoreProgram,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    sizes: tuple[int, int, int, int],
    device: torch.device | str,
) -> dict[str, Value]:
    """Variables and captures of ``program`` for :func:`evaluate`; ``sizes`` is (B, H, Sq, Skv).

    The index variables have shapes [B,1,1,1], [1,H,1,1], [1,1,Sq,1] and [1,1,1,Skv].
    """
    env: dict[str, Value] = {"Sq": sizes[2], "Skv": sizes[3]}
    for axis, (name, size) in enumerate(zip(INDEX_VARS, sizes, strict=True)):
        shape = [1, 1, 1, 1]
        shape[axis] = size
        env[name] = torch.arange(size, device=device).view(shape)
    env.update(zip(program.captures, captures, strict=True))
    env.update(zip(program.ints, ints, strict=True))
    return env


def sdpa_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropped: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` as its documentation defines it.

    ``dropped`` is what dropout makes of the weights.
    """
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(group, -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    return dropped(torch.ops.aten._safe_softmax(scores, -1)) @ value


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    program: ScoreProgram,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``program`` by definition, in the dtype of ``q`` (float64 for an exact reference).

    Args:
        q: [B, H, Sq, D]; k: [B, H_kv, Skv, D]; v: [B, H_kv, Skv, Dv], with H a multiple of H_kv.
        captures, ints: in the order of ``program.captures`` and ``program.ints``.
        keep: [B, H, Sq, Skv], True where dropout keeps a weight; required when ``dropout_p`` > 0.

    Returns:
        out [B, H, Sq, Dv], and lse [B, H, Sq] (natural log, the sink's term included; −inf in dead rows,
        from which no gradient comes).
    """
    group, kv_len = q.shape[1] // k.shape[1], k.shape[2]
    captures = [c.to(q.dtype) if c.is_floating_point() else c for c in captures]
    raw, scores, env = _scores(q, k, captures, ints, program)
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    alive = scores.masked_fill(dead, 0)
    lse = alive.logsumexp(-1).masked_fill(dead[..., 0], float("-inf"))
    # Not exp(scores - lse): where every score is −3.4e38, lse has no room for the log of the sum.
    weights = alive.softmax(-1)[..., :kv_len]
    if program.dead_rows in REACHING:
        if program.dead_rows in SCORES_ONLY:
            env.update((name, c.detach()) for name, c in zip(program.captures, captures, strict=True))
            raw = torch.as_tensor(evaluate(program.score, env), dtype=q.dtype).expand(raw.shape)
        # Equal scores whose gradients are those of the scores.
        equal = torch.where(dead, raw - raw.detach(), 0)
        of_dead_rows = equal.softmax(-1) * (float("nan") if program.dead_rows in NAN else 1.0)
        weights = torch.where(dead, of_dead_rows, weights)
    else:
        of_dead = {"mean": 1 / max(kv_len, 1), "nan": float("nan")}.get(program.dead_rows, 0.0)
        weights = torch.where(dead, of_dead, weights)
    if dropout_p:
        assert keep is not None
        # A product, as PyTorch's dropout: a NaN that is dropped stays one.
        weights = weights / (1 - dropout_p) * keep
    return weights @ v.repeat_interleave(group, 1), lse


def max_reference(
    q: Tensor, k: Tensor, captures: Sequence[Tensor], ints: Sequence[int], program: ScoreProgram
) -> Tensor:
    """[B, H, Sq]: the largest score of each row, the sink among them; −inf in dead rows."""
    captures = [c.to(q.dtype) if c.is_floating_point() else c for c in captures]
    return _scores(q, k, captures, ints, program)[1].amax(-1)


def _scores(
    q: Tensor, k: Tensor, captures: Sequence[Tensor], ints: Sequence[int], program: ScoreProgram
) -> tuple[Tensor, Tensor, dict[str, Value]]:
    """Scores [B, H, Sq, Skv] without the mask, those that are normalised, and what they were made from.

    The latter have −inf where the mask allows nothing, and the sink as one more column.
    """
    batch, heads, q_len, _ = q.shape
    products = q @ k.repeat_interleave(heads // k.shape[1], 1).transpose(-1, -2)
    env = environment(program, captures, ints, (batch, heads, q_len, k.shape[2]), q.device)
    env["s"] = products
    raw = torch.as_tensor(evaluate(program.score, env), dtype=q.dtype, device=q.device).expand(products.shape)
    scores = raw
    if program.mask is not None:
        allowed = _truth(torch.as_tensor(evaluate(program.mask, env), device=q.device)).expand(scores.shape)
        scores = scores.masked_fill(~allowed, float("-inf"))
    if program.sink is not None:
        sink = torch.as_tensor(evaluate(program.sink, env), dtype=q.dtype, device=q.device)
        scores = torch.cat([scores, sink.expand(batch, heads, q_len, 1)], -1)
    return raw, scores, env
