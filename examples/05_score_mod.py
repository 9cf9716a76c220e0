"""Attention of your own: a softcap, a learned slope per head, and packed documents of several lengths.

``score_mod`` and ``mask_mod`` are PyTorch code over index tensors.  They become part of the kernels, forward
and backward; the learned slopes get their gradient, and blocks between two documents are never visited.
"""

import torch
from torch import Tensor, nn

import flashfuse

LENGTHS = (700, 300, 900, 148)


class Attention(nn.Module):
    """Causal attention within documents, scores capped at ±20 and falling with the distance."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.linspace(0.01, 0.1, heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return torch.tanh(score / 20) * 20 - self.slopes[h] * (q - kv)

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (document[q] == document[kv])

        return flashfuse.attention(q, k, v, score_mod, mask_mod)


def main() -> None:
    torch.manual_seed(0)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    q, k, v = (torch.randn(1, 4, sum(LENGTHS), 32) for _ in range(3))
    layer = Attention(heads=4)
    out = layer(q, k, v, document)
    out.square().mean().backward()
    print(f"fused: out {list(out.shape)}; gradient of the slopes {layer.slopes.grad}")

    # Each document by itself gives the same.
    start = 0
    for length in LENGTHS:
        here = slice(start, start + length)
        alone = layer(q[:, :, here], k[:, :, here], v[:, :, here], document[here])
        torch.testing.assert_close(alone, out[:, :, here])
        start += length
    print(f"{len(LENGTHS)} documents of {', '.join(map(str, LENGTHS))} tokens: packed and alone agree")

    try:
        flashfuse.attention(q, k, v, lambda score, b, h, q, kv: score.sort(-1).values)
    except flashfuse.NotFusible as error:
        print(f"a sort: {error}")


if __name__ == "__main__":
    main()
