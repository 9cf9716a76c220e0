"""What FlashFuse would do with a model, what it leaves alone and why, and whether the results are equal."""

import torch
from torch import nn

import flashfuse


class Encoder(nn.Module):
    """Three attentions: with padding and ALiBi; with its weights returned; with small weights pruned."""

    def __init__(self, heads: int = 4, head_dim: int = 32) -> None:
        super().__init__()
        self.shape = (heads, head_dim)
        self.proj = nn.ModuleList(nn.Linear(heads * head_dim, heads * head_dim) for _ in range(6))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1))

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, _ = x.shape
        q, k, v, q2, k2, v2 = (p(x).view(batch, length, *self.shape).transpose(1, 2) for p in self.proj)
        position = torch.arange(length, device=x.device)
        distance = (position[None, :] - position[:, None]).abs()
        scores = q @ k.mT * self.shape[1] ** -0.5 - self.slopes[:, None, None] * distance
        scores = scores.masked_fill(~keep[:, None, None, :], torch.finfo(x.dtype).min)
        first = scores.softmax(-1) @ v
        weights = (q2 @ k2.mT).softmax(-1)
        second = weights @ v2
        other = (q @ k2.mT).softmax(-1)
        third = torch.where(other > 0.01, other, 0.0) @ v2
        return first + second + third, weights


def main() -> None:
    torch.manual_seed(0)
    model = Encoder()
    x = torch.randn(3, 111, 128)
    keep = torch.arange(111) < torch.tensor([111, 80, 17])[:, None]

    report = flashfuse.explain(model, x, keep)
    print(report, "\n")
    check = flashfuse.verify(model, x, keep, backward=True)
    print(check)
    assert report.num_fused == 2 and report.num_sites == 3 and check.ok


if __name__ == "__main__":
    main()
