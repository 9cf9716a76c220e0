"""The zoo: sinks, and maxima that are taken off before a softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import DYNAMO, SCALE, WHOLE, B, H, S, fused, left, qkv, randn, softmax

LEAST = torch.finfo(torch.float32).min


def with_sinks() -> tuple[Tensor, ...]:
    return (*qkv(), randn(H))


def padded_with_sinks() -> tuple[Tensor, ...]:
    pad = torch.arange(S)[None] >= torch.tensor([0, 2])[:, None]
    return (*qkv(), pad, randn(H))


def column(sinks: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(B, -1, S, -1)


def of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def causal(scores: Tensor, fill: float = -torch.inf) -> Tensor:
    return scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), fill)


# --- one more column ----------------------------------------------------------------------------


@fused("sinks", "s*0.25 sink sinks[h]", inputs=with_sinks)
def sink_last(q, k, v, sinks):
    return softmax(torch.cat([of(q, k), column(sinks)], -1))[..., :-1] @ v


@fused("sinks", "s*0.25 sink sinks[h]", inputs=with_sinks)
def sink_first(q, k, v, sinks):
    return softmax(torch.cat([column(sinks), of(q, k)], -1))[..., 1:] @ v


@fused("sinks", "s*0.25 where kv <= q sink sinks[h]", inputs=with_sinks, captures=DYNAMO)
def sink_with_the_maximum_taken_off(q, k, v, sinks):
    combined = torch.cat([causal(of(q, k)), column(sinks)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined, dim=-1, dtype=combined.dtype)
    return torch.matmul(probs[..., :-1], v)


@fused("sinks", "s*0.25 where kv <= q sink sinks[h]", inputs=with_sinks, captures=DYNAMO)
def sink_with_the_maximum_taken_off_in_place(q, k, v, sinks):
    combined = torch.cat([causal(of(q, k)), column(sinks)], dim=-1)
    combined -= combined.detach().amax(dim=-1, keepdim=True)
    return softmax(combined)[..., :-1] @ v


@fused("sinks", "s*0.25 where pad[b, kv] sink sinks[h] else uniform", inputs=padded_with_sinks)
def sink_beside_rows_without_a_key(q, k, v, pad, sinks):
    scores = of(q, k) + torch.where(pad[:, None, None, :], 0.0, LEAST)
    return softmax(torch.cat([scores, column(sinks)], -1))[..., :-1] @ v


@fused("sinks", "s*0.25 where pad[b, kv] sink sinks[h] else nan", inputs=padded_with_sinks)
def sink_beside_rows_of_minus_infinity(q, k, v, pad, sinks):
    scores = of(q, k).masked_fill(~pad[:, None, None, :], -torch.inf)
    return softmax(torch.cat([scores, column(sinks)], -1)).narrow(-1, 0, S) @ v


@fused("sinks", "s*0.25 sink sinks[h]", inputs=with_sinks, dropout_p=0.3)
def sink_then_dropout(q, k, v, sinks):
    weights = softmax(torch.cat([of(q, k), column(sinks)], -1))[..., :-1]
    return F.dropout(weights, 0.3) @ v


@fused("sinks", "s*0.25 sink sinks[b, h, q, 0]", inputs=lambda: (*qkv(), randn(B, H, S, 1)))
def sink_of_each_row(q, k, v, sinks):
    return softmax(torch.cat([of(q, k), sinks], -1).float())[..., :-1].to(q.dtype) @ v


@fused("sinks", "s*0.25 sink 0.0")
def sink_of_padding(q, k, v):
    return softmax(F.pad(of(q, k), (1, 0)))[..., 1:] @ v


@fused("sinks", "s*0.25 where kv <= q sink 0.0", captures=DYNAMO)
def sink_of_zeros(q, k, v):
    scores = causal(of(q, k))
    combined = torch.cat([scores, scores.new_zeros(B, H, S, 1)], -1)
    return softmax(combined)[..., :S] @ v


@fused("sinks", "s*0.25")
def padding_without_weight(q, k, v):
    return softmax(F.pad(of(q, k), (0, 1), value=-torch.inf))[..., :-1] @ v


@left("sinks", "weights_path", inputs=with_sinks)
def two_columns_cut_off(q, k, v, sinks):
    weights = softmax(torch.cat([column(sinks), of(q, k), column(sinks)], -1))
    return weights[..., 1:-1] @ v


@left("sinks", "score_path", inputs=with_sinks)
def another_column_than_the_sink_cut_off(q, k, v, sinks):
    return softmax(torch.cat([of(q, k), column(sinks)], -1))[..., 1:] @ v


@left("sinks", "weights_path")
def a_key_cut_off(q, k, v):
    return softmax(of(q, k))[..., :-1] @ v[..., :-1, :]


@left("sinks", "weights_path")
def a_sink_of_the_scores(q, k, v):
    scores = of(q, k)
    return softmax(torch.cat([scores, scores.amax(-1, keepdim=True)], -1))[..., :-1] @ v


@left("sinks", "sink", inputs=with_sinks)
def scores_shifted_without_the_sink(q, k, v, sinks):
    scores = of(q, k)
    scores = scores - scores.amax(-1, keepdim=True)
    return softmax(torch.cat([scores, column(sinks)], -1))[..., :-1] @ v


@left("sinks", "weights_path", inputs=with_sinks)
def sink_added_to_the_weights(q, k, v, sinks):
    return (softmax(of(q, k)) + sinks.view(1, H, 1, 1)) @ v


@left("sinks", "dropout", inputs=with_sinks)
def dropout_of_the_sink_too(q, k, v, sinks):
    return F.dropout(softmax(torch.cat([of(q, k), column(sinks)], -1)), 0.3)[..., :-1] @ v


@fused("sinks", "s*0.25 sink sinks[h]", inputs=with_sinks)
def weight_of_the_sink_used_elsewhere(q, k, v, sinks):
    weights = softmax(torch.cat([of(q, k), column(sinks)], -1))
    return weights[..., :-1] @ v + weights[..., -1:]


@fused("sinks", "s*0.25 where kv <= q sink sinks[h]", inputs=with_sinks, captures=DYNAMO)
def weights_without_the_sink_returned(q, k, v, sinks):
    weights = softmax(torch.cat([causal(of(q, k)), column(sinks)], -1).float())[..., :-1].to(v.dtype)
    return weights @ v, weights


@fused("sinks", "s*0.25 where pad[b, kv] sink sinks[h] else uniform", inputs=padded_with_sinks)
def weights_after_the_sink_returned(q, k, v, pad, sinks):
    scores = of(q, k) + torch.where(pad[:, None, None, :], 0.0, LEAST)
    weights = softmax(torch.cat([column(sinks), scores], -1))[..., 1:]
    return weights @ v, weights.mean(1)


@fused("sinks", "s*0.25 sink sinks[h]", inputs=with_sinks, dropout_p=0.3)
def weights_without_the_sink_returned_dropped(q, k, v, sinks):
    weights = softmax(torch.cat([of(q, k), column(sinks)], -1))[..., :-1]
    dropped = F.dropout(weights, 0.3)
    return dropped @ v, weights, dropped


@fused("sinks", "s*0.25 sink sinks[h]", inputs=with_sinks)
def weights_with_and_without_the_sink_returned(q, k, v, sinks):
    weights = softmax(torch.cat([of(q, k), column(sinks)], -1))
    return weights[..., :-1] @ v, weights, weights[..., :-1]


@left("sinks", "mutation", inputs=with_sinks, captures=WHOLE)
def weights_without_the_sink_written_to(q, k, v, sinks):
    weights = softmax(torch.cat([of(q, k), column(sinks)], -1))[..., :-1]
    out = weights @ v
    weights.mul_(2.0)
    return out, weights


@left("sinks", "weights_escape", inputs=with_sinks, captures=WHOLE)
def keep_mask_beside_a_sink_returned(q, k, v, sinks):
    weights = softmax(torch.cat([of(q, k), column(sinks)], -1))[..., :-1]
    dropped, keep = torch.ops.aten.native_dropout(weights, 0.3, True)
    return dropped @ v, keep


# --- one more term of the sum ---------------------------------------------------------------------


@fused("sinks", "s*0.25 sink 0.0")
def softmax_plus_one(q, k, v):
    e = torch.exp(of(q, k))
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


@fused("sinks", "s*0.25 where kv <= q sink 0.0", captures=DYNAMO)
def softmax_plus_one_with_the_maximum_taken_off(q, k, v):
    scores = causal(of(q, k))
    m = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - m)
    return (e / (torch.exp(-m) + e.sum(-1, keepdim=True))) @ v


@fused("sinks", "s*0.25 sink 0.0")
def softmax_plus_one_with_a_clamped_maximum(q, k, v):
    scores = of(q, k)
    m = scores.max(-1, keepdim=True).values.clamp(min=0)
    e = torch.exp(scores - m)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-m))) @ v


@fused("sinks", "s*0.25 sink sinks[h]", inputs=with_sinks)
def sink_as_a_term(q, k, v, sinks):
    scores = of(q, k)
    m = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - m)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(sinks.view(1, H, 1, 1) - m))) @ v


@fused("sinks", "s*0.25 sink 0.0", dropout_p=0.3)
def weights_of_softmax_plus_one_returned(q, k, v):
    scores = of(q, k)
    m = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - m)
    weights = e / (torch.exp(-m) + e.sum(-1, keepdim=True))
    dropped = F.dropout(weights, 0.3)
    return dropped @ v, weights, dropped


@left("sinks")
def a_term_that_is_not_shifted(q, k, v):
    # The exponentials are of differences to the maximum, the 1 is not.
    scores = of(q, k)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e * (1 / (1 + e.sum(-1, keepdim=True)))) @ v


@left("sinks", "sink")
def one_added_to_a_sum_of_differences(q, k, v):
    scores = of(q, k)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


# Decompositions lose the detach.
@left("sinks", "sink", captures=("dynamo", "symbolic", "export"))
def a_term_whose_maximum_lets_a_gradient_through(q, k, v):
    scores = of(q, k)
    m = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - m.detach())
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-m))) @ v


@left("sinks", "dead_rows_unclear", inputs=padded_with_sinks)
def a_term_beside_rows_of_minus_infinity(q, k, v, pad, sinks):
    scores = of(q, k).masked_fill(~pad[:, None, None, :], -torch.inf)
    m = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - m)
    return (e / (e.sum(-1, keepdim=True) + torch.exp(-m))) @ v


# --- a maximum taken off --------------------------------------------------------------------------


@fused("shifts", "s*0.25")
def maximum_taken_off_before_the_softmax(q, k, v):
    scores = of(q, k)
    return softmax(scores - scores.max(-1, keepdim=True).values) @ v


@fused("shifts", "s*0.25")
def detached_maximum_taken_off(q, k, v):
    scores = of(q, k)
    return softmax(scores - scores.detach().amax(-1, keepdim=True)) @ v


@fused("shifts", "s*0.25 where kv <= q", captures=DYNAMO)
def maximum_of_unmasked_scores_taken_off(q, k, v):
    scores = of(q, k)
    return softmax(causal(scores - scores.amax(-1, keepdim=True))) @ v


@fused("shifts", "s*0.25 where kv <= q", captures=DYNAMO)
def clamped_maximum_of_masked_scores_taken_off(q, k, v):
    scores = causal(of(q, k))
    return softmax(scores - scores.amax(-1, keepdim=True).clamp(min=-1e4)) @ v


@fused(
    "shifts",
    "s*0.25 + bias[b, h, q, kv] else nan",
    inputs=lambda: (*qkv(), randn(B, H, S, S)),
    captures=WHOLE,
)
def maximum_of_biased_scores_taken_off(q, k, v, bias):
    scores = of(q, k) + bias
    return softmax(scores - scores.amax(-1, keepdim=True)) @ v


@fused("shifts", "s*0.25 + bias[b, h, q, kv] else nan", inputs=lambda: (*qkv(), randn(B, H, S, S)))
def maximum_taken_off_of_smaller_scores(q, k, v, bias):
    """CogView's, against overflow in half precision."""
    scores = (of(q, k) + bias) / 32
    return softmax((scores - scores.amax(-1).unsqueeze(-1)) * 32) @ v


@left("shifts", "score_path", inputs=lambda: (*qkv(), randn(S)))
def maximum_taken_off_and_scaled_by_the_key(q, k, v, scale):
    scores = of(q, k)
    return softmax((scores - scores.amax(-1, keepdim=True)) * scale) @ v


@left("shifts", "score_path")
def maximum_over_queries_taken_off(q, k, v):
    scores = of(q, k)
    return softmax(scores - scores.amax(-2, keepdim=True)) @ v


@left("shifts", "score_path")
def maximum_added(q, k, v):
    scores = of(q, k)
    return softmax(scores + scores.amax(-1, keepdim=True)) @ v


@left("shifts", "score_path")
def maximum_taken_off_before_a_softcap(q, k, v):
    scores = of(q, k)
    return softmax(torch.tanh(scores - scores.amax(-1, keepdim=True))) @ v


@left("shifts", "score_path", captures=DYNAMO)
def maximum_taken_off_half_of_the_row(q, k, v):
    scores = of(q, k)
    half = torch.arange(S) < 3
    return softmax(torch.where(half, scores - scores.amax(-1, keepdim=True), scores)) @ v


@fused("shifts", "s*0.25")
def maximum_used_elsewhere(q, k, v):
    scores = of(q, k)
    m = scores.amax(-1, keepdim=True)
    return softmax(scores - m) @ v + m
