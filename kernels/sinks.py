"""Sinks outside the kernels: the logit itself, and its gradient from what a forward leaves behind.

A sink adds ``exp(sink)`` to the sum that weights are divided by.  With ``lse`` over the keys and the sink,

    P_sink = exp(sink − lse)        d sink = −P_sink · delta        delta = do · out

where ``lse`` and ``delta`` are those of the row, and P over the keys is what it is without a sink.
sink, lse and delta are [B, H, Sq]; a row that is dead has P_sink = 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from flashfuse.kernels.derivative import derivative
from flashfuse.kernels.expr import Expr, walk
from flashfuse.kernels.reference import Value, as_tensor, environment, evaluate
from flashfuse.kernels.spec import ScoreProgram

Sizes = tuple[int, int, int, int]


def logits(
    program: ScoreProgram, captures: Sequence[Tensor], ints: Sequence[int], sizes: Sizes, like: Tensor
) -> Tensor:
    """The sink of every row, [B, H, Sq] in the dtype and on the device of ``like``."""
    assert program.sink is not None
    value = evaluate(program.sink, _environment(program, captures, ints, sizes, like))
    found = as_tensor(value, like.device, like.dtype)
    return found.expand(*sizes[:3], 1)[..., 0]


def corrected(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` [B, H, S, Dv] and ``lse`` [B, H, S] over the keys → with the sink's term in the sum.

    A row of which both are −∞ stays as it is.
    """
    total = torch.logaddexp(lse, sink)
    share = torch.where(total == float("-inf"), 1.0, torch.sigmoid(lse - sink))
    return (out * share[..., None]).to(out.dtype), total


def gradients(
    program: ScoreProgram,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    sizes: Sizes,
    weight: Tensor,
    delta: Tensor,
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """By name: the gradient of every ``wanted`` capture that the sink reads, in the dtype of ``delta``.

    ``weight`` is P_sink, [B, H, Sq] like ``delta``.
    """
    assert program.sink is not None
    # A weight of 0 has no part in it, whatever delta is in a row without a key.
    slope = torch.where(weight == 0, 0, -weight * delta)[..., None]
    env = _environment(program, captures, ints, sizes, delta)
    named = dict(zip(program.captures, captures, strict=True))
    found: dict[str, Tensor] = {}
    for load in walk(program.sink):
        if load.op != "load" or load.args[0] not in wanted:
            continue
        name = load.args[0]
        total = found.setdefault(name, torch.zeros(named[name].shape, dtype=delta.dtype, device=delta.device))
        by_load = as_tensor(evaluate(derivative(program.sink, load), env), delta.device)
        gradient = torch.where(slope == 0, 0, slope * by_load)
        _add_to_load(total, load, env, gradient)
    return found


def _add_to_load(total: Tensor, load: Expr, env: Mapping[str, Value], gradient: Tensor) -> None:
    """Add ``gradient``, of [B, H, Sq, 1] or axes of 1, to the contiguous ``total`` where ``load`` reads."""
    at = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=gradient.device)
    for index, stride in zip(load.operands, total.stride(), strict=True):
        at = torch.add(at, as_tensor(evaluate(index, env), gradient.device), alpha=stride)
    # Summed first over what the index does not depend on, so that few elements are scattered.
    axes = [axis for axis, n in enumerate(at.shape) if n == 1 and gradient.shape[axis] > 1]
    summed = gradient.sum(axes, keepdim=True) if axes else gradient
    # Not by ``index_put_``, which sorts, and then adds one by one what shares an entry.
    total.view(-1).scatter_add_(0, at.reshape(-1), summed.expand(at.shape).reshape(-1))


def _environment(
    program: ScoreProgram, captures: Sequence[Tensor], ints: Sequence[int], sizes: Sizes, like: Tensor
) -> dict[str, Value]:
    floats = [c.to(like.dtype) if c.is_floating_point() else c for c in captures]
    return dict(environment(program, floats, ints, sizes, like.device))
