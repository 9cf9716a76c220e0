"""Rewrite a graph you already have: from torch.fx.symbolic_trace or torch.export.

``symbolic_trace`` runs ``arange`` itself, so its graph holds the mask as a tensor, and so does the
rewritten one.  ``export`` records how the mask is made, so there it turns into a formula.
"""

import difflib
import math

import torch
from torch import nn

import flashfuse


class SlidingWindow(nn.Module):
    """Attention to the last 64 positions."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        position = torch.arange(256)
        distance = position[:, None] - position[None, :]
        outside = (distance < 0) | (distance >= 64)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(64)
        return torch.matmul(torch.softmax(scores.masked_fill(outside, -math.inf), dim=-1), v)


def main() -> None:
    torch.manual_seed(0)
    args = tuple(torch.randn(1, 4, 256, 64) for _ in range(3))
    graphs = {
        "symbolic_trace": torch.fx.symbolic_trace(SlidingWindow()),
        "export": torch.export.export(SlidingWindow(), args).module(),
    }
    for name, graph in graphs.items():
        rewritten, report = flashfuse.rewrite(graph, args)
        print(f"--- {name}\n{report}\n")
        before, after = (str(gm.graph).splitlines() for gm in (graph, rewritten))
        print("\n".join(difflib.unified_diff(before, after, "before", "after", n=0, lineterm="")), "\n")
        assert report.num_fused == 1
        torch.testing.assert_close(rewritten(*args), graph(*args))


if __name__ == "__main__":
    main()
