"""Attention on a CPU: ours beside PyTorch's own, in one process and in turns.

    python benchmarks/cpu.py [--quick] [--out benchmarks/results/cpu-attention]

Every round runs each way once, so that a slow spell of the machine hits all; the figure is the median
of 7 rounds.  A case is timed only if our result is equal to
SDPA's under the rule of ``flashfuse.checker``, where there is no dropout.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flashfuse.kernels.ops  # noqa: F401  defines the operators
from flashfuse.numbers import compare

ROUNDS = 7
Step = Callable[[], Any]


def ours(program: str, captures: tuple[Tensor, ...] = (), dropout_p: float = 0.0) -> Callable[..., Tensor]:
    seed = torch.tensor([1]) if dropout_p else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.flashfuse.attention(
            q, k, v, list(captures), [], [], seed, program, dropout_p, "cpu"
        )[0]
        return out

    return attend


def eager(mask: Tensor, dropout_p: float = 0.0) -> Callable[..., Tensor]:
    """Attention as GPT-2 spells it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / 8.0
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        weights = F.dropout(F.softmax(scores, dim=-1), dropout_p)
        return torch.matmul(weights, v)

    return attend


def inference(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return attend(*tensors)

    return step


def training(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Step:
    leaves = [t.detach().requires_grad_() for t in tensors]
    do = torch.ones_like(tensors[0])

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, do)

    return step


def draw(batch: int, heads: int, length: int, kv_heads: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, h, 64) for h in (heads, kv_heads or heads, kv_heads or heads)]
    return [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]


def cases() -> dict[str, tuple[Step | None, dict[str, Step]]]:
    """Name → (step in float64 where results can be compared, way → step)."""
    found: dict[str, tuple[Step | None, dict[str, Step]]] = {}

    def add(
        name: str, mode: Callable[..., Step], tensors: list[Tensor], comparable: bool = True, **ways: Any
    ) -> None:
        exact = mode(ways["sdpa"], [t.double() for t in tensors]) if comparable else None
        found[name] = exact, {way: mode(attend, tensors) for way, attend in ways.items()}

    def sdpa(**options: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)

    n = 8192
    i = torch.arange(n)
    window = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 512)
    text = "s*0.125 where kv <= q and kv > q - 512"
    tensors = draw(1, 8, n)
    add("window 512, B1 H8 N8192", inference, tensors, sdpa=sdpa(attn_mask=window), ours=ours(text))
    add("window 512, B1 H8 N8192, fwd+bwd", training, tensors, sdpa=sdpa(attn_mask=window), ours=ours(text))

    n, i = 512, torch.arange(512)
    causal = i[None] <= i[:, None]
    tensors = draw(4, 12, n)
    text = "s*0.125 where kv <= q"
    add("causal, B4 H12 N512", inference, tensors, sdpa=sdpa(is_causal=True), ours=ours(text))
    lengths = torch.tensor([512, 400, 300, 450])
    pad = i[None] < lengths[:, None]
    both = (causal & pad[:, None])[:, None]
    text = "s*0.125 where kv <= q and pad[b, kv]"
    for mode, suffix in ((inference, ""), (training, ", fwd+bwd")):
        add(
            f"causal and right padding, B4 H12 N512{suffix}",
            mode,
            tensors,
            sdpa=sdpa(attn_mask=both),
            eager=eager(both),
            ours=ours(text, (pad,)),
        )
    documents = (torch.arange(2048) // 300)[None]
    apart = (documents[:, None] == documents[..., None]) & torch.ones(2048, 2048, dtype=torch.bool).tril()
    add(
        "documents of 300, B1 H8 N2048",
        inference,
        draw(1, 8, 2048),
        sdpa=sdpa(attn_mask=apart[None]),
        ours=ours("s*0.125 where kv <= q and doc[b, kv] == doc[b, q]", (documents,)),
    )
    add(
        "GPT-2 training, dropout 0.1, B4 H12 N512, fwd+bwd",
        training,
        tensors,
        comparable=False,
        sdpa=sdpa(is_causal=True, dropout_p=0.1),
        eager=eager(causal, 0.1),
        inductor=torch.compile(eager(causal, 0.1)),
        ours=ours("s*0.125 where kv <= q", (), 0.1),
    )
    return found


def equal(results: dict[str, Any], exact: Any) -> bool:
    """Ours under the one rule, with SDPA as the original."""
    ours, original, reference = (
        r if isinstance(r, tuple) else (r,) for r in (results["ours"], results["sdpa"], exact)
    )
    return all(compare("", *tensors).ok for tensors in zip(ours, original, reference, strict=True))


def measure(ways: dict[str, Step], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, step in ways.items():
            start = time.perf_counter()
            step()
            times[way].append((time.perf_counter() - start) * 1e3)
    return {way: statistics.median(t) for way, t in times.items()}


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, D 64"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds, to see that it runs")
    parser.add_argument("--out", type=Path, help="writes PATH.json and PATH.md")
    options = parser.parse_args()
    lines = [f"Machine: {machine()}. Median of interleaved rounds, ms.", ""]
    lines.append("| case | sdpa | eager | inductor | ours | against the best other |")
    lines.append("|---|---:|---:|---:|---:|---:|")
    rows: list[dict[str, Any]] = []
    for name, (exact, ways) in cases().items():
        results = {way: step() for way, step in ways.items()}
        if exact is not None and not equal(results, exact()):
            lines.append(f"| {name} | results differ, not timed |")
            rows.append({"case": name, "equal": False})
            continue
        times = measure(ways, 2 if options.quick else ROUNDS)
        best = min(t for way, t in times.items() if way != "ours")
        cells = [f"{times[way]:.1f}" if way in times else "" for way in ("sdpa", "eager", "inductor", "ours")]
        lines.append(f"| {name} | {' | '.join(cells)} | {best / times['ours']:.2f}× |")
        rows.append({"case": name, "equal": exact is not None, "ms": times, "speedup": best / times["ours"]})
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
        record = {"machine": machine(), "rows": rows}
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
