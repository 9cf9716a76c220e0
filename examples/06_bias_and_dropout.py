"""Train attention with a learned bias of distances and dropout, written the plain way.

The bias is a [Sq, Skv] matrix in the code below.  In the compiled model it is read from its table, dropout is
drawn in the kernel and replayed in the backward, and the table gets its gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashfuse

LENGTH, WIDTH, HEADS, FURTHEST = 128, 32, 2, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Embedding(2 * FURTHEST + 1, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        position = torch.arange(x.shape[1], device=x.device)
        distance = (position[None, :] - position[:, None]).clamp(-FURTHEST, FURTHEST) + FURTHEST
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + self.bias(distance).permute(2, 0, 1)
        weights = F.dropout(scores.softmax(-1), 0.1, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    model = Attention()
    compiled = torch.compile(model, backend="flashfuse")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        x = torch.randn(4, LENGTH, WIDTH)
        wanted = x.roll(2, 1)  # what stands two places to the left: a task for the bias
        loss = F.mse_loss(compiled(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    report = flashfuse.last_report()
    assert report is not None and report.num_fused == 1
    print(report)
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    favourite = model.bias.weight.argmax(0) - FURTHEST
    print(f"distance that each head likes best: {favourite.tolist()}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
