"""Biases that the graph computes from positions, and tables that positions select from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo import DYNAMO, H, S, fused, left, qkv, randn, softmax

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


def with_table(*sizes: int):
    return lambda: (*qkv(), randn(*sizes))


@fused("distance_bias", "s + c[h, kv + 6 - q] else nan", inputs=with_table(8, H), captures=DYNAMO)
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


@left("distance_bias", "score_path", inputs=with_table(8, H), captures=DYNAMO)
def bucketed_scores(q, k, v, weight):
    """Buckets of the scores themselves."""
    scores = q @ k.transpose(-1, -2)
    bias = F.embedding(bucket(scores.long()), weight).sum(-1)
    return softmax(scores + bias) @ v
