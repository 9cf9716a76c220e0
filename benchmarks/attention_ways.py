"""Ways to compute one attention on a GPU, checked and timed side by side: what ``kernels.py`` uses."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashfuse.kernels.ops  # noqa: F401  (defines torch.ops.flashfuse)
from flashfuse.kernels import block_map
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

ROUNDS = 3
CHECKED = 1024
"""Tokens of the problem on which results are compared with float64."""
FEW = 256
"""Up to so many, all batch entries are compared."""

Way = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One attention: B, H, N, D of q, k, v in bfloat16, and the program.

    ``captures`` makes the captured tensors for a length, in the program's order; ``grads`` are those that
    get a gradient.  ``causal`` tells SDPA's kernels what to do, ``None`` that they cannot.  ``flex`` gives
    ``(score_mod, mask_mod)`` over the captures, ``None`` that FlexAttention cannot.  ``bias`` is what SDPA
    adds to the scores, made from the captures.
    """

    name: str
    shape: tuple[int, int, int, int]
    text: str
    captures: Callable[[int], Sequence[Tensor]] = lambda length: ()
    grads: tuple[int, ...] = ()
    dropout_p: float = 0.0
    causal: bool | None = None
    flex: Callable[[Sequence[Tensor]], tuple[Any, Any]] | None = None
    varlen: bool = False
    bias: Callable[[Sequence[Tensor]], Tensor] | None = None

    @property
    def program(self) -> ScoreProgram:
        return ScoreProgram.parse(self.text)


@dataclass(frozen=True)
class Measured:
    """``density`` is that of the map's blocks; forward and backward in ms and peak bytes by way."""

    problem: Problem
    equal: bool
    density: float
    map_ms: float
    ms: Mapping[str, tuple[float, float]]
    peak: Mapping[str, int]


def tensors(shape: Sequence[int], count: int = 4) -> list[Tensor]:
    """q, k, v and the gradient of out, laid out as models have them: [B, S, H, D] in memory."""
    b, h, n, d = shape
    return [
        torch.randn(b, n, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(count)
    ]


def maps_of(problem: Problem, captures: Sequence[Tensor], length: int) -> list[Tensor]:
    program = problem.program
    if program.mask is None:
        return []
    b, h = problem.shape[:2]
    named = dict(zip(program.captures, captures, strict=True))
    mask = program.mask_program
    given = [named[name] for name in mask.captures]
    return list(block_map.build(given, (), torch.device("cuda"), (b, h, length, length), mask))


def density_of(maps: Sequence[Tensor], length: int) -> float:
    """The share of the map's blocks that are not empty."""
    return (
        1.0 if not maps else float(maps[0][..., :2].sum(-1).double().mean() / block_map.block_count(length))
    )


@functools.cache
def _seed() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="cuda")


def ours(problem: Problem, captures: Sequence[Tensor], maps: Sequence[Tensor]) -> Way:
    seed = _seed() if problem.dropout_p else None

    def run(q: Tensor, k: Tensor, v: Tensor, *floats: Tensor) -> Tensor:
        given = list(captures)
        for i, t in zip(problem.grads, floats, strict=True):
            given[i] = t
        out: Tensor = torch.ops.flashfuse.attention(
            q, k, v, given, [], list(maps), seed, problem.text, problem.dropout_p, "triton"
        )[0]
        return out

    return run


def sdpa(problem: Problem, backend: SDPBackend) -> Way:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=bool(problem.causal), dropout_p=problem.dropout_p
            )

    return run


def sdpa_with_bias(problem: Problem, captures: Sequence[Tensor]) -> Way:
    """By the backend that PyTorch chooses, the bias being made anew at each call."""

    def run(q: Tensor, k: Tensor, v: Tensor, *floats: Tensor) -> Tensor:
        given = list(captures)
        for i, t in zip(problem.grads, floats, strict=True):
            given[i] = t
        return F.scaled_dot_product_attention(q, k, v, attn_mask=problem.bias(given))  # type: ignore[misc]

    return run


def flex(problem: Problem, captures: Sequence[Tensor]) -> Way:
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # its backward is timed more than once
    torch._dynamo.reset()  # else it stops compiling after eight shapes, and runs unfused
    assert problem.flex is not None
    compiled = torch.compile(flex_attention, dynamic=False)
    n = problem.shape[2]
    blocks = None
    _, mask = problem.flex(captures)
    if mask is not None:
        blocks = create_block_mask(mask, None, None, n, n, device="cuda")

    def run(q: Tensor, k: Tensor, v: Tensor, *floats: Tensor) -> Tensor:
        given = list(captures)
        for i, t in zip(problem.grads, floats, strict=True):
            given[i] = t
        score = problem.flex(given)[0]  # type: ignore[misc]
        out: Tensor = compiled(q, k, v, score_mod=score, block_mask=blocks)  # type: ignore[assignment]
        return out

    return run


def varlen(document: Tensor) -> Way:
    """FlashAttention-2's packed kernel over the documents of [N]."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.bincount(document)
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (t[0].transpose(0, 1) for t in (q, k, v))  # [N, H, D]
        out = varlen_attn(*rows, ends, ends, longest, longest, window_size=(-1, 0))
        return out.transpose(0, 1)[None]

    return run


def equal(problem: Problem) -> bool:
    """The rule of the tests at a length of CHECKED, one batch entry, or all that are short, both ways."""
    b, h, n, d = problem.shape
    shape = (b if n <= FEW else 1, h, min(n, CHECKED), d)
    small = Problem(problem.name, shape, problem.text, problem.captures, problem.grads)
    n = small.shape[2]
    captures = [c.to(torch.bfloat16) if i in problem.grads else c for i, c in enumerate(problem.captures(n))]
    *leaves, do = tensors(small.shape)
    run = ours(small, captures, maps_of(small, captures, n))

    def results(f: Way, dtype: torch.dtype) -> list[Tensor]:
        given = [
            t.detach().to(dtype).requires_grad_() for t in (*leaves, *(captures[i] for i in small.grads))
        ]
        out = f(*given)
        return [out.detach(), *torch.autograd.grad(out, given, do.to(dtype))]

    def eager(q: Tensor, k: Tensor, v: Tensor, *floats: Tensor) -> Tensor:
        given = list(captures)
        for i, t in zip(small.grads, floats, strict=True):
            given[i] = t
        return attention_reference(q, k, v, given, (), small.program)[0]

    exact, original = results(eager, torch.float64), results(eager, torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    return all(
        bool((m - e).abs().max() <= 2 * (o - e).abs().max() + eps * e.abs().max())
        for e, o, m in zip(exact, original, results(run, torch.bfloat16), strict=True)
    )


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
    ways: Mapping[str, Way], leaves: Sequence[Tensor], do: Tensor
) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Name → (forward, backward) in ms; name → peak bytes of both above the inputs."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    peak: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            given = leaves if name in ("ours", "flex", "bias") else leaves[:3]
            with_grad = [t.detach().requires_grad_() for t in given]
            try:
                forward = elapsed_ms(functools.partial(run, *given))
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                out = run(*with_grad)
                torch.autograd.grad(out, with_grad, do, retain_graph=True)
                peak[name] = torch.cuda.max_memory_allocated() - before
                gradient = functools.partial(torch.autograd.grad, out, with_grad, do, retain_graph=True)
                times[name].append((forward, elapsed_ms(gradient)))
            except Exception as error:
                text = str(error).splitlines()[0][:100] if str(error) else ""
                print(f"# {name}: {type(error).__name__}: {text}", file=sys.stderr)
    medians = {
        name: (statistics.median(t[0] for t in rows), statistics.median(t[1] for t in rows))
        for name, rows in times.items()
        if rows
    }
    return medians, peak


def measure(problem: Problem, with_flex: bool) -> Measured:
    """``problem`` by every way that can do it; ours only where it equals float64 under the rule."""
    n = problem.shape[2]
    is_equal = equal(problem)
    captures = [c.to(torch.bfloat16) if i in problem.grads else c for i, c in enumerate(problem.captures(n))]
    maps = maps_of(problem, captures, n)
    *leaves, do = tensors(problem.shape)
    leaves += [captures[i] for i in problem.grads]
    ways: dict[str, Way] = {}
    if is_equal:
        ways["ours"] = ours(problem, captures, maps)
    if problem.causal is not None:
        ways["flash"] = sdpa(problem, SDPBackend.FLASH_ATTENTION)
        ways["cudnn"] = sdpa(problem, SDPBackend.CUDNN_ATTENTION)
    if problem.varlen:
        ways["varlen"] = varlen(captures[0][0])
    if problem.bias is not None:
        ways["bias"] = sdpa_with_bias(problem, captures)
    if with_flex and problem.flex is not None:
        ways["flex"] = flex(problem, captures)
    ms, peak = interleaved(ways, leaves, do)
    map_ms = elapsed_ms(lambda: maps_of(problem, captures, n)) if maps else 0.0
    return Measured(problem, is_equal, density_of(maps, n), map_ms, ms, peak)


def warm_flex(problem: Problem) -> None:
    """Fill the compiler's disk cache, so that compilations run side by side."""
    _once(problem, flex)


def warm_ours(problem: Problem) -> None:
    """The same of our kernels."""
    n = problem.shape[2]
    _once(problem, lambda problem, captures: ours(problem, captures, maps_of(problem, captures, n)))
    equal(problem)


def _once(problem: Problem, way: Callable[[Problem, Sequence[Tensor]], Way]) -> None:
    """Forward and backward."""
    captures = [
        c.to(torch.bfloat16) if i in problem.grads else c
        for i, c in enumerate(problem.captures(problem.shape[2]))
    ]
    *leaves, do = tensors(problem.shape)
    leaves = [t.requires_grad_() for t in (*leaves, *(captures[i] for i in problem.grads))]
    torch.autograd.grad(way(problem, captures)(*leaves), leaves, do)
