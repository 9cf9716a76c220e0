"""Memory of the fused path by length: forward and backward of one causal attention on the GPU.

    python benchmarks/memory.py

16 heads, D 64, bfloat16, batch 1.  The result goes to ``benchmarks/results/memory.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import flashfuse.kernels.ops  # noqa: F401  (defines torch.ops.flashfuse)
from flashfuse.bench import machine_line, peak_bytes

LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144)


def main() -> int:
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    lines = ["| tokens | peak above inputs, MB | bytes per token |", "|---|---|---|"]
    for n in LENGTHS:
        q, k, v = (
            torch.randn(1, n, 16, 64, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
        )
        for t in (q, k, v):
            t.requires_grad_()

        def step(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            program = "s*0.125 where kv <= q"
            maps = torch.ops.flashfuse.block_map([], [], q, 1, 16, q.shape[2], q.shape[2], "0 where kv <= q")
            out, _ = torch.ops.flashfuse.attention(q, k, v, [], [], list(maps), None, program, 0.0, "triton")
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        step()
        peak = peak_bytes(step, device)
        lines.append(f"| {n} | {peak / 1e6:.0f} | {peak / n:.0f} |")
        print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "memory.md"
    path.write_text("\n".join([*lines, "", machine_line(device)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
