"""What a call costs on the host: µs to enqueue attention on a tiny problem, forward and backward.

    python benchmarks/overhead.py [--calls 2000] [--kernels]

Calls are enqueued without waiting for the device, which is done with each before the next comes.  The median
of a few rounds is shown, interleaved.  ``--kernels``: our host code below the dispatcher as well.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashfuse
from flashfuse.kernels import block_map, native, ops, triton_attention  # noqa: F401
from flashfuse.kernels.spec import ScoreProgram

SHAPE = (1, 4, 128, 64)
TEXT = "s*0.125 where kv <= q"
ROUNDS = 5


def operator(variant: str, maps: list[Tensor]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.flashfuse.attention(q, k, v, [], [], maps, None, TEXT, 0.0, variant)[0]
        return out

    return run


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    # The switch itself takes as long as a call: it is thrown once for each round.
    run.backend = backend  # type: ignore[attr-defined]
    return run


def enqueued_us(f: Callable[[], object], calls: int) -> float:
    for _ in range(20):
        f()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        f()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def measure(run: Callable[..., Tensor], inputs: list[Tensor], calls: int) -> tuple[float, float, float]:
    """(forward, forward that keeps what a backward needs, backward) in µs."""
    *leaves, do = inputs
    with_grad = [t.detach().requires_grad_() for t in leaves]
    with torch.no_grad():
        forward = enqueued_us(functools.partial(run, *leaves), calls)
    kept = enqueued_us(functools.partial(run, *with_grad), calls)
    out = run(*with_grad)
    backward = functools.partial(torch.autograd.grad, out, with_grad, do, retain_graph=True)
    return forward, kept, enqueued_us(backward, calls)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    b, h, n, d = SHAPE
    inputs = [torch.randn(b, n, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]
    program = ScoreProgram.parse(TEXT)
    maps = list(block_map.build((), (), inputs[0].device, (b, h, n, n), program.mask_program))

    def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv <= q

    ways: dict[str, Callable[..., Tensor]] = {
        "ours, torch.ops": operator("triton", maps),
        "native, torch.ops": operator("native", []),
        "flashfuse.attention": functools.partial(flashfuse.attention, mask_mod=causal),
        "SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            backend = getattr(run, "backend", None)
            if backend is None:
                times[name].append(measure(run, inputs, options.calls))
                continue
            with sdpa_kernel(backend):
                times[name].append(measure(run, inputs, options.calls))
    import triton

    device = torch.cuda.get_device_name()
    print(f"# {device}, torch {torch.__version__}, triton {triton.__version__}; B H N D {SHAPE}, causal")
    print(f"{'µs per call':24s} {'forward':>9s} {'training':>9s} {'backward':>9s}")
    for name, rows in times.items():
        print(
            f"{name:24s} "
            + " ".join(f"{statistics.median(column):9.1f}" for column in zip(*rows, strict=True))
        )
    if options.kernels:
        q, k, v, do = inputs
        for name, module in (("triton", triton_attention), ("native", native)):
            site = ((), (), maps if name == "triton" else (), None, program, 0.0)
            out, lse = module.forward(q, k, v, *site)
            forward = enqueued_us(functools.partial(module.forward, q, k, v, *site), options.calls)
            back = functools.partial(module.backward, do, q, k, v, out, lse, *site, ())
            print(
                f"{name + ', host code':24s} {forward:9.1f} {'':9s} {enqueued_us(back, options.calls):9.1f}"
            )


if __name__ == "__main__":
    main()
