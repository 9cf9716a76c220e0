"""Attention kernels side by side: ours, FlashAttention-2 and cuDNN through SDPA, FlexAttention.

    python benchmarks/kernels.py [--no-flex] [--quick] [--json FILE]

Batch × length is 16k tokens, heads × head_dim 2048, bfloat16.  TFLOP/s counts 4·B·H·N²·D operations
forward (half of them under a causal mask) and 2.5 times as many backward.  Rounds are interleaved and
the median is shown.  The last row is a decoding step, one query against a long cache with grouped
heads: GB/s of k and v, and their share of what the memory gives.  A row whose results are not equal to
float64 within twice the error of eager attention gets no figure.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashfuse.kernels import block_map, ops
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

TOKENS, WIDTH = 16384, 2048
ROUNDS = 3
Shape = tuple[int, int, int, int]

DECODE = (8, 32, 8, 32768, 128)
"""B, H, H_kv, Skv, D."""
COPY_GB_S = 3020
"""What a copy reaches on an H100 80GB HBM3."""

DENSE = [(d, causal, n) for d in (64, 128) for n in (1024, 4096, 16384) for causal in (False, True)]
SPARSE = [("causal", 1 << 30), ("window 4096", 4096), ("window 1024", 1024), ("window 256", 256)]


def shape_of(head_dim: int, length: int) -> Shape:
    return TOKENS // length, WIDTH // head_dim, length, head_dim


def tensors(shape: Shape) -> list[Tensor]:
    """q, k, v and the gradient of out, laid out as models have them: [B, S, H, D] in memory."""
    b, h, n, d = shape
    return [torch.randn(b, n, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]


def program_of(shape: Shape, causal: bool, window: int = 1 << 30) -> ScoreProgram:
    text = f"s*{shape[3] ** -0.5}"
    if causal:
        text += " where kv <= q" + (f" and kv > q - {window}" if window < 1 << 30 else "")
    return ScoreProgram.parse(text)


@functools.cache
def _seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="cuda")


def ours(
    q: Tensor, k: Tensor, v: Tensor, program: ScoreProgram, maps: list[Tensor], p: float = 0.0
) -> Tensor:
    seed = _seed() if p else None
    out: Tensor = torch.ops.flashfuse.attention(q, k, v, [], [], maps, seed, program.text, p, "triton")[0]
    return out


def sdpa(backend: SDPBackend, causal: bool, p: float = 0.0) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=p)

    return run


def flex(shape: Shape, causal: bool, window: int = 1 << 30) -> Callable[..., Tensor]:
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # its backward is timed more than once
    torch._dynamo.reset()  # else it stops compiling after eight shapes, and runs unfused

    def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (kv > q - window) if window < 1 << 30 else kv <= q

    blocks = create_block_mask(mask, None, None, shape[2], shape[2], device="cuda") if causal else None
    return functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)


def equal(run: Callable[..., Tensor], inputs: list[Tensor], program: ScoreProgram) -> bool:
    """The rule of the tests on one batch entry and head, forward and backward."""
    small = [t[:1, :1, :1024].contiguous() for t in inputs]
    *leaves, do = small

    def results(f: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype).requires_grad_() for t in leaves]
        out = f(*given)
        return [out.detach(), *torch.autograd.grad(out, given, do.to(dtype))]

    def eager(*qkv: Tensor) -> Tensor:
        return attention_reference(*qkv, (), (), program)[0]

    exact, original, mine = (
        results(eager, torch.float64),
        results(eager, torch.bfloat16),
        results(run, torch.bfloat16),
    )
    eps = torch.finfo(torch.bfloat16).eps
    for e, o, m in zip(exact, original, mine, strict=True):
        if not (m - e).abs().max() <= 2 * (o - e).abs().max() + eps * e.abs().max():
            return False
    return True


def elapsed_ms(f: Callable[[], object]) -> float:
    """Median over a few runs, after a warm-up."""
    f()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(7)]
    torch.cuda.synchronize()
    # The device waits while the host runs ahead, so that short kernels are not timed by their launches.
    torch.cuda._sleep(30_000_000)
    for start, stop in events:
        start.record()
        f()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events)


def interleaved(
    ways: dict[str, Callable[..., Tensor]], inputs: list[Tensor]
) -> dict[str, tuple[float, float]]:
    """Name → (forward, backward) in ms."""
    *leaves, do = inputs
    with_grad = [t.detach().requires_grad_() for t in leaves]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            try:
                forward = elapsed_ms(functools.partial(run, *leaves))
                out = run(*with_grad)
                backward = elapsed_ms(
                    functools.partial(torch.autograd.grad, out, with_grad, do, retain_graph=True)
                )
                times[name].append((forward, backward))
            except Exception as error:
                print(
                    f"# {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr
                )
    return {
        name: (statistics.median(t[0] for t in rows), statistics.median(t[1] for t in rows))
        for name, rows in times.items()
        if rows
    }


def warm_flex(job: tuple[int, bool, int]) -> None:
    """Fill the compiler's disk cache, so that compilations run side by side."""
    head_dim, causal, length = job
    shape = shape_of(head_dim, length)
    *leaves, do = tensors(shape)
    run = flex(shape, causal)
    leaves = [t.requires_grad_() for t in leaves]
    torch.autograd.grad(run(*leaves), leaves, do)


def measure(
    name: str, shape: Shape, causal: bool, window: int, with_flex: bool, p: float = 0.0
) -> dict[str, Any]:
    program = program_of(shape, causal, window)
    b, h, n, d = shape
    inputs = tensors(shape)

    def build(size: int) -> list[Tensor]:
        if not causal:
            return []
        sizes = (b, h, size, size)
        return list(block_map.build((), (), torch.device("cuda"), sizes, program.mask_program))

    check = functools.partial(ours, program=program, maps=build(min(n, 1024)))
    is_equal = equal(check, inputs, program)
    ways: dict[str, Callable[..., Tensor]] = {}
    if is_equal:
        ways["ours"] = functools.partial(ours, program=program, maps=build(n), p=p)
    if window == 1 << 30:
        ways["flash"] = sdpa(SDPBackend.FLASH_ATTENTION, causal, p)
        ways["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION, causal, p)
    if with_flex and not p:
        ways["flex"] = flex(shape, causal, window)
    flops = 4 * b * h * n * n * d
    if causal:
        flops = flops / n / n * sum(min(i + 1, window) for i in range(n)) if window < n else flops / 2
    times = interleaved(ways, inputs)
    row: dict[str, Any] = {"name": name, "shape": shape, "equal": is_equal, "ms": times}
    row["tflops"] = {k: (flops / f / 1e9, 2.5 * flops / g / 1e9) for k, (f, g) in times.items()}
    if causal:
        row["map_ms"] = elapsed_ms(lambda: build(n))
    return row


def measure_decode() -> dict[str, Any]:
    """One query against a cache: forward alone, in ms and GB/s."""
    b, h, kv_heads, length, d = DECODE
    q, k, v = (
        torch.randn(b, n, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n, heads in ((1, h), (length, kv_heads), (length, kv_heads))
    )
    program = ScoreProgram.parse(f"s*{d**-0.5}")
    padded = ScoreProgram.parse(f"s*{d**-0.5} where kv <= last[q] and pad[b, kv] else uniform")
    captures = [torch.tensor([length - 1], device="cuda"), torch.ones(b, length, device="cuda").bool()]
    sizes = (b, h, 1, length)
    maps = list(block_map.build(captures, (), q.device, sizes, padded.mask_program))

    def backend(which: SDPBackend) -> Callable[..., Tensor]:
        def run(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(*qkv, enable_gqa=True)

        return run

    def masked(*qkv: Tensor) -> Tensor:
        out: Tensor = torch.ops.flashfuse.attention(
            *qkv, captures, [], maps, None, padded.text, 0.0, "triton"
        )[0]
        return out

    ways: dict[str, Callable[..., Tensor]] = {
        "ours": functools.partial(ours, program=program, maps=[]),
        "ours, mask": masked,
        "flash": backend(SDPBackend.FLASH_ATTENTION),
        "cudnn": backend(SDPBackend.CUDNN_ATTENTION),
    }
    exact, eager = (
        attention_reference(q[:1].to(t), k[:1].to(t), v[:1].to(t), (), (), program)[0]
        for t in (torch.float64, torch.bfloat16)
    )
    bound = 2 * (eager - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    is_equal = all(bool((ways[w](q, k, v)[:1] - exact).abs().max() <= bound) for w in ("ours", "ours, mask"))
    if not is_equal:
        del ways["ours"], ways["ours, mask"]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            try:
                times[name].append(elapsed_ms(functools.partial(run, q, k, v)))
            except Exception as error:
                print(
                    f"# {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr
                )
    ms = {name: statistics.median(t) for name, t in times.items() if t}
    size = (k.numel() + v.numel()) * k.element_size()
    rates = {name: size / t / 1e6 for name, t in ms.items()}
    return {"name": "decode 32k", "shape": DECODE, "equal": is_equal, "ms": ms, "gb_s": rates}


def show_decode(row: dict[str, Any]) -> None:
    cells = [
        f"{way} {ms:.3f} ms {row['gb_s'][way]:.0f} GB/s {row['gb_s'][way] / COPY_GB_S:.0%}"
        for way, ms in row["ms"].items()
    ]
    print(f"{row['name']:18s} " + "  ".join(cells) + ("" if row["equal"] else "  NOT EQUAL"), flush=True)


def show(row: dict[str, Any]) -> None:
    cells = []
    for way, (forward, backward) in row["ms"].items():
        rate = row["tflops"][way]
        cells.append(f"{way} {forward:.3f}/{backward:.3f} ms {rate[0]:.0f}/{rate[1]:.0f}")
    extra = f"  map {row['map_ms']:.3f} ms" if "map_ms" in row else ""
    print(
        f"{row['name']:18s} " + "  ".join(cells) + extra + ("" if row["equal"] else "  NOT EQUAL"), flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--quick", action="store_true", help="lengths 1024 and 16384 only, no sparse rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    import triton

    machine = f"{properties.name}, torch {torch.__version__}, triton {triton.__version__}, block {ops.BLOCK}"
    print(f"# {machine}; forward/backward ms and TFLOP/s")
    dense = [job for job in DENSE if not options.quick or job[2] != 4096]
    if not options.no_flex:
        with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
            list(pool.map(warm_flex, dense))
    rows = []
    for head_dim, causal, length in dense:
        name = f"d{head_dim} {'causal' if causal else 'full'} {length}"
        rows.append(measure(name, shape_of(head_dim, length), causal, 1 << 30, not options.no_flex))
        show(rows[-1])
    rows.append(measure("gpt2 dropout", (16, 12, 1024, 64), True, 1 << 30, False, p=0.1))
    show(rows[-1])
    if not options.quick:
        for name, window in SPARSE:
            rows.append(measure(name, (1, 16, 16384, 128), True, window, False))
            show(rows[-1])
    rows.append(measure_decode())
    show_decode(rows[-1])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
