"""The zoo: scales, softmaxes, dropouts, and what becomes of the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import DYNAMO, SCALE, WHOLE, B, D, H, S, fused, left, qkv, randn, softmax, with_mask, with_padding

# --- scale --------------------------------------------------------------------------------------


@fused("scale", "s")
def no_scale(q, k, v):
    return softmax(q @ k.transpose(-2, -1)) @ v


@fused("scale", "s*0.25")
def scale_mul(q, k, v):
    return softmax(q @ k.transpose(-2, -1) * SCALE) @ v


@fused("scale", "s*0.25")
def scale_mul_from_the_left(q, k, v):
    return softmax(SCALE * (q @ k.transpose(-2, -1))) @ v


@fused("scale", "s*0.25")
def scale_div(q, k, v):
    return torch.matmul(softmax(torch.matmul(q, k.transpose(-1, -2)) / D**0.5), v)


@fused("scale", "s*0.25")
def scale_div_in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores /= 4.0
    return softmax(scores) @ v


@fused("scale", "s")
def scale_on_q(q, k, v):
    return softmax((q * SCALE) @ k.transpose(-2, -1)) @ v


@fused("scale", "s")
def scale_on_both(q, k, v):
    return softmax((q * SCALE**0.5) @ (k * SCALE**0.5).transpose(-2, -1)) @ v


@fused("scale", "s*scale[0] else nan", inputs=lambda: (*qkv(), torch.tensor(0.3)))
def scale_tensor(q, k, v, scale):
    return softmax(q @ k.transpose(-2, -1) * scale) @ v


@fused("scale", "s*scale[h, 0, 0] else nan", inputs=lambda: (*qkv(), randn(H, 1, 1)))
def scale_per_head(q, k, v, scale):
    return softmax(q @ k.transpose(-2, -1) * scale) @ v


@fused("scale", "s / root[0] else nan", inputs=lambda: (*qkv(), torch.tensor(3.0)))
def scale_div_tensor(q, k, v, scale):
    root = torch.sqrt(scale)
    return softmax(q @ k.transpose(-2, -1) / root) @ v


@fused("scale", "s*0.25")
def scale_true_divide(q, k, v):
    return softmax(torch.true_divide(q @ k.transpose(-2, -1), 4)) @ v


@fused("scale", "tanh(s*0.005)*50.0")
def softcap(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return softmax(torch.tanh(scores / 50.0) * 50.0) @ v


@fused("scale", "-s")
def negated(q, k, v):
    return softmax(-(q @ k.transpose(-2, -1))) @ v


@left("scale", "score_path")
def scale_of_the_scores_own_maximum(q, k, v):
    scores = q @ k.transpose(-2, -1)
    return softmax(scores / scores.abs().amax(-1, keepdim=True)) @ v


@left("scale", "score_path")
def cumulated_scores(q, k, v):
    return softmax((q @ k.transpose(-2, -1)).cumsum(-1)) @ v


@fused("scale", "s", captures=WHOLE)
def two_products_added(q, k, v):
    # One product of rows laid side by side.
    return softmax(q @ k.transpose(-2, -1) + k @ q.transpose(-2, -1) + q @ v.transpose(-2, -1)) @ v


@fused("scale", "s")
def product_of_products(q, k, v):
    # The rows of the inner products serve as q and k.
    return softmax((q @ k.transpose(-2, -1)) @ (q @ k.transpose(-2, -1))) @ v


@left("scale", "score_path")
def rounded_scores(q, k, v):
    return softmax((q @ k.transpose(-2, -1)).round()) @ v


def another_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Called ``softmax`` like PyTorch's, and different."""
    return torch.softmax(scores * mask, -1) * 2


another_softmax.__name__ = "softmax"
torch.fx.wrap("another_softmax")

# --- softmax ------------------------------------------------------------------------------------


@fused("softmax", "s*0.25")
def softmax_functional(q, k, v):
    return F.softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1) @ v


@fused("softmax", "s*0.25")
def softmax_method(q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


@fused("softmax", "s*0.25")
def softmax_positive_dim(q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(dim=3).matmul(v)


@fused("softmax", "s*0.25", captures=DYNAMO)
def softmax_module(q, k, v):
    return nn.Softmax(dim=-1)(q @ k.transpose(-2, -1) * SCALE) @ v


@fused("softmax", "s*0.25")
def softmax_special(q, k, v):
    return torch.special.softmax(q @ k.transpose(-2, -1) * SCALE, -1) @ v


@fused("softmax", "s*0.25")
def softmax_aten(q, k, v):
    return torch.ops.aten._softmax.default(q @ k.transpose(-2, -1) * SCALE, -1, False) @ v


@fused("softmax", "s*0.25")
def softmax_safe(q, k, v):
    return torch.ops.aten._safe_softmax.default(q @ k.transpose(-2, -1) * SCALE, -1) @ v


@fused("softmax", "s*0.25")
def softmax_by_hand(q, k, v):
    e = torch.exp(q @ k.transpose(-2, -1) * SCALE)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@fused("softmax", "s*0.25")
def softmax_by_hand_with_amax(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@fused("softmax", "s*0.25")
def softmax_by_hand_with_max(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    e = torch.exp(scores - torch.max(scores, dim=-1, keepdim=True)[0])
    return torch.matmul(e / torch.sum(e, dim=-1, keepdim=True), v)


@fused("softmax", "s*0.25")
def softmax_by_hand_with_detached_max(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    e = torch.exp(scores - scores.max(-1, keepdim=True).values.detach())
    return torch.matmul(e / torch.sum(e, dim=-1, keepdim=True), v)


@fused("softmax", "s*0.25")
def softmax_by_hand_unsqueezed(q, k, v):
    e = torch.exp(q @ k.transpose(-2, -1) * SCALE)
    return torch.div(e, e.sum(-1).unsqueeze(-1)) @ v


@fused("softmax", "s*0.25")
def softmax_from_its_logarithm(q, k, v):
    return F.log_softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1).exp() @ v


@fused("softmax", "s*0.25", captures=WHOLE)
def softmax_from_logsumexp(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


@left(
    "softmax",
    inputs=lambda: (*qkv(), torch.ones(B, H, S, S, dtype=torch.bool).tril()),
    captures=("symbolic",),
)
def softmax_of_another_library(q, k, v, mask):
    return another_softmax(q @ k.transpose(-2, -1) * SCALE, mask) @ v


@fused("softmax", "s*0.25", captures=WHOLE)
def logsumexp_used_elsewhere(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    total = torch.logsumexp(scores, -1, keepdim=True)
    return torch.exp(scores - total) @ v + total


@left("softmax", "softmax_axis")
def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * SCALE, dim=-2) @ v


@left("softmax", "softmax_axis")
def softmax_over_heads(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * SCALE, dim=1) @ v


@left("softmax")
def sum_without_the_row(q, k, v):
    e = torch.exp(q @ k.transpose(-2, -1) * SCALE)
    return (e / e.sum()) @ v


@left("softmax", "softmax_axis")
def sum_over_queries(q, k, v):
    e = torch.exp(q @ k.transpose(-2, -1) * SCALE)
    return (e / e.sum(-2, keepdim=True)) @ v


@fused("softmax", "s*0.25 sink 0.0")
def sum_plus_one(q, k, v):
    e = torch.exp(q @ k.transpose(-2, -1) * SCALE)
    return (e / (e.sum(-1, keepdim=True) + 1.0)) @ v


@left("softmax")
def sigmoid_attention(q, k, v):
    return torch.sigmoid(q @ k.transpose(-2, -1) * SCALE) @ v


@left("softmax")
def log_softmax(q, k, v):
    return F.log_softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1) @ v


@left("softmax", "linear_attention")
def linear_attention(q, k, v):
    return torch.softmax(q, dim=-1) @ (torch.softmax(k, dim=-2).transpose(-2, -1) @ v)


@left("softmax")
def classifier_head(q, k, v):
    weight = torch.ones(5, D)
    return torch.softmax(F.linear(q, weight), dim=-1)


@left("softmax", inputs=lambda: (randn(B, S, D), randn(D, 4), randn(4, D, D)))
def mixture_of_experts(x, router, experts):
    gates = torch.softmax(x @ router, dim=-1)
    return torch.einsum("bse,bsed->bsd", gates, torch.einsum("bsd,edf->bsef", x, experts))


# --- casts --------------------------------------------------------------------------------------


def half_qkv() -> tuple[Tensor, ...]:
    return tuple(t.bfloat16() for t in qkv())


@fused("casts", "s*0.25", inputs=half_qkv)
def softmax_in_float32(q, k, v):
    return F.softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@fused("casts", "s*0.25", inputs=half_qkv)
def scores_in_float32(q, k, v):
    return F.softmax((q @ k.transpose(-2, -1) * SCALE).float(), dim=-1).type_as(q) @ v


@fused("casts", "s*0.25", inputs=half_qkv)
def all_in_bfloat16(q, k, v):
    return F.softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1) @ v


@fused("casts", "s*0.25", inputs=half_qkv)
def all_in_float32(q, k, v):
    scores = q.float() @ k.float().transpose(-2, -1) * SCALE
    return (F.softmax(scores, dim=-1) @ v.float()).to(v.dtype)


@left("casts", "weights_path")
def weights_cast_to_integers(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1).mul(100).to(torch.int64).to(q.dtype) @ v


@left("casts", "score_path")
def scores_cast_to_integers(q, k, v):
    return torch.softmax((q @ k.transpose(-2, -1)).to(torch.int64).float(), dim=-1) @ v


@left("casts", inputs=lambda: tuple(torch.randint(0, 3, (B, H, S, D)) for _ in range(3)))
def integer_inputs(q, k, v):
    return (q @ k.transpose(-2, -1)) @ v


@left(
    "casts",
    "weights_path",
    inputs=lambda: tuple(torch.randn(B, H, S, D, dtype=torch.complex64) for _ in range(3)),
)
def complex_inputs(q, k, v):
    return torch.softmax((q @ k.transpose(-2, -1)).real, dim=-1).to(v.dtype) @ v


# --- dropout ------------------------------------------------------------------------------------


@fused("dropout", "s*0.25", dropout_p=0.3)
def dropout_functional(q, k, v):
    return F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), p=0.3) @ v


@fused("dropout", "s*0.25", dropout_p=0.3)
def dropout_functional_training(q, k, v):
    return F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.3, True) @ v


@fused("dropout", "s*0.25", dropout_p=0.3)
def dropout_torch(q, k, v):
    return torch.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.3, True) @ v


@fused("dropout", "s*0.25", dropout_p=0.3)
def dropout_native(q, k, v):
    return torch.native_dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.3, True)[0] @ v


@fused("dropout", "s*0.25", dropout_p=0.3, captures=DYNAMO)
def dropout_module(q, k, v):
    return nn.Dropout(0.3)(softmax(q @ k.transpose(-2, -1) * SCALE)) @ v


@fused("dropout", "s*0.25", dropout_p=0.3, captures=WHOLE)
def dropout_in_place(q, k, v):
    return F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.3, inplace=True) @ v


@fused("dropout", "s*0.25")
def dropout_of_zero(q, k, v):
    return F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), p=0.0) @ v


@fused("dropout", "s*0.25")
def dropout_in_eval(q, k, v):
    return F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), p=0.3, training=False) @ v


@fused("dropout", "s*0.25", dropout_p=0.3, captures=WHOLE)
def dropout_of_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)


@left("dropout", "two_dropouts")
def dropout_twice(q, k, v):
    return F.dropout(F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.3), 0.3) @ v


@left("dropout", "score_path", captures=WHOLE)
def dropout_of_the_scores(q, k, v):
    return softmax(F.dropout(q @ k.transpose(-2, -1) * SCALE, 0.3)) @ v


@left("dropout", "weights_path")
def dropout_of_whole_heads(q, k, v):
    return F.dropout2d(softmax(q @ k.transpose(-2, -1) * SCALE), 0.3, training=True) @ v


@left("dropout", "dropout", captures=WHOLE, inputs=lambda: (*qkv((B, 1, S, D)), randn(B, H, S, D)))
def dropout_shared_by_heads(q, k, _, v):
    return F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.3).expand(B, H, S, S) @ v


@left("dropout", "dropout")
def dropout_of_everything(q, k, v):
    return F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 1.0) @ v


# --- the weights --------------------------------------------------------------------------------


@fused("weights", "s*0.25", captures=DYNAMO)
def weights_kept_in_a_local_list(q, k, v):
    kept = []
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    kept.append(weights)
    return weights @ v


@fused("weights", "s*0.25")
def weights_returned(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    return weights @ v, weights


@fused("weights", "s*0.25")
def weights_returned_as_their_mean_over_heads(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weights = softmax(torch.bmm(q, k.transpose(-2, -1)) * SCALE)
    return torch.bmm(weights, v), weights.view(B, H, S, S).mean(1)


@fused("weights", "s*0.25 where pad[b, kv] else uniform", inputs=with_padding(torch.bool), captures=DYNAMO)
def weights_of_padded_keys_returned(q, k, v, pad):
    added = torch.where(pad[:, None, None], 0.0, torch.finfo(q.dtype).min)
    weights = softmax(q @ k.transpose(-2, -1) * SCALE + added, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


@fused("weights", "s where mask[b, 0, q, kv] else nan", inputs=with_mask(B, 1, S, S))
def weights_in_another_layout_returned(q, k, v, mask):
    scores = torch.einsum("bhqd,bhkd->bqhk", q, k).masked_fill(~mask.transpose(1, 2), -torch.inf)
    weights = torch.softmax(scores, -1)
    return torch.einsum("bqhk,bhkd->bqhd", weights, v), weights


@fused("weights", "s*0.25", inputs=lambda: qkv((B, 2, H, S, D), (B, 2, 1, S, D)), group=H)
def weights_of_grouped_heads_returned(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    return weights @ v, weights


@fused("weights", "s*0.25", dropout_p=0.25)
def dropped_weights_returned(q, k, v):
    weights = F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.25)
    return weights @ v, weights


@fused("weights", "s*0.25", dropout_p=0.25)
def weights_returned_before_and_after_dropout(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    dropped = F.dropout(weights, 0.25)
    return dropped @ v, weights, dropped


@fused("weights", "s*0.25")
def scores_returned(q, k, v):
    scores = q @ k.transpose(-2, -1) * SCALE
    return softmax(scores) @ v, scores


@fused("weights", "s*0.25")
def scores_updated_in_place_returned(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores *= SCALE
    return softmax(scores) @ v, scores


@fused("weights", "s*0.25")
def weights_used_twice(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    return weights @ v + weights.mean(-1, keepdim=True)


@fused("weights", "s*0.25", "s*0.25")
def weights_used_for_two_products(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    return weights @ v + weights @ q


@fused("weights", "s*0.25", "s*0.25")
def weights_used_for_a_product_of_the_other(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    return weights @ (weights @ v)


@fused("weights", "s*0.25", "s*0.25", dropout_p=0.25)
def dropped_weights_used_for_two_products(q, k, v):
    weights = F.dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.25)
    return weights @ v + weights @ q


@fused("weights", "s")
def keys_and_values_returned(q, k, v):
    k, v = k * SCALE, v + 1.0
    return softmax(q @ k.transpose(-2, -1)) @ v, k, v


@left("weights", "mutation", captures=WHOLE)
def weights_written_to_after_the_product(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    out = weights @ v
    weights.mul_(2.0)
    return out, weights


@left("weights", "weights_escape", captures=("dynamo", "symbolic"))
def keep_mask_returned(q, k, v):
    dropped, keep = torch.native_dropout(softmax(q @ k.transpose(-2, -1) * SCALE), 0.25, True)
    return dropped @ v, keep


@fused("weights", "s*0.25", inputs=lambda: (*qkv(), randn(H, 1, 1)))
def weights_gated(q, k, v, gate):
    return (softmax(q @ k.transpose(-2, -1) * SCALE) * torch.sigmoid(gate)) @ v


@left("weights", "weights_path")
def weights_masked_after_the_softmax(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    return torch.tril(weights) @ v


@left("weights", "weights_path")
def weights_of_the_top_keys(q, k, v):
    top, where = softmax(q @ k.transpose(-2, -1) * SCALE).topk(3, dim=-1)
    return torch.zeros_like(q @ k.transpose(-2, -1)).scatter(-1, where, top) @ v


@left("weights", "weights_path")
def weights_without_a_product(q, k, v):
    return (softmax(q @ k.transpose(-2, -1) * SCALE)).sum(-2)


@left("weights", "weights_path")
def weights_sliced(q, k, v):
    return softmax(q @ k.transpose(-2, -1) * SCALE)[..., :-1] @ v[..., 1:, :]


@fused("weights", "s*0.25 sink sink[0, h, 0, 0]", inputs=lambda: (*qkv(), randn(1, H, 1, 1)))
def weights_beside_a_sink(q, k, v, sink):
    scores = torch.cat([q @ k.transpose(-2, -1) * SCALE, sink.expand(B, H, S, 1)], -1)
    return softmax(scores)[..., :-1] @ v


@left("weights", "weights_path")
def weights_cut_off_like_the_values(q, k, v):
    return softmax(q @ k.transpose(-2, -1) * SCALE)[..., :-1] @ v[..., :-1, :]


@left("weights", "mutation", captures=("dynamo",))
def weights_written_to(q, k, v):
    weights = softmax(q @ k.transpose(-2, -1) * SCALE)
    weights[..., 0] = 0.0
    return weights @ v
