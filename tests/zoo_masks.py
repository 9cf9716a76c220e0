"""The zoo: additive biases, masks of indices, masks handed in, and how they are written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from zoo import (
    DYNAMO,
    SCALE,
    WHOLE,
    B,
    D,
    H,
    S,
    fused,
    left,
    qkv,
    randn,
    softmax,
    with_bias,
    with_mask,
    with_padding,
)

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min

# --- biases -------------------------------------------------------------------------------------


@fused("bias", "s*0.25 + bias[b, h, q, kv] else nan", inputs=with_bias(B, H, S, S))
def bias_full(q, k, v, bias):
    return softmax(q @ k.transpose(-2, -1) * SCALE + bias) @ v


@fused("bias", "s*0.25 + bias[b, 0, 0, kv] else nan", inputs=with_bias(B, 1, 1, S))
def bias_of_keys(q, k, v, bias):
    return softmax(q @ k.transpose(-2, -1) * SCALE + bias) @ v


@fused("bias", "bias[q, kv] + s*0.25 else nan", inputs=with_bias(S, S))
def bias_first(q, k, v, bias):
    return softmax(bias + q @ k.transpose(-2, -1) * SCALE) @ v


@fused("bias", "s*0.25 + bias[b, h, q, kv] else nan", inputs=with_bias(B, H, S, S))
def bias_in_place(q, k, v, bias):
    scores = q @ k.transpose(-2, -1) * SCALE
    scores += bias
    return softmax(scores) @ v


@fused("bias", "s*0.25 + bias[b, h, q, kv] else nan", inputs=with_bias(B, H, S, S))
def bias_in_place_method(q, k, v, bias):
    return softmax((q @ k.transpose(-2, -1) * SCALE).add_(bias)) @ v


@fused("bias", "s*0.25 - bias[b, h, q, kv]*2 else nan", inputs=with_bias(B, H, S, S))
def bias_subtracted_with_alpha(q, k, v, bias):
    return softmax(torch.sub(q @ k.transpose(-2, -1) * SCALE, bias, alpha=2)) @ v


@fused("bias", "s - bias[b, h, q, kv]*0.5 else nan", inputs=with_bias(B, H, S, S))
def bias_scaled(q, k, v, bias):
    return softmax(q @ k.transpose(-2, -1) + bias * -0.5) @ v


@fused("bias", "s*0.25 + (kv - q)*slopes[h] else nan", inputs=with_bias(H), captures=DYNAMO)
def alibi(q, k, v, slopes):
    n = torch.arange(q.shape[-2])
    distance = n[None, :] - n[:, None]
    return softmax(q @ k.transpose(-2, -1) * SCALE + slopes[:, None, None] * distance) @ v


@fused(
    "bias",
    "s*0.25 + bias[h, q, kv] + more[b, 0, 0, kv] else nan",
    inputs=lambda: (*qkv(), randn(H, S, S), randn(B, 1, 1, S)),
)
def bias_and_more(q, k, v, bias, more):
    return softmax(q @ k.transpose(-2, -1) * SCALE + bias + more) @ v


def without_gradient(bias):
    with torch.no_grad():
        return bias * 2


@fused("bias", "s*0.25 + mul_1[b, h, q, kv] else nan", inputs=with_bias(B, H, S, S), captures=("dynamo",))
def bias_without_a_gradient(q, k, v, bias):
    return softmax(q @ k.transpose(-2, -1) * SCALE + without_gradient(bias)) @ v


@fused("bias", "s*0.25 + detach[b, h, q, kv] else nan", inputs=with_bias(B, H, S, S), captures=WHOLE)
def bias_detached(q, k, v, bias):
    return softmax(q @ k.transpose(-2, -1) * SCALE + bias.detach()) @ v


@left("bias", "weights_path", inputs=with_bias(B, H, S, S))
def bias_after_the_softmax(q, k, v, bias):
    return (softmax(q @ k.transpose(-2, -1) * SCALE) + bias) @ v


@left("bias", "score_path")
def bias_from_the_scores(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return softmax(scores + scores.mean(-1, keepdim=True)) @ v


@left("bias", "mutation", inputs=with_bias(B, H, S, S), captures=("dynamo", "symbolic"))
def bias_written_to_afterwards(q, k, v, bias):
    bias = bias.clone()
    weights = softmax(q @ k.transpose(-2, -1) * SCALE + bias)
    bias.mul_(2.0)
    return weights @ v, bias


@left("bias", "mutation", captures=("dynamo", "symbolic"))
def q_written_to_before_the_product_with_v(q, k, v):
    q = torch.sin(q)
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    q.mul_(2.0)
    return weights @ v, q


@left("bias", "mutation", captures=("dynamo", "symbolic"))
def k_written_to_through_a_view(q, k, v):
    k = torch.sin(k)
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    k[:, 0].zero_()
    return weights @ v, k


# --- masks handed in ----------------------------------------------------------------------------


@fused("mask", "s*0.25 where mask[b, 0, q, kv] else nan", inputs=with_mask(B, 1, S, S))
def mask_where(q, k, v, mask):
    return softmax(torch.where(mask, q @ k.transpose(-2, -1) * SCALE, -INF)) @ v


@fused("mask", "s*0.25 where mask[b, 0, q, kv] else nan", inputs=with_mask(B, 1, S, S))
def mask_filled(q, k, v, mask):
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~mask, -INF)) @ v


@fused("mask", "s*0.25 where mask[b, 0, q, kv] else nan", inputs=with_mask(B, 1, S, S))
def mask_filled_in_place(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * SCALE
    scores.masked_fill_(torch.logical_not(mask), -INF)
    return softmax(scores) @ v


@fused("mask", "s*0.25 where mask[q, kv] else mean", inputs=with_mask(S, S), captures=DYNAMO)
def mask_filled_with_the_lowest(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * SCALE
    return softmax(scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)) @ v


@fused("mask", "s*0.25 where mask[b, 0, 0, kv] else mean", inputs=with_mask(B, 1, 1, S))
def mask_filled_with_minus_1e9(q, k, v, mask):
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(mask == 0, -1e9)) @ v


@fused("mask", "where(not mask[b, 0, 0, kv], -10000.0, s*0.25) else nan", inputs=with_mask(B, 1, 1, S))
def mask_filled_with_minus_1e4(q, k, v, mask):
    # Too small to be sure that the weight is 0, so it stays a number.
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~mask, -1e4)) @ v


@fused(
    "mask",
    f"where(kv <= q, s*0.25, {LOWEST}) + where(pad[b, kv], 0.0, {LOWEST}) else nan",
    inputs=with_padding(torch.bool),
    captures=DYNAMO,
)
def masks_filled_and_added(q, k, v, pad):
    # Where every key is masked it depends on which mask did it, so the minima stay numbers.
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    scores = torch.where(causal, q @ k.transpose(-2, -1) * SCALE, LOWEST)
    return softmax(scores + torch.where(pad, 0.0, LOWEST)[:, None, None]) @ v


@left("mask", "dead_rows_unclear", inputs=with_padding(torch.bool), captures=DYNAMO)
def infinite_masks_filled_and_added(q, k, v, pad):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    scores = torch.where(causal, q @ k.transpose(-2, -1) * SCALE, -torch.inf)
    return softmax(scores + torch.where(pad, 0.0, LOWEST)[:, None, None]) @ v


@fused("mask", "s*0.25 where mask[b, 0, q, kv] else uniform", inputs=with_mask(B, 1, S, S))
def mask_added(q, k, v, mask):
    return softmax(q @ k.transpose(-2, -1) * SCALE + torch.where(mask, 0.0, LOWEST)) @ v


@fused("mask", "s*0.25 where mask[b, 0, q, kv] else nan_s", inputs=with_mask(B, 1, S, S))
def infinite_mask_added(q, k, v, mask):
    return softmax(q @ k.transpose(-2, -1) * SCALE + torch.where(mask, 0.0, -INF)) @ v


@fused(
    "mask",
    "tanh(s*0.25) + bias[h, q, kv] where kv <= q and pad[b, kv] else nan_all",
    inputs=lambda: (*with_padding(torch.bool)(), randn(H, S, S)),
    captures=DYNAMO,
)
def infinite_masks_added_to_a_bias(q, k, v, pad, bias):
    """As ``nn.Transformer`` merges them: numbers for the causal mask, −inf filled in for the padding."""
    causal = torch.full((S, S), -INF).triu(1)
    merged = causal + torch.zeros(B, 1, 1, S).masked_fill(~pad[:, None, None], -INF)
    return softmax(torch.tanh(q @ k.transpose(-2, -1) * SCALE) + bias + merged) @ v


@fused(
    "mask",
    "s*0.25 + bias[h, q, kv] where mask[b, 0, q, kv] else nan_s",
    inputs=lambda: (*with_mask(B, 1, S, S)(), randn(H, S, S)),
)
def infinite_mask_filled_into_the_bias(q, k, v, mask, bias):
    """No gradient reaches what the fill replaced, and NaN the product."""
    return softmax(q @ k.transpose(-2, -1) * SCALE + bias.masked_fill(~mask, -INF)) @ v


@left(
    "mask",
    "dead_rows_unclear",
    inputs=lambda: (*with_mask(B, 1, S, S)(), randn(H, S, S)),
)
def bias_added_to_infinite_mask(q, k, v, mask, bias):
    """NaN reaches the bias, and not the product."""
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~mask, -INF) + bias) @ v


@left("mask", "dead_rows_unclear", inputs=with_mask(B, 1, S, S))
def infinite_mask_added_to_half_of_the_scores(q, k, v, mask):
    """No gradient reaches a score below 0, NaN or not."""
    scores = (q @ k.transpose(-2, -1) * SCALE).clamp(min=0.0)
    return softmax(scores + torch.where(mask, 0.0, -INF)) @ v


@left("mask", "dead_rows_unclear", inputs=with_mask(B, 1, S, S), captures=WHOLE)
def infinite_mask_added_and_nan_removed(q, k, v, mask):
    """The output is 0 in a row without a key, the gradients NaN."""
    weights = softmax(q @ k.transpose(-2, -1) * SCALE + torch.where(mask, 0.0, -INF))
    return torch.nan_to_num(weights) @ v


@fused("mask", "s*0.25 where mask[b, 0, q, kv] else uniform", inputs=with_mask(B, 1, S, S))
def mask_turned_into_numbers(q, k, v, mask):
    additive = torch.zeros(mask.shape).masked_fill(~mask, LOWEST)
    return softmax(q @ k.transpose(-2, -1) * SCALE + additive) @ v


@fused(
    "mask",
    "s*0.25 where mask[b, 0, q, kv] and kv <= q else nan",
    inputs=with_mask(B, 1, S, S),
    captures=DYNAMO,
)
def two_masks_filled(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1) * SCALE).masked_fill(~mask, -INF)
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    return softmax(scores.masked_fill(~causal, -INF)) @ v


@fused(
    "mask",
    "s*0.25 where mask[b, 0, q, kv] and kv <= q else nan",
    inputs=with_mask(B, 1, S, S),
    captures=DYNAMO,
)
def two_masks_combined(q, k, v, mask):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    return softmax(torch.where(mask & causal, q @ k.transpose(-2, -1) * SCALE, -INF)) @ v


@fused("mask", "s*0.25 where mask[b, 0, q, kv] else zero", inputs=with_mask(B, 1, S, S))
def mask_of_sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@left("mask", "mask_on_score")
def mask_of_the_scores(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return softmax(scores.masked_fill(scores < 0, -INF)) @ v


@left("mask", "score_path")
def mask_of_the_top_scores(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    kth = scores.topk(3, dim=-1).values[..., -1:]
    return softmax(scores.masked_fill(scores < kth, -INF)) @ v


@left("mask", "mutation", inputs=with_mask(B, 1, S, S), captures=("dynamo", "symbolic"))
def mask_written_to_between_use_and_product(q, k, v, mask):
    mask = mask.clone()
    weights = softmax((q @ k.transpose(-2, -1)).masked_fill(~mask, -INF))
    mask.fill_(True)
    return weights @ v, mask


@left("mask", "mutation", inputs=with_mask(B, 1, S, S), captures=("dynamo", "symbolic"))
def mask_filled_through_another_view(q, k, v, mask):
    scores = q @ k.transpose(-2, -1)
    view = scores.view(B, H, S, S)
    scores.masked_fill_(~mask, -INF)
    return softmax(view) @ v


@left("mask", "mutation", inputs=with_mask(B, 1, S, S), captures=("dynamo", "symbolic"))
def mask_copied_over(q, k, v, mask):
    mask = mask.clone()
    weights = softmax((q @ k.transpose(-2, -1)).masked_fill(~mask, -INF))
    mask[:, 0].copy_(mask[:, 0].flip(-1))
    return weights @ v, mask


@left("mask", "score_path", inputs=with_mask(B, H, S, S))
def mask_in_the_place_of_the_scores(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) * SCALE
    return softmax(torch.where(mask, torch.zeros_like(scores), -INF)) @ v


# --- padding ------------------------------------------------------------------------------------


@fused("padding", "s*0.25 + extended[b, 0, 0, kv] else nan", inputs=with_padding(torch.int64))
def padding_times_the_lowest(q, k, v, pad):
    # An integer may be other than 0 and 1, so this stays a tensor.
    extended = (1 - pad[:, None, None, :].float()) * LOWEST
    return softmax(q @ k.transpose(-2, -1) * SCALE + extended) @ v


@fused("padding", "s*0.25 + extended[b, 0, 0, kv] else nan", inputs=with_padding(torch.float32))
def padding_times_minus_1e4(q, k, v, pad):
    extended = (1.0 - pad[:, None, None, :]) * -10000.0
    return softmax(q @ k.transpose(-2, -1) * SCALE + extended) @ v


@fused("padding", "s*0.25 where pad[b, kv] else uniform", inputs=with_padding(torch.bool))
def padding_condition_times_the_lowest(q, k, v, pad):
    extended = (1.0 - pad[:, None, None, :].float()) * LOWEST
    return softmax(q @ k.transpose(-2, -1) * SCALE + extended) @ v


@fused("padding", "s*0.25 + sub[b, kv] else nan", inputs=with_padding(torch.uint8))
def padding_that_wraps_around(q, k, v, pad):
    # 0 - 1 is 255 here, not -1.
    return softmax(q @ k.transpose(-2, -1) * SCALE + (pad - 1)[:, None, None, :]) @ v


@fused("padding", "s*0.25 + add[b, 0, 0, kv] else nan", inputs=lambda: (*qkv(), *torch.rand(2, B, S).gt(0.5)))
def conditions_added_up(q, k, v, a, c):
    # The sum of two conditions is a condition: it is 1, never 2.
    return softmax(q @ k.transpose(-2, -1) * SCALE + (a[:, None, None, :] + c[:, None, None, :])) @ v


@fused("padding", "s*0.25 where pad[b, kv] else nan", inputs=with_padding(torch.bool))
def padding_bool(q, k, v, pad):
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~pad[:, None, None, :], -INF)) @ v


@fused("padding", "s*0.25 where pad[b, kv] else nan", inputs=with_padding(torch.int64))
def padding_int_equals_zero(q, k, v, pad):
    mask = pad.unsqueeze(1).unsqueeze(2)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(mask == 0, -INF)) @ v


@fused("padding", "s*0.25 where pad[b, kv] else mean", inputs=with_padding(torch.int32))
def padding_expanded(q, k, v, pad):
    mask = pad[:, None, None, :].expand(B, 1, S, S).to(torch.bool)
    scores = q @ k.transpose(-2, -1) * SCALE
    return softmax(torch.where(mask, scores, torch.full((), LOWEST))) @ v


@fused("padding", "s*0.25 where pad[b, q] and pad[b, kv] else mean", inputs=with_padding(torch.bool))
def padding_of_both_sides(q, k, v, pad):
    both = pad[:, None, :, None] & pad[:, None, None, :]
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~both, LOWEST)) @ v


@fused(
    "padding",
    "s*0.25 where kv <= q and pad[b, kv] else uniform",
    inputs=with_padding(torch.int64),
    captures=DYNAMO,
)
def padding_and_causal(q, k, v, pad):
    n = torch.arange(S)
    allowed = (n[None, None, None, :] <= n[None, None, :, None]) & pad.bool()[:, None, None, :]
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, LOWEST)
    return softmax(q @ k.transpose(-2, -1) * SCALE + additive) @ v


@fused(
    "padding",
    "s*0.25 where pad[b, q] == pad[b, kv] else nan",
    inputs=lambda: (*qkv(), torch.arange(S).expand(B, S) // 3),
)
def documents(q, k, v, pad):
    same = pad[:, None, :, None] == pad[:, None, None, :]
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~same, -INF)) @ v


@left("padding", "weights_path", inputs=with_padding(torch.float32))
def padding_of_queries_and_keys_times_the_weights(q, k, v, pad):
    pairs = pad[:, None, :, None] * pad[:, None, None, :]
    return (softmax(q @ k.transpose(-2, -1) * SCALE) * pairs) @ v


@fused("padding", "s*0.25 + extended[b, 0, 0, kv] else nan", inputs=with_padding(torch.float32))
def padding_with_the_wrong_sign(q, k, v, pad):
    # Not a mask at all, and still the same function.
    extended = (1.0 - pad[:, None, None, :]) * 10000.0
    return softmax(q @ k.transpose(-2, -1) * SCALE + extended) @ v


# --- masks of indices ---------------------------------------------------------------------------


@fused("causal", "s*0.25 where kv <= q")
def causal_tril_of_ones(q, k, v):
    mask = torch.tril(torch.ones(S, S))
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(mask == 0, -INF)) @ v


@fused("causal", "s*0.25 where kv <= q")
def causal_tril_method(q, k, v):
    mask = torch.ones((S, S), dtype=torch.bool).tril(diagonal=0).view(1, 1, S, S)
    return softmax(torch.where(mask[:, :, :S, :S], q @ k.transpose(-2, -1) * SCALE, LOWEST)) @ v


@fused("causal", "s*0.25 where kv <= q")
def causal_triu(q, k, v):
    mask = torch.triu(torch.ones(S, S, dtype=torch.bool), diagonal=1)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(mask, -INF)) @ v


@fused("causal", "s*0.25 where kv <= q")
def causal_triu_of_minus_infinity(q, k, v):
    mask = torch.triu(torch.full((S, S), -INF), diagonal=1)
    return softmax(q @ k.transpose(-2, -1) * SCALE + mask) @ v


@fused("causal", "s*0.25 where kv <= q")
def causal_arange(q, k, v):
    n = torch.arange(S)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(n[None, :] > n[:, None], LOWEST)) @ v


@fused("causal", "s*0.25 where kv <= q", captures=DYNAMO)
def causal_sized_by_the_input(q, k, v):
    n = q.size(-2)
    mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-2, -1) * SCALE
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return softmax(scores) @ v


@fused("causal", "s*0.25 where kv <= q", captures=DYNAMO)
def causal_added_in_place(q, k, v):
    bias = torch.zeros(S, S)
    mask = torch.ones(S, S, dtype=torch.bool).tril(diagonal=0)
    bias.masked_fill_(mask.logical_not(), -INF)
    scores = q @ k.transpose(-2, -1) * SCALE
    scores += bias
    return softmax(scores) @ v


@fused("causal", "s*0.25 where kv <= q")
def causal_of_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@fused(
    "causal", "s*0.25 where kv <= q + 2", inputs=lambda: qkv((B, H, S, D), (B, H, S + 2, D)), captures=DYNAMO
)
def causal_with_a_cache(q, k, v):
    n, m = q.shape[-2], k.shape[-2]
    mask = torch.ones(m, m, dtype=torch.bool).tril()[m - n : m, :m]
    return softmax(torch.where(mask, q @ k.transpose(-2, -1) * SCALE, -INF)) @ v


@fused("causal", "s*0.25 where kv <= q and kv > q - 3", captures=DYNAMO)
def sliding_window(q, k, v):
    n = torch.arange(S)
    distance = n[:, None] - n[None, :]
    allowed = (distance >= 0) & (distance < 3)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~allowed, -INF)) @ v


@fused("causal", "s*0.25 where kv <= q and kv >= q - 2")
def sliding_window_of_two_triangles(q, k, v):
    ones = torch.ones(S, S, dtype=torch.bool)
    allowed = torch.tril(ones) & torch.triu(ones, diagonal=-2)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~allowed, -INF)) @ v


@fused("causal", "s*0.25 where kv // 3 == q // 3 and kv <= q")
def chunked(q, k, v):
    n = torch.arange(S)
    allowed = (n[None, :] // 3 == n[:, None] // 3) & (n[None, :] <= n[:, None])
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~allowed, -INF)) @ v


@fused("causal", "s*0.25 where kv <= q or kv < 3")
def prefix(q, k, v):
    n = torch.arange(S)
    allowed = (n[None, :] <= n[:, None]) | (n[None, :] < 3)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~allowed, -INF)) @ v


@fused("causal", "s*0.25 where kv <= q or kv < prefix[b]", inputs=lambda: (*qkv(), torch.tensor([2, 4])))
def prefix_per_sequence(q, k, v, prefix):
    n = torch.arange(S)
    allowed = (n[None, :] <= n[:, None]) | (n[None, None, :] < prefix[:, None, None])
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(~allowed[:, None], -INF)) @ v


@fused(
    "causal",
    "s*0.25 where kv <= q and pad[b, kv] else mean",
    inputs=with_padding(torch.bool),
    captures=DYNAMO,
)
def causal_gathered(q, k, v, pad):
    # As Transformers does: every condition is a lookup by index vectors.
    b, n = torch.arange(B)[:, None, None, None], torch.arange(S)
    rows, keys = n[None, None, :, None], n[None, None, None, :]
    allowed = (keys <= rows) & pad[b, keys]
    return softmax(torch.where(allowed, q @ k.transpose(-2, -1) * SCALE, LOWEST)) @ v


@fused("causal", "s*0.25 where kv >= q")
def anti_causal(q, k, v):
    mask = torch.tril(torch.ones(S, S))
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(mask.T == 0, -INF)) @ v


@fused("causal", "s*0.25 where kv < q else nan")
def causal_without_the_diagonal(q, k, v):
    mask = torch.tril(torch.ones(S, S), diagonal=-1)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(mask == 0, -INF)) @ v


@fused("causal", "s*0.25 where not kv % 2")
def strided(q, k, v):
    n = torch.arange(S)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill((n % 2 != 0)[None, :], -INF)) @ v


@fused(
    "causal", "s*0.25 where where(kv == q, -1, 0) <= -where(c[b, kv] < 0.5, 1, 0)",
    inputs=with_padding(torch.float32), captures=DYNAMO,
)  # fmt: skip
def padding_but_not_of_the_row_itself(q, k, v, pad):
    """XLNet's: 1 is masked, the identity is taken off, dimensions are permuted by an einsum."""
    masked = (pad.T < 0.5).to(q.dtype)[None, :, :, None]
    masked = ((masked - torch.eye(S)[:, :, None, None]) > 0).to(q.dtype)
    masked = torch.einsum("ijbn->bnij", masked)
    return softmax(q @ k.transpose(-2, -1) * SCALE - 1e30 * masked) @ v


@fused(
    "causal",
    "s*0.25 - c[q, kv]*1e+30 else nan",
    inputs=lambda: (*qkv(), torch.ones(S, 3, S)),
    captures=DYNAMO,
)
def mask_summed_by_an_einsum(q, k, v, mask):
    return softmax(q @ k.transpose(-2, -1) * SCALE - 1e30 * torch.einsum("inj->ij", mask)) @ v


@fused("causal", "where(kv <= q, s*0.25, 0)")
def causal_filled_with_zero(q, k, v):
    # A fill of 0 is no mask: exp(0) is 1.
    return softmax(torch.tril(q @ k.transpose(-2, -1) * SCALE)) @ v


@left("causal", "weights_path")
def causal_after_the_softmax(q, k, v):
    return softmax(q @ k.transpose(-2, -1) * SCALE).tril() @ v


@left("causal", "score_path", captures=DYNAMO)
def nothing_allowed(q, k, v):
    n = torch.arange(S)
    return softmax((q @ k.transpose(-2, -1) * SCALE).masked_fill(n[None, :] >= 0, -INF)) @ v
