"""The zoo: families of attention beyond those of Transformers, as papers and other libraries write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import DYNAMO, SCALE, WHOLE, B, D, H, S, fused, left, qkv, randn, softmax, with_mask

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


# --- something constant along a row is subtracted -----------------------------------------------


@fused("shift", "s*0.25")
def shifted_by_the_maximum(q, k, v):
    scores = scores_of(q, k)
    return softmax(scores - scores.max(dim=-1, keepdim=True)[0]) @ v


@fused("shift", "s*0.25", captures=WHOLE)
def shifted_by_the_detached_maximum(q, k, v):
    scores = scores_of(q, k)
    return softmax(scores - scores.amax(-1, keepdim=True).detach()) @ v


@fused("shift", "s*0.25")
def shifted_by_the_maximum_of_all(q, k, v):
    scores = scores_of(q, k)
    return softmax(scores - scores.max()) @ v


@fused("shift", "s*0.25")
def shifted_twice(q, k, v):
    scores = scores_of(q, k)
    scores = scores - scores.amax((-2, -1), keepdim=True)
    return softmax(scores - scores.amax(-1).unsqueeze(-1)) @ v


@fused("shift", "s*0.25 where mask[b, 0, q, kv] else nan", inputs=with_mask(B, 1, S, S))
def shifted_after_the_mask(q, k, v, mask):
    scores = scores_of(q, k).masked_fill(~mask, -INF)
    return softmax(scores - scores.amax(-1, keepdim=True)) @ v


@fused("shift", "s*0.25 where mask[b, 0, q, kv] else mean", inputs=with_mask(B, 1, S, S))
def shifted_after_a_finite_mask(q, k, v, mask):
    scores = scores_of(q, k).masked_fill(~mask, LOWEST)
    return softmax(scores - scores.amax(-1, keepdim=True)) @ v


@fused("shift", "s", inputs=lambda: tuple(t.half() for t in qkv()))
def shifted_before_the_cast(q, k, v):
    scores = (q * SCALE) @ k.transpose(-2, -1)
    scores = scores - scores.amax(-1, keepdim=True)
    return F.softmax(scores.float(), dim=-1).to(q.dtype) @ v


@left("shift", "score_path")
def shifted_by_the_maximum_of_a_column(q, k, v):
    scores = scores_of(q, k)
    return softmax(scores - scores.amax(-2, keepdim=True)) @ v


@left("shift", "score_path")
def shifted_by_the_mean(q, k, v):
    # Where a mask put −∞ into a row, its mean is −∞ as well.
    scores = scores_of(q, k)
    return softmax(scores - scores.mean(-1, keepdim=True)) @ v


@left("shift", "score_path", inputs=lambda: tuple(t.half() for t in qkv()))
def shifted_by_the_maximum_of_all_in_half(q, k, v):
    scores = scores_of(q, k)
    return softmax(scores - scores.max()) @ v


@left("shift", "score_path")
def exponentials_below_the_maximum_of_all(q, k, v):
    # Far below the largest score a whole row vanishes: 0 / 0.
    scores = scores_of(q, k)
    e = torch.exp(scores - scores.max())
    return (e / e.sum(-1, keepdim=True)) @ v


@left("shift", "score_path")
def divided_by_the_maximum(q, k, v):
    scores = scores_of(q, k)
    return softmax(scores / scores.amax(-1, keepdim=True)) @ v


# --- several products of rows, added up ----------------------------------------------------------


def rope_apart() -> tuple[Tensor, ...]:
    return (*qkv(), randn(B, H, S, 8), randn(B, 1, S, 8))


@fused("joined", "s*0.25", inputs=rope_apart)
def rotary_part_added(q, k, v, q_rope, k_rope):
    return softmax((q @ k.transpose(-2, -1) + q_rope @ k_rope.transpose(-2, -1)) * SCALE) @ v


@fused("joined", "s*0.25 where kv <= q", inputs=rope_apart)
def rotary_part_added_after_the_scale(q, k, v, q_rope, k_rope):
    scores = q @ k.transpose(-2, -1) * SCALE + q_rope @ k_rope.transpose(-2, -1) * SCALE
    return softmax(scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -INF)) @ v


@fused("joined", "s*0.25 + bias[h, q, kv] else nan", inputs=lambda: (*rope_apart(), randn(H, S, S)))
def rotary_part_added_after_a_bias(q, k, v, q_rope, k_rope, bias):
    scores = q @ k.transpose(-2, -1) * SCALE + bias
    return softmax(scores + q_rope @ k_rope.transpose(-2, -1) * SCALE) @ v


def latents() -> tuple[Tensor, ...]:
    return randn(B, S, H, D), randn(B, S, H, 8), randn(B, S, 24), randn(B, S, 8), randn(H, 2 * D, 24)


@fused("joined", "s*0.25 where kv <= q", inputs=latents, group=H, captures=DYNAMO)
def latent_attention_absorbed(q_nope, q_rope, latent, k_rope, weight):
    # DeepSeek's decoding: the projection of keys goes into the queries, all heads share the latents.
    q_nope = torch.einsum("bshd,hdc->bshc", q_nope, weight[:, :D])
    scores = torch.einsum("bshc,btc->bsht", q_nope, latent)
    scores = (scores + torch.einsum("bshr,btr->bsht", q_rope, k_rope)) * SCALE
    scores = scores + torch.full((S, S), -INF).triu_(1).unsqueeze(1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(q_nope)
    out = torch.einsum("bsht,btc->bshc", weights, latent)
    return torch.einsum("bshc,hdc->bshd", out, weight[:, -D:])


@fused("joined", "s")
def symmetric_scores(q, k, v):
    scores = q @ k.transpose(-2, -1)
    return softmax(scores + scores.transpose(-2, -1)) @ v


@fused("joined", "s*0.25 + matmul_1[b, h, q, kv] else nan", inputs=rope_apart, captures=WHOLE)
def rotary_part_with_another_scale(q, k, v, q_rope, k_rope):
    return softmax(q @ k.transpose(-2, -1) * SCALE + q_rope @ k_rope.transpose(-2, -1)) @ v


@fused("joined", "s*matmul_1[b, h, q, kv] else nan", inputs=rope_apart, captures=WHOLE)
def rotary_part_multiplied(q, k, v, q_rope, k_rope):
    return softmax((q @ k.transpose(-2, -1)) * (q_rope @ k_rope.transpose(-2, -1))) @ v


@left("joined", "score_path")
def scores_and_their_mirror(q, k, v):
    scores = scores_of(q, k)
    return softmax(scores + scores.flip(-1)) @ v


@left("joined", "weights_escape", inputs=rope_apart)
def rotary_part_returned(q, k, v, q_rope, k_rope):
    rope = q_rope @ k_rope.transpose(-2, -1)
    scores = (q @ k.transpose(-2, -1) + rope) * SCALE
    return softmax(scores) @ v, scores


# --- a score matrix in pieces -------------------------------------------------------------------


@fused("pieces", "s*0.25", "s*0.25", captures=DYNAMO)
def queries_in_chunks(q, k, v):
    return torch.cat([softmax(scores_of(chunk, k)) @ v for chunk in q.split(4, dim=2)], dim=2)


@fused("pieces", "s*0.25", captures=DYNAMO)
def scores_in_chunks_of_queries(q, k, v):
    return softmax(torch.cat([scores_of(chunk, k) for chunk in q.split(4, dim=2)], dim=2)) @ v


@fused("pieces", "s*0.25")
def scores_in_chunks_of_keys(q, k, v):
    return softmax(torch.cat([scores_of(q, k[:, :, :4]), scores_of(q, k[:, :, 4:])], dim=3)) @ v


@fused("pieces", "s", inputs=lambda: qkv((B, H, 12, D)))
def blocks_of_a_sequence(q, k, v):
    q, k, v = (t.view(B, H, 3, 4, D) for t in (q, k, v))
    return (softmax(q @ k.transpose(-2, -1)) @ v).view(B, H, 12, D)


@fused("pieces", "s", inputs=lambda: qkv((B, H, 12, D)))
def blocks_and_the_ones_before(q, k, v):
    q, k, v = (t.view(B, H, 3, 4, D) for t in (q, k, v))

    def with_previous(t):
        return torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], dim=3)

    return softmax(q @ with_previous(k).transpose(-2, -1)) @ with_previous(v)


@fused("pieces", "s")
def every_other_row(q, k, v):
    q, k, v = (t[:, :, ::2] for t in (q, k, v))
    return softmax(q @ k.transpose(-2, -1)) @ v


@left("pieces", "score_path")
def chunks_put_together_in_another_order(q, k, v):
    a, b = q.split([4, 3], dim=2)
    return softmax(torch.cat([scores_of(b, k), scores_of(a, k)], dim=2)) @ v


@left("pieces", "score_path")
def chunks_that_overlap(q, k, v):
    scores = torch.cat([scores_of(q, k[:, :, :4]), scores_of(q, k[:, :, 3:])], dim=3)
    return softmax(scores) @ torch.cat([v, v[:, :, 3:4]], dim=2)
