"""What the passes and the proofs cost: time by number of layers, and as a share of the first compile.

    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) TORCHINDUCTOR_COMPILE_THREADS=1 python benchmarks/passes.py

GPT-2 small's width with 6, 24 and 96 layers, eager attention, training graph.  Times are of the processor, of
child processes too, so that what else the machine does is not in them.  The result goes to
``benchmarks/results/passes.md``.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx

from flashfuse import pipeline
from flashfuse.bench import machine_line
from flashfuse.options import Options
from flashfuse.report import Report

LAYERS = (6, 24, 96)
SHARE_AT = 6
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


def _cpu_ms() -> float:
    """Time of the processor that this process and its children took so far."""
    times = os.times()
    return 1e3 * (times.user + times.system + times.children_user + times.children_system)


def _measured(graph: fx.GraphModule) -> tuple[float, float, Report]:
    """Milliseconds of the passes and of the proofs, and the report."""
    gc.collect()
    started = _cpu_ms()
    pipeline.run(graph, Options(verify="off"))
    without = _cpu_ms()
    report = pipeline.run(graph, Options())[1]
    passes, both = without - started, _cpu_ms() - without
    return passes, max(0.0, both - passes), report


def main() -> int:
    ids = torch.randint(0, 512, (2, 64))
    lines = [
        "`TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) TORCHINDUCTOR_COMPILE_THREADS=1 python benchmarks/passes.py`, "
        "times of the processor.",
        "",
        "| layers | graph nodes | sites fused | passes, ms (median of 5) | µs per node | proofs, ms |",
        "|---|---|---|---|---|---|",
    ]
    for layers in LAYERS:
        graph = _graph(_model(layers), ids)
        runs = [_measured(graph) for _ in range(ROUNDS)]
        passes, proofs = (statistics.median(run[i] for run in runs) for i in (0, 1))
        count, report = len(graph.graph.nodes), runs[0][2]
        fused = f"{report.num_fused} of {report.num_sites}"
        lines.append(
            f"| {layers} | {count} | {fused} | {passes:.1f} | {1e3 * passes / count:.1f} | {proofs:.1f} |"
        )
        print(lines[-1], flush=True)
    passes, proofs, _ = _measured(_graph(_model(SHARE_AT), ids))
    torch._dynamo.reset()
    model = _model(SHARE_AT)
    started = _cpu_ms()
    out = torch.compile(model, backend="flashfuse")(ids).logits
    out.sum().backward()
    first = _cpu_ms() - started
    lines += [
        "",
        f"First compile and step of {SHARE_AT} layers with Inductor, forward and backward: "
        f"{first / 1e3:.1f} s of the processor,",
        f"of which the passes {passes:.0f} ms ({100 * passes / first:.2f} %) and the proofs "
        f"{proofs:.0f} ms ({100 * proofs / first:.2f} %).",
        "",
        machine_line(torch.device("cpu")),
    ]
    path = Path(__file__).parent / "results" / "passes.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-5:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
