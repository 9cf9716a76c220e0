"""Long context with block-sparse attention: neighbours, a few global blocks, and every 16th block.

The pattern is a ``mask_mod`` over blocks; what it empties is never visited.  This is another function than
dense attention, so compare models, not numbers, before you use such a pattern.
"""

import time

import torch
from torch import Tensor

import flashfuse

LENGTH, BLOCK, NEIGHBOURS, GLOBAL, STRIDE = 8192, 128, 2, 1, 16


def pattern(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    row, column = q // BLOCK, kv // BLOCK
    near = (row - column).abs() <= NEIGHBOURS
    everywhere = (column < GLOBAL) | (column % STRIDE == 0)
    return (near | everywhere) & (kv <= q)


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return kv <= q


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, LENGTH, 64, requires_grad=True) for _ in range(3))
    blocks = torch.arange(0, LENGTH, BLOCK)
    visited = pattern(blocks, blocks, blocks[:, None], blocks).sum() / len(blocks) ** 2
    print(f"{LENGTH} tokens, {visited:.1%} of the blocks; both are fused, or would raise")
    for name, mask_mod in (("causal", causal), ("block-sparse", pattern)):
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            out = flashfuse.attention(q, k, v, mask_mod=mask_mod)
            out.square().mean().backward()
            seconds.append(time.perf_counter() - started)
        print(f"{name:14s} forward and backward {min(seconds):.2f} s")

    # Row 5000 by hand.
    allowed = pattern(*(torch.zeros(1, dtype=torch.int64),) * 2, torch.tensor([5000]), torch.arange(LENGTH))
    weights = (q[0, 0, 5000] @ k[0, 0].T / 8).masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(out[0, 0, 5000], weights @ v[0, 0])
    print("a row computed by hand is the same")


if __name__ == "__main__":
    main()
