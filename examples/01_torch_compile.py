"""A model that nobody changed, compiled with FlashFuse: one word differs from plain torch.compile."""

import torch
from torch import nn


class Block(nn.Module):
    """Causal attention, written out by hand."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    x = torch.randn(2, 300, 256)
    compiled = torch.compile(model, backend="flashfuse")
    difference = (compiled(x) - model(x)).abs().max().item()

    import flashfuse  # for the report only

    report = flashfuse.last_report()
    print(report)
    print(f"\nlargest difference of an output from the model's own: {difference:.1e}")
    assert report is not None and report.num_fused == 4


if __name__ == "__main__":
    main()
