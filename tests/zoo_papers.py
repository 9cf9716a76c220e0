"""The zoo: spellings of papers and of published code that the other files do not hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import DYNAMO, SCALE, WHOLE, B, D, H, S, fused, left, qkv, randn, softmax

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


# --- differential attention ------------------------------------------------------------------------


def grouped_pairs() -> tuple[Tensor, ...]:
    """Two groups of two pairs of query heads; each group has a pair of key heads and one of values."""
    return randn(B, 8, S, D), randn(B, 4, S, D), randn(B, 2, S, 2 * D), torch.rand(())


def repeated(x: Tensor, times: int) -> Tensor:
    b, heads, s, d = x.shape
    return x[:, :, None].expand(b, heads, times, s, d).reshape(b, heads * times, s, d)


@fused(
    "papers", "s*0.25 where kv <= q", "s*0.25 where kv <= q", inputs=grouped_pairs, group=2, captures=DYNAMO
)
def differential_attention_of_grouped_heads(q, k, v, weight):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    v = repeated(v, 2)
    outs = []
    for half in (0, 1):
        scores = scores_of(q[:, half::2], repeated(k[:, half::2], 2))
        outs.append(softmax(scores.masked_fill(~causal, -INF)) @ v)
    return outs[0] - weight * outs[1]


@left("papers", "weights_combined", inputs=grouped_pairs, captures=DYNAMO)
def differential_weights_of_grouped_heads(q, k, v, weight):
    scores = scores_of(q, repeated(k, 2))
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    weights = softmax(scores.masked_fill(~causal, -INF)).view(B, 4, 2, S, S)
    return (weights[:, :, 0] - weight * weights[:, :, 1]) @ repeated(v, 2)


# --- diffusion -------------------------------------------------------------------------------------


def image_and_text() -> tuple[Tensor, ...]:
    """Features of an image [B, C, 5, 6], of a text [B, S, C], and the three projections."""
    return randn(B, H * D, 5, 6), randn(B, S, H * D), *(randn(H * D, H * D) * 0.2 for _ in range(3))


def to_batch(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    return x.reshape(b, s, H, D).permute(0, 2, 1, 3).reshape(b * H, s, D)


@fused("papers", "s*0.25", inputs=image_and_text, captures=DYNAMO)
def unet_cross_attention(x, text, w_q, w_k, w_v):
    b, c, height, width = x.shape
    hidden = x.view(b, c, height * width).transpose(1, 2)
    q, k, v = to_batch(hidden @ w_q), to_batch(text @ w_k), to_batch(text @ w_v)
    none = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    weights = torch.baddbmm(none, q, k.transpose(-1, -2), beta=0, alpha=SCALE).softmax(dim=-1)
    out = torch.bmm(weights, v).reshape(b, H, -1, D).permute(0, 2, 1, 3).reshape(b, -1, c)
    return out.transpose(-1, -2).reshape(b, c, height, width) + x


@left("papers", "softmax_axis", inputs=image_and_text, captures=DYNAMO)
def unet_attention_normalised_over_the_image(x, text, w_q, w_k, w_v):
    hidden = x.flatten(2).transpose(1, 2)
    q, k, v = to_batch(hidden @ w_q), to_batch(text @ w_k), to_batch(text @ w_v)
    return torch.bmm((torch.bmm(q, k.transpose(-1, -2)) * SCALE).softmax(dim=1), v)


# --- masks -----------------------------------------------------------------------------------------


def left_padded() -> tuple[Tensor, ...]:
    pad = torch.arange(S)[None] >= torch.tensor([0, 3])[:, None]
    return (*qkv(), pad)


@fused("papers", "s*0.25 where kv <= q and pad[b, kv] else uniform", inputs=left_padded, captures=DYNAMO)
def padding_on_the_left(q, k, v, pad):
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    allowed = causal[None, None] & pad[:, None, None, :]
    return softmax(scores_of(q, k) + torch.where(allowed, 0.0, LOWEST)) @ v


@left("papers", "weights_path", inputs=left_padded, captures=DYNAMO)
def padding_on_the_left_after_the_softmax(q, k, v, pad):
    """Weights of keys to the right are kept where the mask of the scores forbids none of them."""
    allowed = torch.ones(S, S, dtype=torch.bool).tril()[None, None] & pad[:, None, None, :]
    return (softmax(scores_of(q, k)) * allowed) @ v


@fused(
    "papers",
    "s*0.25 where pad[b, kv] else mean",
    inputs=lambda: (*qkv((B, H, 5, D), (B, H, S, D)), torch.arange(S)[None] < torch.tensor([S, 4])[:, None]),
)
def cross_attention_with_padding(q, k, v, pad):
    return softmax(scores_of(q, k).masked_fill(~pad[:, None, None, :], LOWEST)) @ v


@fused("papers", "s*0.25 where not (q - kv) % 2 and abs(q - kv) <= 4", captures=DYNAMO)
def dilated_window(q, k, v):
    n = torch.arange(S)
    distance = n[:, None] - n[None, :]
    allowed = (distance % 2 == 0) & (distance.abs() <= 4)
    return softmax(scores_of(q, k).masked_fill(~allowed, -INF)) @ v


@fused("papers", "s*0.25 where kv // 3 == q // 3", captures=DYNAMO)
def block_diagonal(q, k, v):
    block = torch.arange(S) // 3
    return softmax(scores_of(q, k).masked_fill(block[:, None] != block[None, :], -INF)) @ v


@left("papers", "weights_path", captures=DYNAMO)
def block_diagonal_after_the_softmax(q, k, v):
    block = torch.arange(S) // 3
    return softmax(scores_of(q, k)).masked_fill(block[:, None] != block[None, :], 0.0) @ v


def windows() -> tuple[Tensor, ...]:
    """Three windows of an image each, the mask of every window, and a bias."""
    return (*qkv((B * 3, H, S, D)), torch.where(torch.rand(3, S, S) < 0.3, -100.0, 0.0), randn(H, S, S))


@fused("papers", "s*0.25 + bias[h, q, kv] + mask[b % 3, q, kv] else nan", inputs=windows)
def shifted_windows(q, k, v, mask, bias):
    scores = scores_of(q, k) + bias[None]
    scores = scores.view(B, 3, H, S, S) + mask.unsqueeze(1).unsqueeze(0)
    return softmax(scores.view(-1, H, S, S)) @ v


@left("papers", "softmax_axis", inputs=windows)
def windows_normalised_together(q, k, v, mask, bias):
    scores = (scores_of(q, k) + bias[None]).view(B, 3, H, S, S) + mask.unsqueeze(1)
    return torch.softmax(scores, 1).view(-1, H, S, S) @ v


# --- x-transformers --------------------------------------------------------------------------------


def with_memory() -> tuple[Tensor, ...]:
    return (
        *qkv(),
        torch.arange(S)[None] < torch.tensor([S, 5])[:, None],
        randn(H, S, S),
        torch.rand(H, 1, 1),
    )


@fused(
    "papers", "s*scale[h, 0, 0] + bias[h, q, kv] where mask[b, kv] and kv <= q else nan",
    inputs=with_memory, captures=DYNAMO,
)  # fmt: skip
def einsum_with_cosines(q, k, v, mask, bias, scale):
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * scale + bias
    dots = dots.masked_fill(~mask[:, None, None, :], -INF)
    i, j = dots.shape[-2:]
    dots = dots.masked_fill(torch.ones((i, j), dtype=torch.bool).triu(j - i + 1), -INF)
    return torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)


@left("papers", "softmax_axis", inputs=with_memory, captures=WHOLE)
def einsum_with_talking_heads(q, k, v, mask, bias, scale):
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
    dots = dots.masked_fill(~mask[:, None, None, :], -INF)
    mixed = torch.einsum("b h i j, h g -> b g i j", dots.softmax(dim=-1), scale[:, :, 0] @ scale[:, :, 0].mT)
    return torch.einsum("b h i j, b h j d -> b h i d", mixed, v)


# --- distances by a shift ------------------------------------------------------------------------


def shifted(x: Tensor) -> Tensor:
    """[.., q, kv] from [.., q, distance], of which there are 2S − 1: each row one place further."""
    padded = torch.cat([x.new_zeros(B, H, S, 1), x], -1).view(B, H, 2 * S, S)
    return padded[:, :, 1:].view_as(x)[..., :S]


@fused(
    "papers",
    "s + cat[b, h, (kv + q*13 + 7) // 14, (kv + q*13 + 7) % 14] else nan",
    inputs=lambda: (*qkv(), randn(2 * S - 1, D), randn(H, H, 1, 1)),
)
def transformer_xl(q, k, v, r, weight):
    return softmax(q @ k.mT + shifted(F.conv2d(q, weight) @ r.mT)) @ v


@left("papers", "score_path")
def content_shifted(q, k, v):
    return softmax(shifted(torch.cat([q @ k.mT, q @ k.mT[..., 1:]], -1))) @ v
