"""The ``native`` variant: PyTorch's own fused attention, that is cuDNN's, for plain dense sites.

    out = softmax(c · q kᵀ) v       over every key, or over kv ≤ q, with c > 0

Implements ``dispatch.Implementation`` for sites without captures, sinks and dropout.  It is chosen where it
was measured to be faster than our own kernels (``FASTER``).  Both write the same lse, natural logarithm in
float32, and lay results out alike, so each call of either direction is free to take the other's way.  Ours it
takes where cuDNN has been switched off, where results must be deterministic (cuDNN adds up dq in an
order that changes from run to run), and where cuDNN refuses.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flashfuse.kernels.expr import Expr, S, parse
from flashfuse.kernels.spec import AttentionShape, Reason, ScoreProgram

Direction = Literal["forward", "backward"]

FASTER: dict[tuple[int, int, bool], frozenset[Direction]] = dict.fromkeys(
    ((9, head_dim, causal) for head_dim in (64, 128) for causal in (False, True)),
    frozenset(("forward", "backward")),
)
"""(compute capability, D, causal) → where cuDNN was faster (``benchmarks/results/kernels.md``)."""
LEAST_LENGTH = 1024
LEAST_ROWS = 1 << 16
"""Rows of all batch entries and heads: some 500 tiles, which fill the device as when it was measured."""
LEAST_CUDNN = 91000

_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention
_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


# --- choosing it ------------------------------------------------------------------------------------


def refuse(
    shape: AttentionShape, program: ScoreProgram, dropout_p: float, device: torch.device
) -> Reason | None:
    """Why cuDNN cannot run a site."""
    if device.type != "cuda":
        return Reason("device", f"PyTorch's kernels are used on cuda, the site is on {device.type}")
    if program.captures or program.ints or program.sink is not None or _scale(program.score) is None:
        return Reason("program", f"PyTorch's kernels compute s*c, not {program.text}")
    if dropout_p > 0:
        return Reason("dropout", "PyTorch's kernels cannot tell which weights they dropped")
    sizes = (shape.batch, shape.num_q_heads, shape.num_kv_heads, shape.q_len, shape.kv_len, shape.head_dim)
    if not all(isinstance(n, int) for n in (*sizes, shape.v_head_dim)):
        return Reason("symbolic", "cuDNN plans anew for each size, which takes long: sizes must be known")
    if _plain(program, shape.q_len == shape.kv_len) is None:
        return Reason("mask", f"PyTorch's kernels have no mask but kv <= q, not {program.mask}")
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return Reason("dtype", f"PyTorch's kernels take bfloat16 and float16, not {shape.dtype}")
    if shape.head_dim != shape.v_head_dim or shape.head_dim % 8 or not 8 <= shape.head_dim <= 128:
        dims = f"{shape.head_dim} and {shape.v_head_dim}"
        return Reason("head_dim", f"cuDNN is used for equal D and Dv of 8, 16, …, 128, not {dims}")
    if min(shape.q_len, shape.kv_len) < 2:
        return Reason("length", f"cuDNN takes more than one query and key, not {shape.q_len}, {shape.kv_len}")
    if torch.are_deterministic_algorithms_enabled():
        return Reason("deterministic", "cuDNN's gradients are not deterministic")
    return _missing()


def prefer_ours(shape: AttentionShape, program: ScoreProgram, device: torch.device) -> Reason | None:
    """Why our own kernels are chosen for a site that cuDNN can run."""
    plain = _plain(program, shape.q_len == shape.kv_len)
    causal = plain is not None and plain.causal
    rows = shape.batch * shape.num_q_heads * shape.q_len
    if (
        (_capability(device), shape.head_dim, causal) in FASTER
        and shape.dtype == torch.bfloat16
        and shape.q_len == shape.kv_len
        and shape.num_q_heads == shape.num_kv_heads
        and shape.q_len >= LEAST_LENGTH
        and rows >= LEAST_ROWS
    ):
        return None
    measured = (
        f"D 64 and 128, bfloat16, ungrouped heads, lengths of {LEAST_LENGTH} and more, {LEAST_ROWS} rows"
    )
    return Reason("not_faster", f"cuDNN was measured to be faster on Hopper only, and for {measured}")


def _missing() -> Reason | None:
    """Why there is no cuDNN attention here and now."""
    if not (torch.backends.cudnn.enabled and torch.backends.cuda.cudnn_sdp_enabled()):
        return Reason("switched_off", "cuDNN's attention is switched off (torch.backends)")
    version = _cudnn_version()
    if version < LEAST_CUDNN:
        return Reason("cudnn", f"cuDNN {LEAST_CUDNN} or newer is needed, this is {version}")
    return None


@functools.cache
def _cudnn_version() -> int:
    """0 where there is none."""
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return 0
    return torch.backends.cudnn.version() or 0


@functools.cache
def _capability(device: torch.device) -> int:
    known = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device)[0] if known else 0


class _Plain(NamedTuple):
    scale: float
    causal: bool


_CAUSAL = (parse("kv <= q"), parse("kv <= q + Skv - Sq"))


@functools.lru_cache(maxsize=1024)
def _plain(program: ScoreProgram, square: bool) -> _Plain | None:
    """What cuDNN is told of the program, or ``None`` where it computes something else.

    Both causal masks are one where there are as many queries as keys (``square``); elsewhere neither is used.
    """
    scale = _scale(program.score)
    if scale is None or program.captures or program.ints or program.sink is not None:
        return None
    mask = program.mask
    if mask is None or (mask.is_const and mask.value):
        return _Plain(scale, False)
    return _Plain(scale, True) if square and mask in _CAUSAL else None


def _scale(score: Expr) -> float | None:
    """c where the score is exactly ``s*c`` with c > 0, else ``None``."""
    if score == S:
        return 1.0
    if score.op != "*" or score.args[0] != S or not score.args[1].is_const:
        return None
    scale = float(score.args[1].value)
    return scale if 0 < scale < math.inf else None


# --- running it -------------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    highest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, D], lse [B, H, Sq] float32, natural logarithm); ours where the maximum is asked for."""

    def run(q: Tensor, k: Tensor, v: Tensor, plain: _Plain) -> tuple[Tensor, Tensor]:
        out, lse = _FORWARD(q, k, v, None, True, 0.0, plain.causal, False, scale=plain.scale)[:2]
        return _dense(out), lse.squeeze(-1)

    done = None if highest is not None else _run("forward", run, q, k, v, program, dropout_p)
    if done is None:
        done = _ours().forward(q, k, v, captures, ints, maps, seed, program, dropout_p, highest)
    return done


def backward(
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
    program: ScoreProgram,
    dropout_p: float,
    capture_grads: Sequence[int],
    dlse: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv]; ours where there is a gradient of lse, of which cuDNN's backward knows nothing."""

    def run(q: Tensor, k: Tensor, v: Tensor, plain: _Plain) -> list[Tensor]:
        # PyTorch may keep cuDNN's plans by the strides of q, k and v alone, though a plan holds those of out
        # and do as well.  Ours are always dense.  So that no plan of the user's own calls, with other
        # strides, is taken for ours, the rate of dropout is the other zero: part of the key, and no dropout.
        logs = lse.contiguous().unsqueeze(-1)
        grads = _BACKWARD(
            *(_dense(do.to(q.dtype)), q, k, v, _dense(out), logs),
            *(logs, logs, None, None, None),  # seeds of dropout, which nothing reads; a bias; offsets of rows
            *(q.shape[2], k.shape[2], -0.0, plain.causal),
            scale=plain.scale,
        )
        return [_dense(t) for t in grads]

    done = None if dlse is not None else _run("backward", run, q, k, v, program, dropout_p)
    if done is None:
        arguments = (captures, ints, maps, seed, program, dropout_p, capture_grads, dlse)
        done = _ours().backward(do, q, k, v, out, lse, *arguments)
    return done


def dropout_mask(seed: Tensor, dropout_p: float, sizes: tuple[int, int, int, int]) -> Tensor:
    """The keep mask of our own kernels, which run every site with dropout."""
    mask: Tensor = _ours().dropout_mask(seed, dropout_p, sizes)
    return mask


def _ours() -> Any:
    from flashfuse.kernels import triton_attention

    return triton_attention


_WORKS: dict[Hashable, bool] = {}
"""By direction, sizes and strides: whether cuDNN ran it."""
_MOST_KNOWN = 4096


def _run(
    direction: Direction,
    run: Callable[[Tensor, Tensor, Tensor, _Plain], Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    program: ScoreProgram,
    dropout_p: float,
) -> Any:
    """What cuDNN makes of a call, or ``None`` where it is ours."""
    if torch.are_deterministic_algorithms_enabled() or not torch.backends.cuda.cudnn_sdp_enabled():
        return None
    plain = _plain(program, q.shape[2] == k.shape[2])
    if plain is None or dropout_p > 0 or not q.numel():
        return None
    if direction not in FASTER.get((_capability(q.device), q.shape[3], plain.causal), (direction,)):
        return None
    q, k, v = _rows(q), _rows(k), _rows(v)
    key = (direction, q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, q.device, plain.causal)
    works = _WORKS.get(key)
    if works is not None:
        return run(q, k, v, plain) if works else None
    if len(_WORKS) >= _MOST_KNOWN:
        _WORKS.clear()
    if _missing() is not None:
        return None
    try:
        done = run(q, k, v, plain)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # No plan for these sizes, or a library that cannot be loaded: ours run them from now on.
        what = str(error).partition("\n")[0]
        warnings.warn(f"cuDNN does not run {tuple(q.shape)}, our own kernels do: {what}", stacklevel=2)
        done = None
    _WORKS[key] = done is not None
    return done


def _rows(t: Tensor) -> Tensor:
    """``t`` [B, H, S, D], copied unless it lies in memory in the order B, S, H, D, in units of 16 bytes.

    Results of cuDNN follow the order of its inputs, and those of the operator lie in this one.
    """
    _, h, s, d = t.shape
    by_b, by_h, by_s, by_d = t.stride()
    by_h = d if h == 1 else by_h
    by_s = by_h * h if s == 1 else by_s
    by_b = by_s * s if t.shape[0] == 1 else by_b
    in_order = by_d == 1 and d <= by_h and by_h * h <= by_s and by_s * s <= by_b
    if in_order and not (by_h | by_s | by_b) % 8 and t.data_ptr() % 16 == 0:
        return t
    return _copied(t)


def _dense(t: Tensor) -> Tensor:
    """``t`` [B, H, S, D] as every tensor of its sizes that the operator returns: [B, S, H, D], dense."""
    _, h, s, d = t.shape
    wanted = (s * h * d, d, h * d, 1)
    if t.stride() == wanted and t.data_ptr() % 16 == 0:
        return t
    if t.transpose(1, 2).is_contiguous() and t.data_ptr() % 16 == 0:
        # Only the stride of a dimension of size 1 differs.
        return t.as_strided(t.shape, wanted)
    return _copied(t)


def _copied(t: Tensor) -> Tensor:
    return t.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
