"""A zoo of attention spellings: what must be found, and its twins that must be left alone.

Each specimen is a function of tensors as people write it.  ``fused`` ones say the program that must
be recovered; ``left`` ones say the code of the reason, or that nothing is reported.  Specimens of one
``family`` differ in a detail that matters, so every family holds both kinds (see ``test_zoo``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

B, H, S, D = 2, 3, 7, 16
"""Sizes of most specimens: all different, and S is odd."""

SCALE = D**-0.5


@dataclass(frozen=True)
class Specimen:
    """One spelling.

    Attributes:
        inputs: makes the arguments, after ``torch.manual_seed``.
        programs: text of the program of each site, in graph order.
        code: of the reason for leaving it alone; ``""`` where nothing may be reported.
        captures: in which the spelling exists: ``dynamo``, ``symbolic`` (``fx.symbolic_trace``),
            ``export`` (training dialect), ``decomposed`` (inference dialect).
    """

    family: str
    run: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    programs: tuple[str, ...] = ()
    code: str | None = None
    dropout_p: float = 0.0
    group: int = 1
    captures: tuple[str, ...] = ("dynamo", "symbolic", "export", "decomposed")

    @property
    def name(self) -> str:
        return self.run.__name__

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


SPECIMENS: list[Specimen] = []

DYNAMO = ("dynamo", "export", "decomposed")
"""Spellings whose Python (sizes, ``in``) ``fx.symbolic_trace`` cannot follow."""

WHOLE = ("dynamo", "symbolic", "export")
"""Spellings that the inference dialect takes apart into something else."""


def randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


def qkv(q: Sequence[int] = (B, H, S, D), kv: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    kv = q if kv is None else kv
    return randn(*q), randn(*kv), randn(*kv)


def with_bias(*sizes: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*qkv(), randn(*sizes))


def with_mask(*sizes: int) -> Callable[[], tuple[Tensor, ...]]:
    """q, k, v and a boolean mask whose rows all have a key."""

    def make() -> tuple[Tensor, ...]:
        mask = torch.rand(*sizes) < 0.6
        mask[..., 0] = True
        return (*qkv(), mask)

    return make


def with_padding(dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """q, k, v and [B, S] padding: the last keys of every other sequence are padding."""

    def make() -> tuple[Tensor, ...]:
        pad = torch.arange(S)[None] < torch.tensor([S, S - 2])[:, None]
        return (*qkv(), pad.to(dtype))

    return make


def fused(
    family: str, *programs: str, inputs: Callable[[], tuple[Any, ...]] = qkv, **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a spelling that must be fused, to ``programs``."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        SPECIMENS.append(Specimen(family, run, inputs, programs, **fields))
        return run

    return register


def left(
    family: str, code: str = "", inputs: Callable[[], tuple[Any, ...]] = qkv, **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a near miss that must be left alone, for the reason ``code``."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        SPECIMENS.append(Specimen(family, run, inputs, (), code, **fields))
        return run

    return register


softmax = functools.partial(torch.softmax, dim=-1)
