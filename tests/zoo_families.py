"""The zoo: families of attention beyond those of Transformers, as papers and other libraries write them."""

from __future__ import annotations

import math

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


@fused("joined", "s*0.25", inputs=rope_apart)
def scores_returned(q, k, v, q_rope, k_rope):
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


# --- attention over the rows and columns of a matrix ----------------------------------------------


def alignment(*more: tuple[int, ...]) -> tuple[Tensor, ...]:
    """q, k and v as [B, rows, S, H, D], and ``more``."""
    return (*(randn(B, 3, S, 2, D) for _ in range(3)), *(randn(*sizes) for sizes in more))


def with_row_mask() -> tuple[Tensor, ...]:
    mask = torch.ones(B, 3, S)
    mask[0, 1, 4:] = 0.0
    return (*alignment((B, 1, 2, S, S), (B, 3, S, 2, D)), mask)


@fused(
    "rows",
    "s + bias[b // 3, 0, h, q, kv] + mul_1[b // 3, b % 3, kv] else nan",
    inputs=with_row_mask,
    captures=("dynamo", "export"),
)
def evoformer_rows(q, k, v, bias, gate, mask):
    q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
    scores = (q * SCALE) @ k.transpose(-1, -2) + bias
    scores = scores + (1e9 * (mask - 1))[:, :, None, None, :]
    out = (softmax(scores) @ v).transpose(-2, -3)
    return (out * torch.sigmoid(gate)).reshape(B, 3, S, 2 * D)


@fused(
    "rows",
    "s + bias[b // 3, h, q, kv] else nan",
    inputs=lambda: alignment((B, 2, S, S), (B, 3, S, 2, D)),
    captures=WHOLE,
)
def evoformer_rows_by_einsum(q, k, v, bias, gate):
    scores = torch.einsum("brqhc,brkhc->brhqk", q * SCALE, k) + bias[:, None]
    out = torch.einsum("brhqk,brkhc->brqhc", softmax(scores), v)
    return (out * torch.sigmoid(gate)).reshape(B, 3, S, 2 * D)


@fused("rows", "s + mask[b, kv, h // 2] else nan", inputs=lambda: alignment((B, 3, S)))
def evoformer_columns(q, k, v, mask):
    q, k, v = (t.transpose(1, 2).transpose(2, 3) for t in (q, k, v))
    scores = (q * SCALE) @ k.mT + mask.transpose(1, 2)[:, :, None, None, :]
    return (softmax(scores) @ v).transpose(2, 3).transpose(1, 2)


def pairs() -> tuple[Tensor, ...]:
    return (*(randn(B, S, S, 2, D) for _ in range(3)), randn(B, S, S, 2))


@fused("rows", "s*0.25 + bias[b // 7, q, kv, h] else nan", inputs=pairs, captures=WHOLE)
def triangle_from_the_starting_node(q, k, v, bias):
    scores = torch.einsum("bijhd,bikhd->bhijk", q, k) * SCALE + bias.permute(0, 3, 1, 2)[:, :, None]
    return torch.einsum("bhijk,bikhd->bijhd", softmax(scores), v)


@fused("rows", "s*0.25 + bias[b, kv, q, h % 2] else nan", inputs=pairs, captures=WHOLE)
def triangle_to_the_ending_node(q, k, v, bias):
    scores = torch.einsum("bijhd,bkjhd->bhjik", q, k) * SCALE + bias.permute(0, 3, 2, 1)[:, :, None]
    return torch.einsum("bhjik,bkjhd->bijhd", softmax(scores), v)


@fused(
    "rows",
    "s + bias[b // 3, b % 3, h, q, kv] else nan",
    inputs=lambda: alignment((B, 3, 2, S, S)),
)
def a_bias_for_every_row(q, k, v, bias):
    q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
    return softmax((q * SCALE) @ k.transpose(-1, -2) + bias) @ v


@left("rows", "softmax_axis", inputs=pairs, captures=WHOLE)
def triangle_normalised_over_the_other_edge(q, k, v, bias):
    scores = torch.einsum("bijhd,bikhd->bhijk", q, k) * SCALE + bias.permute(0, 3, 1, 2)[:, :, None]
    return torch.einsum("bhijk,bikhd->bijhd", torch.softmax(scores, 2), v)


# --- points in space ------------------------------------------------------------------------------


def frames_and_points() -> tuple[Tensor, ...]:
    heads = [randn(B, S, H, D) for _ in range(3)]
    return (*heads, randn(B, S, H, 4, 3), randn(B, S, H, 4, 3), randn(B, S, S, H), torch.rand(H))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)


@fused(
    "points",
    "s*0.14433756729740643 + bias[b, q, kv, h]*0.5773502691896257 - sum_2[b, q, kv, h]*0.5 else nan",
    inputs=frames_and_points,
    captures=("dynamo",),
)
def invariant_point_attention(q, k, v, q_points, k_points, bias, gamma):
    # Distances of points are differences of near numbers: they stay the graph's own.
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (1 / (3 * D)) ** 0.5
    scores = scores + bias.permute(0, 3, 1, 2) * (1 / 3) ** 0.5
    apart = (q_points[:, :, None] - k_points[:, None]) ** 2
    apart = apart.sum(-1) * F.softplus(gamma)[None, None, None, :, None]
    apart = apart.sum(-1) * -0.5
    weights = softmax(scores + apart.permute(0, 3, 1, 2))
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@fused("points", "-(sum_1[b, h, q, 0] + sum_2[b, h, kv] - s) else nan", captures=("dynamo", "export"))
def squared_distances_as_products(q, k, v):
    squares = q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1).unsqueeze(-2)
    return softmax(-(squares - 2 * q @ k.mT)) @ v


@fused("points", "s*0.25")
def a_product_written_as_a_sum(q, k, v):
    return softmax((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * SCALE) @ v


@left("points", "pairwise_score")
def squared_distances_of_pairs(q, k, v):
    return softmax(-squared_distances(q, k)) @ v


@left("points", "pairwise_score")
def distances(q, k, v):
    return softmax(-torch.cdist(q, k)) @ v


@left("points", "pairwise_score")
def additive_attention(q, k, v):
    return softmax(torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)).sum(-1)) @ v


@left("points", "score_path", inputs=lambda: (*qkv((B, S, H, D)), randn(B, S, S, D)))
def values_of_pairs(q, k, v, pair):
    # Every query has values of its own.
    weights = softmax(torch.einsum("bihd,bjhd->bhij", q, k))
    return torch.einsum("bhij,bijd->bihd", weights, pair)


# --- heads that are mixed, features that are normalised, keys of one's own ------------------------


@left("mixed", "scores_mixed", inputs=lambda: (*qkv(), randn(H, H)), captures=WHOLE)
def talking_heads_before_the_softmax(q, k, v, mix):
    scores = torch.einsum("bhij,hg->bgij", scores_of(q, k), mix)
    return softmax(scores) @ v


@left("mixed", "scores_mixed", inputs=lambda: (*qkv(), randn(H, H, 1, 1)))
def talking_heads_by_a_convolution(q, k, v, mix):
    return softmax(F.conv2d(scores_of(q, k), mix)) @ v


@left("mixed", "scores_mixed", inputs=lambda: (*qkv(), randn(H, H)))
def talking_heads_by_a_linear_layer(q, k, v, mix):
    scores = F.linear(scores_of(q, k).permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2)
    return softmax(scores) @ v


@left("mixed", "softmax_axis", inputs=lambda: (*qkv(), randn(H, H)))
def talking_heads_after_the_softmax(q, k, v, mix):
    return torch.einsum("bhij,hg->bgij", softmax(scores_of(q, k)), mix) @ v


@left("mixed", "score_path")
def only_the_largest_scores(q, k, v):
    scores = scores_of(q, k)
    lowest = scores.topk(3, dim=-1).values[..., -1:]
    return softmax(scores.masked_fill(scores < lowest, LOWEST)) @ v


@fused("mixed", "s*scale[h, 0, 0] else nan", inputs=lambda: (*qkv(), torch.rand(H, 1, 1)))
def cosines_with_a_temperature(q, k, v, scale):
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return softmax(scores * torch.clamp(scale, max=4.6).exp()) @ v


@fused(
    "mixed",
    "s / (norm[b, h, q, 0]*norm_1[b, h, kv, 0] + 1e-06) / t[0, h, 0, 0] else nan",
    inputs=lambda: (*qkv(), torch.rand(1, H, 1, 1) + 0.5),
    captures=("dynamo",),
)
def cosines_after_the_product(q, k, v, t):
    norms = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    return softmax(q @ k.mT / (norms + 1e-6) / t) @ v


@fused("mixed", "min(max(s*0.25, -50.0), 50.0)")
def scores_clamped(q, k, v):
    return softmax(scores_of(q, k).clamp(-50.0, 50.0)) @ v


@left("linear", "linear_attention")
def features_normalised(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


@left("linear", "linear_attention")
def features_normalised_by_einsum(q, k, v):
    context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=-2), v)
    return torch.einsum("bhnd,bhde->bhne", q.softmax(dim=-1) * SCALE, context)


@left("linear", inputs=qkv)
def features_of_a_kernel(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    norm = q @ k.sum(-2, keepdim=True).transpose(-2, -1)
    return q @ (k.transpose(-2, -1) @ v) / norm


@left("linear")
def mixed_by_fourier(q, k, v):
    return torch.fft.fft(torch.fft.fft(q, dim=-1), dim=-2).real


@fused("linear", "s", "s", inputs=lambda: qkv((B, H, 8, D)), captures=WHOLE)
def landmarks(q, k, v):
    # Nyström: the landmarks attend to all keys, and the queries to what is left of that.
    q_marks, k_marks = (t.reshape(B, H, 4, 2, D).mean(-2) for t in (q, k))
    context = softmax(q_marks @ k.mT) @ v
    return softmax(q @ k_marks.mT) @ context


@left("linear", "keys_per_query", inputs=lambda: qkv((B, H, 12, D)), captures=WHOLE)
def windows_unfolded(q, k, v):
    k, v = (F.pad(t, (0, 0, 2, 2)).unfold(2, 5, 1) for t in (k, v))
    weights = softmax(torch.einsum("bhsd,bhsdw->bhsw", q, k) * SCALE)
    return torch.einsum("bhsw,bhsdw->bhsd", weights, v)


# --- differences of two attentions ----------------------------------------------------------------


def two_attentions(*weight: int) -> tuple[Tensor, ...]:
    return (*(randn(B, H, S, D) for _ in range(4)), randn(B, H, S, 2 * D), torch.rand(*weight))


@fused("difference", "s*0.25", "s*0.25", inputs=lambda: two_attentions(H, 1, 1))
def difference_of_outputs(q1, k1, q2, k2, v, weight):
    out = softmax(scores_of(q1, k1)) @ v - weight * (softmax(scores_of(q2, k2)) @ v)
    return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-5)


@fused(
    "difference",
    "s where kv <= q",
    inputs=lambda: (randn(B, S, 8 * D), randn(B, S, 4 * D), randn(B, S, 4 * D), torch.rand(())),
    captures=("dynamo", "export"),
)
def difference_of_heads(q, k, v, weight):
    # Pairs of heads share the values and are subtracted afterwards.
    q, k = (t.view(B, S, -1, D).transpose(1, 2) for t in (q * SCALE, k))
    k = k.repeat_interleave(2, dim=1)
    v = v.view(B, S, 2, 2 * D).transpose(1, 2).repeat_interleave(4, dim=1)
    scores = q @ k.transpose(-2, -1) + torch.triu(torch.full((S, S), -INF), 1)
    out = (F.softmax(scores, dim=-1, dtype=torch.float32) @ v).view(B, 4, 2, S, 2 * D)
    return out[:, :, 0] - weight * out[:, :, 1]


@left("difference", "weights_combined", inputs=lambda: two_attentions(H, 1, 1))
def difference_of_weights(q1, k1, q2, k2, v, weight):
    # (P1 - c P2) v: where v is nearly constant the difference cancels exactly, and P1 v - c (P2 v) does not.
    return (softmax(scores_of(q1, k1)) - weight * softmax(scores_of(q2, k2))) @ v


@left("difference", "weights_combined", inputs=lambda: (*qkv((B, 2 * H, S, D)), torch.rand(())))
def difference_of_weights_of_heads(q, k, v, weight):
    first, second = softmax(scores_of(q, k)).chunk(2, dim=1)
    return (first - weight * second) @ v[:, :H]


# --- other libraries -----------------------------------------------------------------------------


@fused(
    "libraries",
    "s*0.25 where bias[0, 0, q, kv] else nan",
    inputs=lambda: (randn(B, S, 3 * H * D), torch.tril(torch.ones(20, 20)).view(1, 1, 20, 20)),
    captures=DYNAMO,
)
def nano_gpt(x, bias):
    b, t, c = x.size()
    q, k, v = (z.view(b, t, H, D).transpose(1, 2) for z in x.split(c // 3, dim=2))
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(bias[:, :, :t, :t] == 0, float("-inf"))
    return (F.softmax(att, dim=-1) @ v).transpose(1, 2).contiguous().view(b, t, c // 3)


@fused(
    "libraries",
    "s*0.25 + bias[0, h, 0, kv + 3] where kv <= q else nan",
    inputs=lambda: (*qkv(), randn(1, H, 1, 10)),
    captures=DYNAMO,
)
def mosaic_alibi(q, k, v, bias):
    scores = q @ k.mT * SCALE + bias[:, :, :, bias.size(-1) - k.size(-2) :]
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    return softmax(scores.masked_fill(~causal, torch.finfo(q.dtype).min)) @ v


@fused(
    "libraries",
    "s*0.25 where kv < q + 4",
    inputs=lambda: (*qkv(), randn(H, 3, D), randn(H, 3, D)),
    captures=DYNAMO,
)
def memory_keys_and_values(q, k, v, k_memory, v_memory):
    k, v = (torch.cat((m.expand(B, -1, -1, -1), t), -2) for m, t in ((k_memory, k), (v_memory, v)))
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
    scores = scores.masked_fill(torch.ones(S, S + 3, dtype=torch.bool).triu(4), LOWEST)
    return torch.einsum("b h i j, b h j d -> b h i d", softmax(scores), v)


def heads_to_batch(t: Tensor) -> Tensor:
    return t.reshape(B, S, H, D).permute(0, 2, 1, 3).reshape(B * H, S, D)


@fused("libraries", "s*0.25", inputs=lambda: tuple(t.bfloat16() for t in qkv((B, S, H * D))), captures=DYNAMO)
def diffusers_processor(q, k, v):
    dtype = q.dtype
    q, k, v = map(heads_to_batch, (q, k, v))
    q, k = q.float(), k.float()
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    out = torch.bmm(scores.softmax(dim=-1).to(dtype), v)
    return out.reshape(B, H, S, D).permute(0, 2, 1, 3).reshape(B, S, H * D)


@fused("libraries", "s", inputs=lambda: (randn(B, 3 * H * D, S),), captures=WHOLE)
def guided_diffusion(x):
    q, k, v = x.reshape(B * H, 3 * D, S).split(D, dim=1)
    scale = 1 / math.sqrt(math.sqrt(D))
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale).float(), dim=-1)
    return torch.einsum("bts,bcs->bct", weights.type(q.dtype), v).reshape(B, -1, S)


@fused("libraries", "s", inputs=lambda: tuple(randn(B, D, 5, 6) for _ in range(3)))
def self_attention_of_images(q, k, v):
    q, k, v = (t.view(B, D, 30) for t in (q, k, v))
    attention = F.softmax(torch.bmm(q.permute(0, 2, 1), k), dim=-1)
    return torch.bmm(v, attention.permute(0, 2, 1)).view(B, D, 5, 6)


@fused(
    "libraries", "s", inputs=lambda: (randn(B, 4, H * D), randn(B, S, H * D), randn(2 * H * D, H * D)),
    captures=WHOLE,
)  # fmt: skip
def perceiver_resampler(latents, x, weight):
    k, v = F.linear(torch.cat((x, latents), dim=-2), weight).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (latents, k, v))
    scores = torch.einsum("... i d, ... j d -> ... i j", q * SCALE, k)
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return torch.einsum("... i j, ... j d -> ... i d", scores.softmax(dim=-1), v)


@fused("libraries", "s", inputs=lambda: (randn(B, S, 2, 3, D), *qkv((B, S, 2, 1, D))[1:]), group=3)
def xformers_groups(q, k, v):
    k, v = (t.expand(B, S, 2, 3, D) for t in (k, v))
    q, k, v = (t.permute(0, 2, 3, 1, 4).reshape(-1, S, D) for t in (q, k, v))
    out = ((q * SCALE) @ k.mT).softmax(-1) @ v
    return out.reshape(B, 2, 3, S, D).permute(0, 3, 1, 2, 4)


@fused("libraries", "s*temperature[h, 0, 0] else nan", inputs=lambda: (*qkv((B, H, D, S)), randn(H, 1, 1)))
def attention_between_channels(q, k, v, temperature):
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return softmax((q @ k.transpose(-2, -1)) * temperature) @ v


@left("libraries", "weights_path")
def slots(q, k, v):
    weights = (k @ q.mT * SCALE).softmax(-1) + 1e-8
    return (weights / weights.sum(-2, keepdim=True)).mT @ v
