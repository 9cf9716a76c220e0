"""The zoo: what happens to the weights between the softmax and the product with v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import DYNAMO, SCALE, WHOLE, B, D, H, S, fused, left, qkv, randn, softmax, with_padding

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def padded(dtype: torch.dtype = torch.bool):
    """q, k, v and padding that leaves one sequence without any key."""

    def make() -> tuple[Tensor, ...]:
        pad = torch.arange(S)[None] < torch.tensor([S - 2, 0])[:, None]
        return (*qkv(), pad.to(dtype))

    return make


def with_rows(*sizes: int):
    """q, k, v and a mask some rows of which have no key."""

    def make() -> tuple[Tensor, ...]:
        mask = torch.rand(*sizes) < 0.6
        mask[..., 1, :] = False
        return (*qkv(), mask)

    return make


# --- filled again after the softmax ---------------------------------------------------------------

PADDED = "s*0.25 where pad[b, kv] else zero"


@fused("filled", PADDED, inputs=padded())
def lowest_and_then_zero(q, k, v, pad):
    out = ~pad[:, None, None]
    return softmax(scores(q, k).masked_fill(out, LOWEST)).masked_fill(out, 0.0) @ v


@fused("filled", PADDED, inputs=padded())
def infinite_and_then_zero(q, k, v, pad):
    out = ~pad[:, None, None]
    return softmax(scores(q, k).masked_fill(out, -INF)).masked_fill(out, 0.0) @ v


@fused("filled", PADDED, inputs=padded())
def added_and_then_zero(q, k, v, pad):
    added = torch.where(pad[:, None, None], 0.0, LOWEST)
    return softmax(scores(q, k) + added).masked_fill(~pad[:, None, None], 0.0) @ v


@fused("filled", PADDED, inputs=padded(), captures=WHOLE)
def filled_in_place(q, k, v, pad):
    out = ~pad[:, None, None]
    # A copy: autograd needs the softmax's own result.
    weights = softmax(scores(q, k).masked_fill(out, LOWEST)).clone()
    weights.masked_fill_(out, 0)
    return weights @ v


@fused("filled", PADDED, inputs=padded(), dropout_p=0.25)
def filled_and_dropped(q, k, v, pad):
    out = ~pad[:, None, None]
    return F.dropout(softmax(scores(q, k).masked_fill(out, LOWEST)).masked_fill(out, 0.0), 0.25) @ v


@fused("filled", PADDED, inputs=padded(), dropout_p=0.25)
def dropped_and_filled(q, k, v, pad):
    out = ~pad[:, None, None]
    return F.dropout(softmax(scores(q, k).masked_fill(out, LOWEST)), 0.25).masked_fill(out, 0.0) @ v


@fused("filled", "s*0.25 where mask[b, 0, q, kv] else zero", inputs=with_rows(B, 1, S, S))
def chosen_where_allowed(q, k, v, mask):
    weights = softmax(torch.where(mask, scores(q, k), LOWEST))
    return torch.where(mask, weights, torch.zeros_like(weights)) @ v


@fused(
    "filled",
    "s*0.25 where mask[b, 0, q, kv] else zero",
    inputs=with_rows(B, 1, S, S),
    captures=("dynamo",),
)
def filled_where_the_mask_is_false(q, k, v, mask):
    none = mask == torch.tensor(False)
    weights = softmax(scores(q, k).masked_fill(none, -INF))
    return torch.masked_fill(weights, none, torch.scalar_tensor(0, dtype=weights.dtype)) @ v


@fused("filled", "s*0.25 where mask[b, 0, q, kv] else zero", inputs=with_rows(B, 1, S, S))
def times_the_mask(q, k, v, mask):
    return (softmax(scores(q, k).masked_fill(~mask, LOWEST)) * mask.to(q.dtype)) @ v


@fused("filled", "s*0.25 where mask[b, 0, q, kv] else nan", inputs=with_rows(B, 1, S, S))
def times_the_mask_where_it_is_nan(q, k, v, mask):
    # 0 times NaN is NaN.
    return (softmax(scores(q, k).masked_fill(~mask, -INF)) * mask.to(q.dtype)) @ v


@fused("filled", "s*0.25 where kv <= q", captures=DYNAMO)
def causal_twice(q, k, v):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    return softmax(scores(q, k).masked_fill(~causal, -INF)).tril() @ v


@fused("filled", "s*0.25 where kv <= q and pad[b, kv] else zero", inputs=padded(), captures=DYNAMO)
def two_conditions_one_fill(q, k, v, pad):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    allowed = causal & pad[:, None, None]
    weights = softmax(scores(q, k).masked_fill(~allowed, LOWEST))
    return (
        weights.masked_fill(~causal, 0.0).masked_fill(~pad[:, None, None], 0.0).masked_fill(~allowed, 0.0) @ v
    )


@fused("filled", PADDED, inputs=padded())
def filled_weights_returned(q, k, v, pad):
    out = ~pad[:, None, None]
    weights = softmax(scores(q, k).masked_fill(out, LOWEST)).masked_fill(out, 0.0)
    return weights @ v, weights.mean(1)


@fused("filled", PADDED, inputs=padded())
def weights_before_the_fill_returned(q, k, v, pad):
    out = ~pad[:, None, None]
    weights = softmax(scores(q, k).masked_fill(out, LOWEST))
    return weights.masked_fill(out, 0.0) @ v, weights


@left("filled", "weights_path", inputs=padded())
def filled_by_another_mask(q, k, v, pad):
    return softmax(scores(q, k)).masked_fill(~pad[:, None, None], 0.0) @ v


@left("filled", "weights_path", inputs=padded())
def filled_by_the_opposite(q, k, v, pad):
    out = ~pad[:, None, None]
    return softmax(scores(q, k).masked_fill(out, LOWEST)).masked_fill(~out, 0.0) @ v


@left("filled", "weights_path", inputs=padded())
def filled_with_something(q, k, v, pad):
    out = ~pad[:, None, None]
    return softmax(scores(q, k).masked_fill(out, LOWEST)).masked_fill(out, 0.1) @ v


@left("filled", "dead_rows_unclear", inputs=padded(), captures=DYNAMO)
def filled_by_one_of_two_conditions(q, k, v, pad):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    allowed = causal & pad[:, None, None]
    weights = softmax(scores(q, k).masked_fill(~allowed, LOWEST))
    return weights.masked_fill(~pad[:, None, None], 0.0) @ v


@left("filled", "weights_path", inputs=padded())
def queries_filled_for_keys(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], LOWEST))
    return weights.masked_fill(~pad[:, None, :, None], 0.0) @ v


@left("filled", "weights_path", inputs=with_rows(B, 1, S, S))
def times_another_mask(q, k, v, mask):
    return (softmax(scores(q, k)) * mask.to(q.dtype)) @ v


# --- NaN ------------------------------------------------------------------------------------------


@fused("rescued", PADDED, inputs=padded(), captures=WHOLE)
def nan_to_num(q, k, v, pad):
    return torch.nan_to_num(softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))) @ v


@fused("rescued", PADDED, inputs=padded(), captures=WHOLE)
def nan_to_num_of_zero(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))
    return torch.nan_to_num(weights, nan=0.0) @ v


@fused("rescued", PADDED, inputs=padded())
def zero_where_nan(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))
    return torch.where(torch.isnan(weights), 0.0, weights) @ v


@fused("rescued", PADDED, inputs=padded())
def weights_where_not_nan(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))
    return torch.where(~weights.isnan(), weights, torch.zeros_like(weights)) @ v


@fused("rescued", PADDED, inputs=padded())
def filled_where_nan(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))
    return weights.masked_fill(weights.isnan(), 0.0) @ v


@fused("rescued", PADDED, inputs=padded(), dropout_p=0.25, captures=WHOLE)
def nan_to_num_and_dropped(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))
    return F.dropout(weights.nan_to_num(), 0.25) @ v


@left("rescued", "weights_path", inputs=padded(), captures=WHOLE)
def nan_to_num_of_one(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))
    return torch.nan_to_num(weights, nan=1.0) @ v


@left("rescued", "score_path", inputs=padded())
def zero_where_not_nan(q, k, v, pad):
    weights = softmax(scores(q, k).masked_fill(~pad[:, None, None], -INF))
    return torch.where(torch.isnan(weights), weights, 0.0) @ v


# --- scaled ---------------------------------------------------------------------------------------


@fused("scaled", "s*0.25")
def weights_times_a_number(q, k, v):
    return (softmax(scores(q, k)) * 0.5) @ v


@fused("scaled", "s*0.25")
def weights_over_a_number(q, k, v):
    return (softmax(scores(q, k)) / 3) @ v


@fused("scaled", "s*0.25", inputs=lambda: (*qkv(), randn(H)))
def head_mask(q, k, v, gate):
    return (softmax(scores(q, k)) * gate[None, :, None, None]) @ v


@fused("scaled", "s*0.25", inputs=lambda: (*qkv(), randn(H)), dropout_p=0.25)
def head_mask_after_dropout(q, k, v, gate):
    return (F.dropout(softmax(scores(q, k)), 0.25) * gate.view(1, -1, 1, 1)) @ v


@fused("scaled", "s*0.25", inputs=lambda: (*qkv(), randn(B, H, S, 1)), dropout_p=0.25)
def gate_of_queries_before_dropout(q, k, v, gate):
    return F.dropout(gate.sigmoid() * softmax(scores(q, k)), 0.25) @ v


@fused("scaled", "s*0.25", inputs=lambda: (*qkv(), torch.rand(B, H, S, 1) + 1))
def weights_over_a_number_for_each_query(q, k, v, gate):
    return (softmax(scores(q, k)) / gate) @ v


@fused("scaled", "s*0.25", inputs=lambda: (*qkv(), randn(B, S)))
def gate_of_keys(q, k, v, gate):
    return (softmax(scores(q, k)) * gate[:, None, None, :]) @ v


@fused("scaled", "s*0.25 where pad[b, kv] else uniform", inputs=lambda: (*padded()(), randn(B, H, 1, S)))
def gate_of_keys_in_dead_rows(q, k, v, pad, gate):
    weights = softmax(scores(q, k) + torch.where(pad[:, None, None], 0.0, LOWEST))
    return (weights * gate) @ v


@fused("scaled", "s*0.25", inputs=with_padding(torch.float32))
def padding_that_the_scores_do_not_know(q, k, v, pad):
    return (softmax(scores(q, k)) * pad[:, None, None, :]) @ v


@fused("scaled", "s*0.25", inputs=lambda: (*qkv((B, 6, S, D), (B, 2, S, D)), randn(6, 1, 1)), group=3)
def head_mask_of_grouped_heads(q, k, v, gate):
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    return (softmax(scores(q, k)) * gate) @ v


@fused("scaled", "s*0.25", inputs=lambda: (*qkv((B * H, S, D)), randn(B * H, 1, 1)))
def gate_of_folded_heads(q, k, v, gate):
    return torch.bmm(softmax(torch.bmm(q, k.mT) * SCALE) * gate, v)


@fused("scaled", "s*0.25", inputs=lambda: (*qkv(), randn(H, 1, 1)))
def scaled_weights_returned(q, k, v, gate):
    weights = softmax(scores(q, k)) * gate
    return weights @ v, weights


@fused("scaled", "s*0.25", inputs=lambda: (*qkv(), randn(H, 1, 1), randn(B, 1, S, 1)), captures=WHOLE)
def scaled_twice(q, k, v, a, b):
    weights = b * (softmax(scores(q, k)) * a)
    weights *= 0.5
    return weights @ v


@left("scaled", "weights_path", inputs=lambda: (*qkv(), randn(S, S)))
def gate_of_pairs(q, k, v, gate):
    return (softmax(scores(q, k)) * gate) @ v


@left("scaled", "weights_path", inputs=lambda: (*qkv(), randn(S, 1)))
def a_term_for_each_query(q, k, v, term):
    return (softmax(scores(q, k)) + term) @ v


@left("scaled", "weights_path")
def weights_plus_a_number(q, k, v):
    return (softmax(scores(q, k)) + 0.1) @ v


@left("scaled", "weights_path")
def weights_squared(q, k, v):
    weights = softmax(scores(q, k))
    return (weights * weights) @ v


@left("scaled", "score_path")
def weights_over_their_largest(q, k, v):
    weights = softmax(scores(q, k))
    return (weights / weights.amax(-1, keepdim=True)) @ v


@left("scaled", "weights_path", inputs=lambda: (*qkv((B, 6, S, D), (B, 2, S, D)), randn(6, 1, S)))
def gate_of_keys_for_each_query_head(q, k, v, gate):
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    return (softmax(scores(q, k)) * gate) @ v


@left("scaled", "mutation", inputs=lambda: (*qkv(), randn(H, 1, 1)), captures=("dynamo", "symbolic"))
def gate_written_to_afterwards(q, k, v, gate):
    gate = gate.clone()
    weights = softmax(scores(q, k)) * gate
    gate.mul_(2.0)
    return weights @ v, gate
