"""The operators that rewritten graphs call.

``flashfuse::attention(q, k, v, captures, ints, maps, seed, program, dropout_p, variant) -> (out, lse)``
is one differentiable operator; its program is a readable string, so a graph that holds it can be
printed, cached, exported and compiled without any registry.  ``flashfuse::attention_and_max`` returns the
largest score of each row as well, which has no gradient.  ``flashfuse::block_map`` says once for all
layers that share a mask which blocks are empty, partial or full.  ``flashfuse::attention_weights``
computes the weights of a site, where the model returns them.

Importing this module defines the operators and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from flashfuse.kernels import autograd, dispatch
from flashfuse.kernels.spec import ScoreProgram

BLOCK = 128
"""Edge of the blocks of a block map, in rows and in columns."""

_LIBRARY = torch.library.Library("flashfuse", "DEF")

_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] ints, Tensor[] maps, Tensor? seed, "
    "str program, float dropout_p, str variant) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_and_max(Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] ints, Tensor[] maps, "
    "Tensor? seed, str program, float dropout_p, str variant) -> (Tensor out, Tensor lse, Tensor max_scores)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] captures, "
    "SymInt[] ints, Tensor[] maps, Tensor? seed, str program, float dropout_p, str variant, "
    "int[] capture_grads, Tensor? dlse=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_weights(Tensor q, Tensor k, Tensor[] captures, SymInt[] ints, Tensor? seed, str program, "
    "float dropout_p, str variant, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_weights_backward(Tensor dweights, Tensor q, Tensor k, Tensor[] captures, SymInt[] ints, "
    "Tensor? seed, str program, float dropout_p, str variant, int[] capture_grads) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "block_map(Tensor[] captures, SymInt[] ints, Tensor like, SymInt B, SymInt H, SymInt Sq, SymInt Skv, "
    "str mask) -> (Tensor kv_map, Tensor q_map)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: str,
    dropout_p: float,
    variant: str,
) -> tuple[Tensor, Tensor]:
    run = dispatch.implementation(variant).forward
    return run(q, k, v, captures, ints, maps, seed, ScoreProgram.parse(program), dropout_p)


def _attention_and_max(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: str,
    dropout_p: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation(variant).forward
    highest = q.new_empty(q.shape[:3], dtype=_lse_dtype(q))
    parsed = ScoreProgram.parse(program)
    return *run(q, k, v, captures, ints, maps, seed, parsed, dropout_p, highest), highest


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: str,
    dropout_p: float,
    variant: str,
    capture_grads: Sequence[int],
    dlse: Tensor | None = None,
) -> list[Tensor]:
    run = dispatch.implementation(variant).backward
    return run(
        do,
        q,
        k,
        v,
        out,
        lse,
        captures,
        ints,
        maps,
        seed,
        ScoreProgram.parse(program),
        dropout_p,
        capture_grads,
        dlse,
    )


def _weights(
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: str,
    dropout_p: float,
    variant: str,
    dtype: torch.dtype,
) -> Tensor:
    from flashfuse.kernels import weights

    parsed = ScoreProgram.parse(program)
    return weights.forward(q, k, captures, ints, seed, parsed, dropout_p, variant, dtype)


def _weights_backward(
    dweights: Tensor,
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: str,
    dropout_p: float,
    variant: str,
    capture_grads: Sequence[int],
) -> list[Tensor]:
    from flashfuse.kernels import weights

    parsed = ScoreProgram.parse(program)
    return weights.backward(dweights, q, k, captures, ints, seed, parsed, dropout_p, variant, capture_grads)


def _block_map(
    captures: Sequence[Tensor],
    ints: Sequence[int],
    like: Tensor,
    B: int,
    H: int,
    Sq: int,
    Skv: int,
    mask: str,
) -> tuple[Tensor, Tensor]:
    from flashfuse.kernels.block_map import build

    return build(captures, ints, like.device, (B, H, Sq, Skv), ScoreProgram.parse(mask))


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", _attention, _key)
    _LIBRARY.impl("attention_and_max", _attention_and_max, _key)
    _LIBRARY.impl("attention_backward", _attention_backward, _key)
    _LIBRARY.impl("attention_weights", _weights, _key)
    _LIBRARY.impl("attention_weights_backward", _weights_backward, _key)
    _LIBRARY.impl("block_map", _block_map, _key)


# --- shapes ------------------------------------------------------------------------------------


def empty_bhsd(like: Tensor, sizes: Sequence[Any]) -> Tensor:
    """An uninitialised [B, H, S, D] tensor laid out as [B, S, H, D]: what models reshape next."""
    b, h, s, d = sizes
    return like.new_empty((b, s, h, d)).transpose(1, 2)


@torch.library.register_fake("flashfuse::attention")
def _(q, k, v, captures, ints, maps, seed, program, dropout_p, variant):  # type: ignore[no-untyped-def]
    ScoreProgram.parse(program)
    batch, heads, q_len, _ = q.shape
    out = empty_bhsd(q, (batch, heads, q_len, v.shape[-1]))
    return out, q.new_empty((batch, heads, q_len), dtype=_lse_dtype(q))


@torch.library.register_fake("flashfuse::attention_and_max")
def _(q, k, v, captures, ints, maps, seed, program, dropout_p, variant):  # type: ignore[no-untyped-def]
    ScoreProgram.parse(program)
    out = empty_bhsd(q, (*q.shape[:3], v.shape[-1]))
    return out, *(q.new_empty(q.shape[:3], dtype=_lse_dtype(q)) for _ in range(2))


@torch.library.register_fake("flashfuse::attention_backward")
def _(do, q, k, v, out, lse, captures, ints, maps, seed, program, dropout_p, variant, capture_grads, *_):  # type: ignore[no-untyped-def]
    return [
        *(empty_bhsd(t, t.shape) for t in (q, k, v)),
        *(captures[i].new_empty(captures[i].shape) for i in capture_grads),
    ]


@torch.library.register_fake("flashfuse::attention_weights")
def _(q, k, captures, ints, seed, program, dropout_p, variant, dtype):  # type: ignore[no-untyped-def]
    ScoreProgram.parse(program)
    return q.new_empty((*q.shape[:3], k.shape[2]), dtype=dtype)


@torch.library.register_fake("flashfuse::attention_weights_backward")
def _(dweights, q, k, captures, ints, seed, program, dropout_p, variant, capture_grads):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in (q, k, *(captures[i] for i in capture_grads))]


@torch.library.register_fake("flashfuse::block_map")
def _(captures, ints, like, B, H, Sq, Skv, mask):  # type: ignore[no-untyped-def]
    used = ScoreProgram.parse(mask).mask_variables
    lead = (B if "b" in used else 1, H if "h" in used else 1)
    rows, columns = (Sq + BLOCK - 1) // BLOCK, (Skv + BLOCK - 1) // BLOCK
    return (
        like.new_empty((*lead, rows, 2 + columns), dtype=torch.int32),
        like.new_empty((*lead, columns, 2 + rows), dtype=torch.int32),
    )


# --- gradients ---------------------------------------------------------------------------------

_ATTENTION_BACKWARD = autograd.backward_of(
    torch.ops.flashfuse.attention_backward.default, _attention_backward
)
_WEIGHTS_BACKWARD = torch.ops.flashfuse.attention_weights_backward.default


class FlashfuseAttention(torch.autograd.Function):
    """``flashfuse::attention`` as ``autograd.register`` calls it: gradients for q, k, v and the captures.

    Those of out and of lse; ``flashfuse::attention_and_max`` has the same.
    """

    @staticmethod
    def forward(
        ctx: Any, run: autograd.Run, plain: bool, args: tuple[Any, ...], *_: Tensor
    ) -> tuple[Tensor, ...]:
        out, lse, *highest = run(args)
        q, k, v, captures, ints, maps, seed, program, dropout_p, variant = args
        ctx.save_for_backward(q, k, v, out, lse, seed, *captures, *maps)
        ctx.site = plain, len(captures), ints, program, dropout_p, variant
        ctx.set_materialize_grads(False)
        if highest:
            ctx.mark_non_differentiable(*highest)
        return out, lse, *highest

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        plain, count, ints, program, dropout_p, variant = ctx.site
        if do is None and dlse is None:
            return (None,) * (6 + count)
        q, k, v, out, lse, seed, *rest = saved = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else do
        captures, maps = rest[:count], rest[count:]
        wanted = _wanted(program, ctx.needs_input_grad[6:])
        dq, dk, dv, *dcaptures = _ATTENTION_BACKWARD(
            # What dlse is like nobody has looked at.
            *(plain and dlse is None, saved),
            *(do, q, k, v, out, lse, captures, ints, maps, seed, program, dropout_p, variant, wanted, dlse),
        )
        return None, None, None, dq, dk, dv, *_placed(dcaptures, wanted, count)


class FlashfuseWeights(torch.autograd.Function):
    """``flashfuse::attention_weights`` likewise: gradients for q, k and the captures."""

    @staticmethod
    def forward(ctx: Any, run: autograd.Run, plain: bool, args: tuple[Any, ...], *_: Tensor) -> Tensor:
        q, k, captures, ints, seed, program, dropout_p, variant, _dtype = args
        ctx.save_for_backward(q, k, seed, *captures)
        ctx.site = ints, program, dropout_p, variant
        ctx.set_materialize_grads(False)
        weights: Tensor = run(args)
        return weights

    @staticmethod
    def backward(ctx: Any, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
        ints, program, dropout_p, variant = ctx.site
        if dweights is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, seed, *captures = ctx.saved_tensors
        wanted = _wanted(program, ctx.needs_input_grad[5:])
        dq, dk, *dcaptures = _WEIGHTS_BACKWARD(
            dweights, q, k, captures, ints, seed, program, dropout_p, variant, wanted
        )
        return None, None, None, dq, dk, *_placed(dcaptures, wanted, len(captures))


def _wanted(program: str, needs: Sequence[bool]) -> list[int]:
    """The captures whose gradients are asked for."""
    if True not in needs:
        return []
    parsed = ScoreProgram.parse(program)
    return [i for i, name in enumerate(parsed.captures) if needs[i] and name in parsed.differentiable]


def _placed(grads: Sequence[Tensor], at: Sequence[int], count: int) -> list[Tensor | None]:
    """``grads`` at their places ``at`` among ``count``."""
    placed: list[Tensor | None] = [None] * count
    for i, grad in zip(at, grads, strict=True):
        placed[i] = grad
    return placed


for _name, _kernel, _leading, _function in (
    ("attention", _attention, 3, FlashfuseAttention),
    ("attention_and_max", _attention_and_max, 3, FlashfuseAttention),
    ("attention_backward", _attention_backward, 6, autograd.NoSecondDerivative),
    ("attention_weights", _weights, 2, FlashfuseWeights),
    ("attention_weights_backward", _weights_backward, 3, autograd.NoSecondDerivative),
):
    autograd.register(_LIBRARY, _name, _kernel, _leading, _function)


def _autocast(op: Any, device_type: str, key: DispatchKey) -> Any:
    """Under autocast the original's two matmuls run in the autocast dtype; so do ours."""
    autocast = DispatchKeySet(key)

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            cast = (
                t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v)
            )
            return op(*cast, *rest)

    return run


OPERATORS = (torch.ops.flashfuse.attention.default, torch.ops.flashfuse.attention_and_max.default)
"""What a fused site is: their arguments are the same, and so are their first two results."""

for _device, _autocast_key in (("cuda", DispatchKey.AutocastCUDA), ("cpu", DispatchKey.AutocastCPU)):
    for _name, _op in zip(("attention", "attention_and_max"), OPERATORS, strict=True):
        _LIBRARY.impl(_name, _autocast(_op, _device, _autocast_key), _autocast_key.name)
