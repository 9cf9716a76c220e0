"""What the passes and the proofs cost: time by number of layers, and as a share of the first compile.

    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python benchmarks/passes.py

GPT-2 small's width with 6, 24 and 96 layers, eager attention, training graph.  The result goes to
``benchmarks/results/passes.md``.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx

import flashfuse
from flashfuse import pipeline
from flashfuse.bench import machine_line
from flashfuse.options import Options

LAYERS = (6, 24, 96)
SHARE_AT = 24
ROUNDS = 5


def _model(layers: int) -> torch.nn.Module:
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=64, n_head=4, vocab_size=512, use_cache=False, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config).train()


def _graph(model: torch.nn.Module, ids: torch.Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def collect(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=collect)(ids)
    (graph,) = graphs
    return graph


def main() -> int:
    ids = torch.randint(0, 512, (2, 64))
    lines = [
        f"`TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python benchmarks/passes.py`, load {os.getloadavg()[0]:.0f}.",
        "",
        "| layers | graph nodes | sites fused | passes, ms (median of 5) | µs per node | proofs, ms |",
        "|---|---|---|---|---|---|",
    ]
    for layers in LAYERS:
        graph = _graph(_model(layers), ids)
        reports = []
        for _ in range(ROUNDS):
            gc.collect()
            reports.append(pipeline.run(graph, Options())[1])
        passes = statistics.median(r.pass_ms for r in reports)
        proofs = statistics.median(r.proof_ms for r in reports)
        count = len(graph.graph.nodes)
        fused = f"{reports[0].num_fused} of {reports[0].num_sites}"
        lines.append(
            f"| {layers} | {count} | {fused} | {passes:.1f} | {1e3 * passes / count:.1f} | {proofs:.1f} |"
        )
        print(lines[-1], flush=True)
    torch._dynamo.reset()
    flashfuse.clear_reports()
    model = _model(SHARE_AT)
    start = time.perf_counter()
    out = torch.compile(model, backend="flashfuse")(ids).logits
    out.sum().backward()
    first = time.perf_counter() - start
    passes, proofs = (sum(getattr(r, name) for r in flashfuse.reports()) for name in ("pass_ms", "proof_ms"))
    lines += [
        "",
        f"First compile and step of {SHARE_AT} layers with Inductor, forward and backward: {first:.1f} s,",
        f"of which the passes {passes:.0f} ms ({passes / first / 10:.2f} %) and the proofs {proofs:.0f} ms "
        f"({proofs / first / 10:.2f} %).",
        "",
        machine_line(torch.device("cpu")),
    ]
    path = Path(__file__).parent / "results" / "passes.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-5:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
