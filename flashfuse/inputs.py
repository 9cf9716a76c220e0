"""What a site is fed: random inputs, and hostile ones.

Covered at each site: scores of ±10⁴, ties, subnormal numbers, storage that is transposed, broadcast or
has gaps; and where a mask is data, rows with one key only, rows with none, and −inf in tensors that
are added to the scores.  Sizes are the site's own.  Odd lengths are covered by the proof, whose sizes
are odd, and by the tests of the kernels.

Left out are the two places where −inf in an added tensor is known to be answered differently: rows
whose every key is −inf by such a tensor (eager's dq and dk are NaN there, a fused backward's are
finite), and −inf in rows that a finite mask empties as well (eager gives such keys no weight, a
``uniform`` program gives all keys the same).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashfuse.kernels.expr import Expr, selects
from flashfuse.kernels.reference import environment, evaluate
from flashfuse.proof.key import BESIDE

if TYPE_CHECKING:
    from flashfuse.site import Site

Draw = Callable[[Any, torch.Generator], Any]
"""Makes a real input from an example (fake) one."""


@dataclass(frozen=True)
class InputSet:
    """One set of inputs of a site.

    Attributes:
        cancels: gradients are differences of larger numbers: an eager softmax cancels exactly where a row
            has one weight, a fused backward to a rounding.
        flushes: GPUs may take the numbers for 0.
        may_not_run: the original itself may refuse these inputs.
    """

    name: str
    inputs: list[Any]
    cancels: bool = False
    flushes: bool = False
    may_not_run: bool = False


def input_sets(site: Site) -> Iterator[InputSet]:
    """Every set that says something about ``site``."""
    yield InputSet("", site.random_inputs())
    huge = scaled(_factor_of_huge(site))
    rows = [name for name in site.names if name in ("q", "k") or BESIDE.match(name)]
    yield InputSet("scores of 1e4", site.random_inputs(dict.fromkeys(rows, huge)), cancels=True)
    yield InputSet("ties", site.random_inputs(dict.fromkeys(rows, scaled(0))))
    yield InputSet("subnormal", site.random_inputs(dict.fromkeys("qkv", subnormal)), flushes=True)
    # Not k or v: keys or values that are all alike have gradients that an eager softmax cancels to 0.
    strides: dict[str, Draw] = {"q": broadcast, "k": transposed, "v": gapped}
    yield InputSet("other strides", site.random_inputs(strides), may_not_run=True)
    yield from _stored_masks(site)
    yield from _infinite(site)


# --- draws --------------------------------------------------------------------------------------


def normal(example: Any, generator: torch.Generator) -> Any:
    """Normal numbers, and truth with probability 0.7, in the layout of ``example``."""
    return _drawn(example, generator, 1.0)


def scaled(factor: float) -> Draw:
    return lambda example, generator: _drawn(example, generator, factor)


def subnormal(example: Tensor, generator: torch.Generator) -> Tensor:
    return _drawn(example, generator, torch.finfo(example.dtype).smallest_normal / 4)


def transposed(example: Tensor, generator: torch.Generator) -> Tensor:
    """The last two dimensions lie the other way round in memory."""
    drawn = normal(example, generator)
    return drawn if drawn.dim() < 2 else drawn.mT.contiguous().mT


def broadcast(example: Tensor, generator: torch.Generator) -> Tensor:
    """All along the first dimension is one piece of memory."""
    drawn = normal(example, generator)
    dim = next((d for d, n in enumerate(drawn.shape) if n > 1), 0)
    return drawn.narrow(dim, 0, 1).expand(drawn.shape) if drawn.dim() else drawn


def gapped(example: Tensor, generator: torch.Generator) -> Tensor:
    """Every other element of memory."""
    drawn = normal(example, generator)
    return torch.stack((drawn, drawn), -1)[..., 0]


def _drawn(example: Any, generator: torch.Generator, scale: float) -> Any:
    if not isinstance(example, Tensor):
        return int(example)
    sizes = _own_sizes(example)
    if not example.is_floating_point():
        return _laid_out(torch.rand(sizes, generator=generator) < 0.7, example)
    return _laid_out(torch.randn(sizes, generator=generator, dtype=torch.float64) * scale, example)


def _own_sizes(example: Tensor) -> list[int]:
    """Sizes in memory: broadcast dimensions have one element."""
    return [1 if stride == 0 else n for n, stride in zip(example.shape, example.stride(), strict=True)]


def _laid_out(drawn: Tensor, example: Tensor) -> Tensor:
    """``drawn`` with the order of dimensions in memory, the dtype and the device of ``example``."""
    strides = example.stride()
    order = sorted(range(drawn.dim()), key=lambda d: (-strides[d], d))
    laid_out = drawn.permute(order).contiguous().permute([order.index(d) for d in range(drawn.dim())])
    return laid_out.to(example.device, example.dtype).expand(example.shape)


def _factor_of_huge(site: Site) -> float:
    """What q and k are multiplied by for the largest score to be about 10⁴.

    The product of q and k itself stays in the range of the dtype, which float16 has little of.
    """
    q, k, _, captures, ints = site.arguments(site.random_inputs())[:5]
    sizes = (*q.shape[:3], k.shape[2])
    products = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    env = environment(site.program, captures, ints, sizes, q.device) | {"s": products}
    scores = torch.as_tensor(evaluate(site.program.score, env))
    room = torch.finfo(site.computed_in).max / 2 / float(products.abs().max())
    wanted = 1e4 / float(scores[scores.isfinite()].abs().max())
    return min(100.0, math.sqrt(room), math.sqrt(wanted)) if wanted > 1 else 1.0


# --- rows of one key, and of none ---------------------------------------------------------------


def _constant(value: float) -> Draw:
    return lambda example, _: _laid_out(torch.full(_own_sizes(example), value), example)


def _first(first: float, rest: float, dim: int = -1) -> Draw:
    """``first`` at index 0 of ``dim``, ``rest`` elsewhere."""

    def fill(example: Tensor, _: torch.Generator) -> Tensor:
        filled = torch.full(_own_sizes(example), rest)
        if filled.dim():
            filled.select(dim, 0).fill_(first)
        return _laid_out(filled, example)

    return fill


def _stored_masks(site: Site) -> Iterator[InputSet]:
    """Rows without a key, and rows with one, where the stored masks can bring that about."""
    names = [name for name in site.program.mask_program.captures if name in site.names]
    if not names:
        return
    wanted = {"rows without a key": 0, "one key only": 1}
    # Whether a mask says what is allowed or what is not is seen from what it does.
    for pattern in (_constant(0), _constant(1), _first(1, 0), _first(0, 1)):
        inputs = site.random_inputs(dict.fromkeys(names, pattern))
        allowed, _ = _rows(site, inputs)
        counts = allowed.sum(-1)
        for name, count in list(wanted.items()):
            if bool((counts == count).any()) and bool((counts <= max(count, 1)).all()):
                del wanted[name]
                yield InputSet(name, inputs, cancels=count == 1)
                break


def _rows(site: Site, inputs: list[Any]) -> tuple[Tensor, Tensor]:
    """Which keys [B, H, Sq, Skv] the mask allows, and for which the tensors added are finite."""
    program = site.program
    q, k, _, captures, ints = site.arguments(inputs)[:5]
    sizes = (*q.shape[:3], k.shape[2])
    env = environment(program, captures, ints, sizes, q.device) | {"s": q.new_zeros(1, 1, 1, 1)}
    mask: Any = True if program.mask is None else evaluate(program.mask, env)
    scores = torch.as_tensor(evaluate(program.score, env), device=q.device)
    allowed = torch.as_tensor(mask, device=q.device) != 0
    return allowed.expand(sizes), (scores != -math.inf).expand(sizes)


# --- −inf in tensors that are added ---------------------------------------------------------------


def _added(e: Expr) -> set[str]:
    """Tensors that are terms of the score; not tables of which stored positions select rows."""
    if e.op == "+":
        return set().union(*map(_added, e.operands))
    return {e.args[0]} if e.op == "load" and not selects(e) else set()


def _sprinkled(share: float) -> Draw:
    def fill(example: Tensor, generator: torch.Generator) -> Tensor:
        drawn = normal(example, generator)
        out = torch.rand(_own_sizes(example), generator=generator) < share
        return _laid_out(drawn[tuple(slice(n) for n in out.shape)].cpu().masked_fill(out, -math.inf), example)

    return fill


def _infinite(site: Site) -> Iterator[InputSet]:
    """−inf here and there, and everywhere but at one key."""
    examples = dict(zip(site.names, site.examples, strict=True))
    names = [
        n for n in sorted(_added(site.program.score)) if n in examples and examples[n].is_floating_point()
    ]
    if not names:
        return
    masks = [name for name in site.program.mask_program.captures if name in site.names and name not in names]
    rank = max(examples[name].dim() for name in names)
    here_and_there = [_sprinkled(share) for share in (0.3, 0.1)]
    one_key = [_first(1.0, -math.inf, dim - rank) for dim in range(rank)]
    for title, draws in (("-inf in added tensors", here_and_there), ("-inf at all keys but one", one_key)):
        for draw, pattern in ((d, p) for d in draws for p in (normal, _constant(0), _constant(1))):
            if draw in one_key and any(one_key.index(draw) < rank - examples[n].dim() for n in names):
                continue
            inputs = site.random_inputs(dict.fromkeys(names, draw) | dict.fromkeys(masks, pattern))
            if _answered_alike(site, inputs, one_key=draw in one_key):
                yield InputSet(title, inputs, cancels=draw in one_key)
                break


def _answered_alike(site: Site, inputs: list[Any], one_key: bool) -> bool:
    allowed, finite = _rows(site, inputs)
    live, dead = (allowed & finite).sum(-1), ~allowed.any(-1)
    alike = bool(((live > 0) | dead).all()) and not (site.program.dead_rows == "uniform" and bool(dead.any()))
    return alike and not bool(finite.all()) and (not one_key or bool((live <= 1).all()))
