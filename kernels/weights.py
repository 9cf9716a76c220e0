"""The weights themselves, for a model that returns them: every row by its definition, in chunks.

With R the dropout keep-mask over 1 − p, and dP what comes from whatever used the weights:

    S = score(q kᵀ)    W = softmax over the allowed keys of S    P = W ∘ R
    dW = R ∘ dP        dS = W ∘ (dW − rowsum(W ∘ dW))            dq = score'(S) dS k    dk = (score'(S) dS)ᵀ q

What is returned has the size of all scores; nothing else here has.  A sink is one more column of S, of
whose weight nothing is made: its dW is 0, and d sink is its dS.  Rows without a key follow
``ScoreProgram.dead_rows``.  One definition for every device.  The forward is computed in float32, float64
for float64; the backward, which few models have, in float64, as sums over all of dS are to be exact.

Shapes: q dq [B, H, Sq, D], k dk [B, H_kv, Skv, D], P dP [B, H, Sq, Skv].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashfuse.kernels import dispatch
from flashfuse.kernels.derivative import derivative
from flashfuse.kernels.expr import Expr, S, walk
from flashfuse.kernels.reference import Value, as_tensor, environment, evaluate
from flashfuse.kernels.spec import AVERAGING, NAN, REACHING, SCORES_ONLY, ScoreProgram

_CHUNK = 1 << 22
"""Scores that are in memory at a time, beside the result."""


@dataclass
class _Rows:
    """Rows ``q0:q1`` of one batch entry: W and what the program saw.

    Attributes:
        weights: [H, rows, Skv], before dropout; under a sink its weight is one more column.
        dead: [H, rows, 1], rows without a key, or a sink.
        scale: [H, rows, Skv], the mask of dropout over 1 − p; ``None`` without dropout.
    """

    b: int
    rows: slice
    weights: Tensor
    dead: Tensor
    scale: Tensor | None
    env: Mapping[str, Value]


class _Site:
    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        captures: Sequence[Tensor],
        ints: Sequence[int],
        seed: Tensor | None,
        program: ScoreProgram,
        dropout_p: float,
        variant: str,
        dtype: torch.dtype,
    ) -> None:
        self.q, self.k, self.program, self.dtype = q, k, program, dtype
        self.sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        captures = [c.to(self.dtype) if c.is_floating_point() else c for c in captures]
        self.env = environment(program, captures, ints, self.sizes, q.device)
        self.dropout_p, self.keep = dropout_p, None
        if dropout_p:
            if seed is None:
                raise ValueError("expected a seed: dropout_p > 0")
            self.keep = dispatch.implementation(variant).dropout_mask(seed, dropout_p, self.sizes)

    def chunks(self) -> Iterator[_Rows]:
        batch, heads, q_len, kv_len = self.sizes
        step = max(1, _CHUNK // max(1, heads * kv_len))
        for b in range(batch):
            for start in range(0, q_len, step):
                yield self.rows(b, slice(start, min(start + step, q_len)))

    def stacked(self, x: Tensor, b: int, rows: slice) -> Tensor:
        """Rows of [B, H, Sq, D] as [H_kv, heads per key head · rows, D]."""
        return x[b, :, rows].to(self.dtype).reshape(self.k.shape[1], -1, x.shape[-1])

    def rows(self, b: int, rows: slice) -> _Rows:
        heads, kv_len, device = self.sizes[1], self.sizes[3], self.q.device
        products = torch.bmm(self.stacked(self.q, b, rows), self.k[b].to(self.dtype).mT)
        env = dict(self.env)
        env["b"] = torch.full((1, 1, 1, 1), b, device=device)
        env["q"] = torch.arange(rows.start, rows.stop, device=device).view(1, 1, -1, 1)
        env["s"] = products.view(1, heads, -1, kv_len)
        scores = self.tensor(self.program.score, env).to(self.dtype)
        if self.program.mask is not None:
            allowed = self.tensor(self.program.mask, env) != 0
            scores = scores.masked_fill(~allowed, float("-inf"))
        if self.program.sink is not None:
            sink = as_tensor(evaluate(self.program.sink, env), device, self.dtype)
            scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
        dead = scores.amax(-1, keepdim=True) == float("-inf")
        weights = torch.softmax(scores, -1)
        of_dead = 1 / kv_len if self.program.dead_rows in AVERAGING else 0.0
        weights.masked_fill_(dead, float("nan") if self.program.dead_rows in NAN else of_dead)
        weights[..., kv_len:].masked_fill_(dead, 0)
        scale = None
        if self.keep is not None:
            scale = self.keep[b, :, rows].to(self.dtype).mul_(1 / (1 - self.dropout_p))
        return _Rows(b, rows, weights[0], dead[0], scale, env)

    def tensor(self, e: Expr, env: Mapping[str, Value]) -> Tensor:
        """``e`` on every score of the rows: [1, H, rows, Skv]."""
        products = env["s"]
        assert isinstance(products, Tensor)
        return torch.as_tensor(evaluate(e, env), device=products.device).expand(products.shape)


def forward(
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    variant: str,
    dtype: torch.dtype,
) -> Tensor:
    """P [B, H, Sq, Skv] in ``dtype``, dropped by the mask that ``variant`` draws from ``seed``."""
    computed_in = torch.float64 if q.dtype == torch.float64 else torch.float32
    site = _Site(q, k, captures, ints, seed, program, dropout_p, variant, computed_in)
    out = q.new_empty(site.sizes, dtype=dtype)
    if not out.numel():
        return out
    for chunk in site.chunks():
        # As PyTorch has it, by a product: NaN stays NaN.
        weights = chunk.weights[..., : out.shape[-1]]
        out[chunk.b, :, chunk.rows] = weights if chunk.scale is None else weights * chunk.scale
    return out


def backward(
    dweights: Tensor,
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    variant: str,
    capture_grads: Sequence[int],
) -> list[Tensor]:
    """[dq, dk, *gradients of the captures listed in ``capture_grads``] of P."""
    site = _Site(q, k, captures, ints, seed, program, dropout_p, variant, torch.float64)
    dq = torch.zeros(q.shape, dtype=site.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=site.dtype, device=k.device)
    names = {program.captures[i]: i for i in capture_grads}
    totals = {
        name: torch.zeros(captures[i].shape, dtype=site.dtype, device=q.device) for name, i in names.items()
    }
    loads = {e for e in walk(program.score) if e.op == "load" and e.args[0] in totals}
    slopes = [(e, derivative(program.score, e)) for e in loads]
    of_sink = () if program.sink is None else walk(program.sink)
    sink_loads = {e for e in of_sink if e.op == "load" and e.args[0] in totals}
    sink_slopes = [(e, derivative(program.sink, e)) for e in sink_loads if program.sink is not None]
    score_slope = derivative(program.score, S)
    stacked = (k.shape[1], -1, k.shape[2])
    for chunk in site.chunks() if dweights.numel() else ():
        grad = dweights[chunk.b, :, chunk.rows].to(site.dtype)
        if chunk.scale is not None:
            grad = grad * chunk.scale
        if program.sink is not None:
            grad = F.pad(grad, (0, 1))
        dx = torch._softmax_backward_data(grad, chunk.weights, -1, site.dtype)
        dx, d_sink = dx[..., : k.shape[2]], dx[..., k.shape[2] :].masked_fill(chunk.dead, 0)
        if program.dead_rows not in REACHING:
            # What replaces the scores there lets no gradient through.
            dx = dx.masked_fill(chunk.dead, 0)
        of_captures = dx.masked_fill(chunk.dead, 0) if program.dead_rows in SCORES_ONLY else dx
        for load, slope in slopes:
            _add_gradient(totals[load.args[0]], load, _times(of_captures, site, slope, chunk.env), chunk.env)
        for load, slope in sink_slopes:
            value = as_tensor(evaluate(slope, chunk.env), q.device, site.dtype)
            gradient = torch.where(d_sink == 0, 0, d_sink * value).view(d_sink.shape)
            _add_gradient(totals[load.args[0]], load, gradient, chunk.env)
        ds = _times(dx, site, score_slope, chunk.env).reshape(stacked)
        dq[chunk.b, :, chunk.rows] = torch.bmm(ds, k[chunk.b].to(site.dtype)).view(
            dq.shape[1], -1, q.shape[-1]
        )
        dk[chunk.b] += torch.bmm(ds.mT, site.stacked(q, chunk.b, chunk.rows))
    return [dq.to(q.dtype), dk.to(k.dtype), *(totals[n].to(captures[i].dtype) for n, i in names.items())]


def _times(dx: Tensor, site: _Site, slope: Expr, env: Mapping[str, Value]) -> Tensor:
    """dx · slope [H, rows, Skv]; a weight of 0 has no part in it, even where the derivative overflows."""
    if slope.is_const:
        return dx * slope.value
    return torch.where(dx == 0, 0, dx * site.tensor(slope, env)[0])


def _add_gradient(total: Tensor, load: Expr, grad: Tensor, env: Mapping[str, Value]) -> None:
    """``total[the indices of load] += grad``, summed first over the axes that no index depends on."""
    places = [torch.as_tensor(evaluate(i, env), device=grad.device) for i in load.operands]
    shape = torch.broadcast_shapes(*(p.shape for p in places))
    shape = (1,) * (4 - len(shape)) + tuple(shape)
    grad = grad[None]
    axes = [axis for axis, size in enumerate(shape) if size == 1 and grad.shape[axis] > 1]
    grad = grad.sum(axes, keepdim=True) if axes else grad
    total.index_put_(tuple(p.expand(shape) for p in places), grad.expand(shape), accumulate=True)
