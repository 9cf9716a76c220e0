"""Sites that the kernel tests share, and the comparison of a variant with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels import block_map
from flashfuse.kernels.reference import attention_reference, max_reference
from flashfuse.kernels.spec import NAN, ScoreProgram, differentiable_loads
from flashfuse.numbers import compare
from flashfuse.report import CheckItem
from flashfuse.site import magnitudes


@dataclass(frozen=True)
class Case:
    """One site: sizes, program, and how its captures are made from (B, H, Sq, Skv)."""

    program: str
    sizes: tuple[int, int, int, int]
    kv_heads: int = 1
    dims: tuple[int, int] = (40, 40)
    captures: Callable[[int, int, int, int], Sequence[Tensor]] = lambda b, h, sq, skv: ()
    ints: tuple[int, ...] = ()
    grads: tuple[int, ...] = ()
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    layout: str = "bshd"
    aux: bool = False
    """The row maximum is asked for too, and lse has a gradient."""

    def __str__(self) -> str:
        sizes = "x".join(map(str, (*self.sizes, self.kv_heads, *self.dims)))
        aux = "|aux" if self.aux else ""
        return f"{self.program}|{sizes}|{str(self.dtype)[6:]}|p{self.dropout_p}{aux}"


def left_pad(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[B, Skv]: the first keys of every other sequence are padding."""
    start = torch.tensor([0, skv // 3] * b)[:b]
    return [torch.arange(skv)[None] >= start[:, None]]


def right_pad(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    end = torch.tensor([skv, skv - skv // 4] * b)[:b]
    return [torch.arange(skv)[None] < end[:, None]]


def documents(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    return [(torch.arange(max(sq, skv)) // (1 + max(sq, skv) // 3)).expand(b, -1).contiguous()]


def hostile_bias(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[B, 1, Sq, Skv] with −inf, the finite minimum and ±1e4, in parts and in whole rows."""
    bias = torch.zeros(b, 1, sq, skv)
    least = torch.finfo(torch.bfloat16).min
    bias[0, 0, :, : skv // 4] = least
    bias[0, 0, sq // 2] = least
    bias[-1, 0, sq // 3] = -torch.inf
    bias[-1, 0, :, skv // 2] = -torch.inf
    bias[-1, 0, sq // 4] = 1e4
    bias[-1, 0, sq // 5] = -1e4
    return [bias]


def looked_up(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[9, H], and [Sq, Skv] places in it, some from its end."""
    return [torch.randn(9, h), torch.randint(-9, 9, (sq, skv))]


def last_is_dead(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[H, Sq]: the last query of the last head sees no key, others see all."""
    last = torch.full((h, sq), -1)
    last[-1, -1] = skv
    return [last]


def sinks(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[H]"""
    return [torch.randn(h)]


def window_by_head(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[H]: the first key of each head."""
    return [torch.randint(1, skv, (h,))]


def mostly_padding(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[B, Skv]: the first sequence is long enough for its last queries only."""
    start = torch.tensor([skv - sq + 1] + [0] * b)[:b]
    return [torch.arange(skv)[None] >= start[:, None]]


def hostile_sinks(b: int, h: int, sq: int, skv: int) -> list[Tensor]:
    """[H]: absent, far below, far above, and two ordinary ones."""
    return [torch.tensor([-torch.inf, -1e4, 1e4, 0.3, -2.0, torch.finfo(torch.float32).min])[:h]]


def run_case(
    implementation: Any, case: Case, device: str, seed: int = 0, draws: int = 1, forward_only: bool = False
) -> None:
    """Forward, backward and capture gradients of ``case`` against float64 under the rule.

    Several ``draws`` are taken together: the largest rounding of a few rows is as much luck as anything.
    """
    from tolerance import assert_equal_under_rule  # a helper beside this one, loaded after it

    for name, *tensors in _stacked(implementation, case, device, seed, draws, forward_only):
        assert_equal_under_rule(*tensors, f"{case}: {name}")


def measure_case(
    implementation: Any, case: Case, device: str, seed: int = 0, draws: int = 1
) -> list[CheckItem]:
    """What :func:`run_case` compares, by name, with the error and what the rule allows of it.

    As where a site is checked, the rounding of terms is allowed where they cancel each other.
    """
    allowed = [_inherent(implementation, case, device, seed + i) for i in range(draws)]
    return [
        compare(name, *tensors, max(of_draw.get(name, 0.0) for of_draw in allowed))
        for name, *tensors in _stacked(implementation, case, device, seed, draws)
    ]


def _inherent(implementation: Any, case: Case, device: str, seed: int) -> dict[str, float]:
    """By name: the size of what is rounded where terms cancel, as if in the dtype of the case.

    Gradients of the scores of a single key are exactly 0; where weights are 0 or 1 they are nearly so, and
    float32 is what they are computed in; a sink's is a sum over rows, of roundings of independent signs.
    """
    (q, k, v, _), (captures, ints, _, _, program, _), _ = site_of(implementation, case, device, seed)
    names = [program.captures[i] for i in case.grads]
    of_sink = differentiable_loads(program.sink) if program.sink is not None else frozenset()
    exact = torch.finfo(torch.float32).eps / torch.finfo(case.dtype).eps
    if case.sizes[3] == 1:
        factors = dict.fromkeys(("q", "k", *names), 1.0)
    elif exact < 1:
        factors = dict.fromkeys(("q", "k", *names), exact)
    else:
        rows = q[..., 0].numel()
        shrinks = {n: rows / c.numel() for n, c in zip(program.captures, captures, strict=True)}
        factors = {n: max(1.0, shrinks[n]) ** -0.5 for n in names if n in of_sink}
    if not factors:
        return {}
    q, k, v = (t.float() for t in (q, k, v))
    captures = [c.float() if c.is_floating_point() else c for c in captures]
    found = magnitudes(q, k, v, captures, ints, program, of_scores=False)
    return {f"d{name}": factor * found.get(name, 0.0) for name, factor in factors.items()}


def _stacked(
    implementation: Any, case: Case, device: str, seed: int, draws: int, forward_only: bool = False
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    runs = [_results(implementation, case, device, seed + i, forward_only) for i in range(draws)]
    for of_name in zip(*runs, strict=True):
        names, ours, original, exact = zip(*of_name, strict=True)
        yield names[0], torch.stack(ours), torch.stack(original), torch.stack(exact)


def site_of(
    implementation: Any, case: Case, device: str, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Any, ...], Tensor | None]:
    """(q, k, v, do), the arguments of ``forward`` that follow q, k and v, and the keep mask of dropout."""
    torch.manual_seed(seed)
    program = ScoreProgram.parse(case.program)
    b, h, sq, skv = case.sizes
    d, dv = case.dims
    q = _tensor((b, h, sq, d), case, device)
    k = _tensor((b, case.kv_heads, skv, d), case, device)
    v = _tensor((b, case.kv_heads, skv, dv), case, device)
    do = _tensor((b, h, sq, dv), case, device)
    captures = [c.to(device) for c in case.captures(b, h, sq, skv)]
    captures = [c.to(case.dtype) if i in case.grads else c for i, c in enumerate(captures)]
    keep, key = None, None
    if case.dropout_p:
        key = torch.tensor([(seed + 1) * 0x9E3779B97F4A], device=device)
        keep = implementation.dropout_mask(key, case.dropout_p, case.sizes)
    maps = []
    if program.mask is not None:
        mask = program.mask_program
        values = dict(zip(program.captures, captures, strict=True))
        numbers = dict(zip(program.ints, case.ints, strict=True))
        maps = block_map.build(
            [values[n] for n in mask.captures], [numbers[n] for n in mask.ints], q.device, case.sizes, mask
        )
    site = (captures, case.ints, maps, key, program, case.dropout_p)
    return (q, k, v, do), site, keep


def _results(
    implementation: Any, case: Case, device: str, seed: int, forward_only: bool
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, ours, the original's and the exact value of each output and gradient."""
    (q, k, v, do), site, keep = site_of(implementation, case, device, seed)
    captures, program = site[0], site[4]
    extra: tuple[Tensor, ...] = ()
    dlse = None
    if case.aux:
        extra = (torch.full(q.shape[:3], torch.nan, device=device, dtype=_dtype_of_rows(q)),)
        dlse = torch.randn(extra[0].shape, device=device).to(extra[0].dtype)
    out, lse = implementation.forward(q, k, v, *site, *extra)
    grads = []
    if not forward_only:
        grads = implementation.backward(
            do, q, k, v, out, lse, *site, case.grads, *(() if dlse is None else (dlse,))
        )

    def reference(dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        wanted = [captures[i].detach().to(dtype).requires_grad_() for i in case.grads]
        given = list(captures)
        for i, t in zip(case.grads, wanted, strict=True):
            given[i] = t
        expected, logs = attention_reference(*inputs, given, case.ints, program, case.dropout_p, keep)
        outputs = [expected.detach(), logs.detach()]
        if case.aux:
            outputs.append(max_reference(*inputs[:2], given, case.ints, program).detach())
        if forward_only:
            return outputs
        roots, slopes_of = [expected], [do.to(dtype)]
        if dlse is not None:
            roots, slopes_of = [expected, logs], [do.to(dtype), dlse.to(logs.dtype)]
        slopes = torch.autograd.grad(roots, [*inputs, *wanted], slopes_of, allow_unused=True)
        filled = [
            torch.zeros_like(t) if g is None else g for t, g in zip([*inputs, *wanted], slopes, strict=True)
        ]
        return [*outputs, *filled]

    # PyTorch's product of bfloat16 on some CPUs has NaN in rows beside the one that has it.
    exact_rows = device != "cpu" or program.dead_rows not in NAN
    with torch.backends.mkldnn.flags(enabled=exact_rows, allow_tf32=None):
        exact, original = reference(torch.float64), reference(case.dtype)
    aux = ["max"] if case.aux else []
    names = ["out", "lse", *aux, "dq", "dk", "dv", *(f"d{program.captures[i]}" for i in case.grads)]
    results = [out, lse, *extra, *grads]
    return [
        (name, ours, o.to(ours.dtype), e)
        for name, ours, e, o in zip(names[: len(results)], results, exact, original, strict=True)
    ]


def _dtype_of_rows(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _tensor(shape: tuple[int, ...], case: Case, device: str) -> Tensor:
    b, h, s, d = shape
    if case.layout == "bshd":
        return torch.randn(b, s, h, d, device=device).to(case.dtype).transpose(1, 2)
    if case.layout == "packed":
        # A slice of a fused qkv projection: rows are further apart than they are long.
        return torch.randn(b, s, 3, h, d, device=device).to(case.dtype)[:, :, 1].transpose(1, 2)
    if case.layout == "offset":
        # Behind one element more, so that no address is a multiple of 16 bytes.
        return (
            torch.randn(b * s * h * d + 1, device=device).to(case.dtype)[1:].view(b, s, h, d).transpose(1, 2)
        )
    return torch.randn(b, h, s, d, device=device).to(case.dtype)
