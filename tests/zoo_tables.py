"""Biases that the graph computes from positions, and tables that positions select from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import DYNAMO, B, H, S, fused, left, qkv, randn, softmax

# --- distances ---------------------------------------------------------------------------------


def bucket(distance: Tensor, buckets: int = 8, furthest: int = 20) -> Tensor:
    """T5's: exact near by, logarithmic further away."""
    half = buckets // 2
    found = (distance > 0).to(torch.long) * half
    distance = torch.abs(distance)
    exact = half // 2
    far = exact + (torch.log(distance.float() / exact) / math.log(furthest / exact) * (half - exact)).to(
        torch.long
    )
    far = torch.min(far, torch.full_like(far, half - 1))
    found += torch.where(distance < exact, distance, far)
    return found


def distances() -> Tensor:
    return torch.arange(S)[None, :] - torch.arange(S)[:, None]


def with_table(*sizes: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*qkv(), randn(*sizes))


@fused("distance_bias", "s + c[i[kv + 6 - q], h] else nan", inputs=with_table(8, H), captures=DYNAMO)
def t5(q, k, v, weight):
    bias = F.embedding(bucket(distances()), weight).permute([2, 0, 1]).unsqueeze(0)
    return softmax(q @ k.transpose(-1, -2) + bias) @ v


@fused(
    "distance_bias", "s + c[q + 6 - kv, h] where kv <= q else nan", inputs=with_table(13, H), captures=DYNAMO
)
def indexed_by_distance(q, k, v, weight):
    """Swapped distances, a tensor as the index, and a mask added to the bias before the scores are."""
    place = torch.arange(S)[:, None] - torch.arange(S)[None, :] + S - 1
    bias = weight[place].permute(2, 0, 1)[None]
    mask = torch.full((S, S), torch.finfo(torch.float32).min).triu(1)
    return softmax(q @ k.transpose(-1, -2) + (bias + mask)) @ v


def log_bucket(distance: Tensor, buckets: int = 8, furthest: int = 20) -> Tensor:
    """DeBERTa's, whose constants are tensors themselves."""
    sign, middle = torch.sign(distance), buckets // 2
    near = (distance < middle) & (distance > -middle)
    size = torch.where(near, torch.tensor(middle - 1).type_as(distance), torch.abs(distance))
    far = torch.log(size / middle) / torch.log(torch.tensor((furthest - 1) / middle)) * (middle - 1)
    return torch.where(size <= middle, distance.type_as(far), (torch.ceil(far) + middle) * sign).to(
        torch.long
    )


@fused("distance_bias", "s + c[i[kv + 6 - q], h] else nan", inputs=with_table(17, H), captures=DYNAMO)
def deberta(q, k, v, weight):
    bias = F.embedding(log_bucket(distances()) + 8, weight).permute([2, 0, 1]).unsqueeze(0)
    return softmax(q @ k.transpose(-1, -2) + bias) @ v


@left("distance_bias", "score_path", inputs=with_table(8, H), captures=DYNAMO)
def bucketed_scores(q, k, v, weight):
    """Buckets of the scores themselves."""
    scores = q @ k.transpose(-1, -2)
    bias = F.embedding(bucket(scores.long()), weight).sum(-1)
    return softmax(scores + bias) @ v


# --- selected by position ------------------------------------------------------------------------


def products_and_index(low: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*qkv(), randn(B, H, S, 5), torch.randint(low, 5, (S, S)))


@fused("selected", "s + c[b, h, q, d[q, kv]] else nan", inputs=products_and_index(0), captures=DYNAMO)
def gathered(q, k, v, by_bucket, index):
    bias = torch.gather(by_bucket, -1, index.expand(B, H, S, S))
    return softmax(q @ k.transpose(-1, -2) + bias) @ v


@fused(
    "selected", "s + c[b, h, q, where(d[q, kv] < 0, d[q, kv] + 5, d[q, kv])] else nan",
    inputs=products_and_index(-5), captures=("dynamo", "export"),
)  # fmt: skip
def taken_along(q, k, v, by_bucket, index):
    """Negative positions count from the end here, which ``gather`` does not take."""
    bias = torch.take_along_dim(by_bucket, index[None, None], -1)
    return softmax(q @ k.transpose(-1, -2) + bias) @ v


@fused(
    "selected", "s + by_bucket[b, h, q, remainder[b, h, q, kv]] else nan",
    inputs=products_and_index(-5), captures=("decomposed",),
)  # fmt: skip
def taken_along_decomposed(q, k, v, by_bucket, index):
    """There the position is a remainder, which is stored."""
    return taken_along(q, k, v, by_bucket, index)


@fused(
    "selected", "s + c[where(d[q, kv] < 0, d[q, kv] + 9, d[q, kv]), h] else nan",
    inputs=lambda: (*qkv(), randn(9, H), torch.randint(-9, 9, (S, S))), captures=DYNAMO,
)  # fmt: skip
def window_bias(q, k, v, table, index):
    bias = table[index.view(-1)].view(S, S, -1).permute(2, 0, 1)
    return softmax(q @ k.transpose(-1, -2) + bias[None]) @ v


def with_segments() -> tuple[Tensor, ...]:
    return (*qkv(), randn(40, H), torch.randint(0, 3, (B, S)))


@fused(
    "selected",
    "s + c[where(d[b, kv] == d[b, q], abs(kv - q) + (kv > q)*8, mul[b, q, 0] + d[b, kv] + 16), h] "
    "else nan",
    inputs=with_segments, captures=DYNAMO,
)  # fmt: skip
def segments(q, k, v, table, segment):
    """Rows selected by distance inside a segment, and by the pair of segments outside."""
    distance = torch.arange(S)[None, :] - torch.arange(S)[:, None]
    inside = (distance > 0) * 8 + distance.abs()
    own, other = segment[:, :, None], segment[:, None, :]
    place = torch.where(other == own, inside[None], own * 3 + other + 16)
    bias = F.embedding(place, table).permute(0, 3, 1, 2)
    return softmax(q @ k.transpose(-1, -2) + bias) @ v


@fused(
    "selected", "s + c[h, where(d[q, kv] < 0, d[q, kv] + 9, d[q, kv])] else nan",
    inputs=lambda: (*qkv(), randn(H, 9), torch.randint(-9, 9, (S, S))), captures=DYNAMO,
)  # fmt: skip
def heads_first(q, k, v, table, index):
    return softmax(q @ k.transpose(-1, -2) + table[:, index]) @ v


@fused(
    "selected", "s + c[q, kv, h] else nan",
    inputs=lambda: (*qkv(), randn(9, H, 9), torch.randint(9, (S,))), captures=DYNAMO,
)  # fmt: skip
def indices_apart(q, k, v, table, index):
    """With a slice between two of them, what they select comes first: left to the graph."""
    bias = table[index[:, None], :, index[None]].permute(2, 0, 1)
    return softmax(q @ k.transpose(-1, -2) + bias) @ v


@left("selected", inputs=products_and_index(0), captures=DYNAMO)
def sorted_scores(q, k, v, by_bucket, index):
    """The scores themselves are gathered."""
    scores = torch.gather(q @ k.transpose(-1, -2), -1, index.expand(B, H, S, S))
    return softmax(scores) @ v
