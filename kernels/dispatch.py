"""Who runs a site: one table of variants, what each supports, and why it refuses.

``native`` is chosen where it was measured to be faster than our own kernels (``native.FASTER``).

Selection happens when a graph is compiled and is recorded in the report; at run time the operator
looks its variant up by name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flashfuse.kernels import native
from flashfuse.kernels.spec import AttentionShape, Reason, ScoreProgram

Kernels = Literal["auto", "triton", "native"]
"""Which kernels are asked for on cuda: ``auto`` is what is fastest, ``native`` wherever it can run a site."""


class Implementation(Protocol):
    """A module that runs sites.

    Arrays are those of ``attention_reference``; ``maps`` is empty or ``[kv_map, q_map]`` as
    ``block_map.build`` returns them.  ``forward`` returns ``(out, lse)``, and fills ``highest``, an array
    like lse, with the largest score of each row where it is given.  ``backward`` returns ``[dq, dk, dv,
    *gradients of the captures listed in capture_grads]``; without ``dlse`` nothing depends on lse.
    ``dropout_mask`` is the keep mask [B, H, Sq, Skv] that a given seed draws, for checks.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: Sequence[Tensor],
        ints: Sequence[int],
        maps: Sequence[Tensor],
        seed: Tensor | None,
        program: ScoreProgram,
        dropout_p: float,
        highest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        captures: Sequence[Tensor],
        ints: Sequence[int],
        maps: Sequence[Tensor],
        seed: Tensor | None,
        program: ScoreProgram,
        dropout_p: float,
        capture_grads: Sequence[int],
        dlse: Tensor | None = None,
    ) -> list[Tensor]: ...

    def dropout_mask(self, seed: Tensor, dropout_p: float, sizes: tuple[int, int, int, int]) -> Tensor: ...


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name, module: what graphs and reports call it, and the :class:`Implementation`.
        needs_block_map: whether its sites come with the map of their mask.
        refuse: the reason that it cannot run a site, or ``None``.
        defer: the reason that a later row is the better choice, or ``None``; not asked of a variant that
            the user asks for.
        repeatable: whether two runs give the same bits in the output and dq, dk, dv.
    """

    name: str
    module: str
    needs_block_map: bool
    refuse: Callable[[AttentionShape, ScoreProgram, float, torch.device], Reason | None]
    defer: Callable[[AttentionShape, ScoreProgram, torch.device], Reason | None] | None = None
    repeatable: bool = True


def _refuse_triton(
    shape: AttentionShape, program: ScoreProgram, dropout_p: float, device: torch.device
) -> Reason | None:
    if device.type != "cuda":
        return Reason("device", f"the Triton kernels run on cuda, the site is on {device.type}")
    if shape.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return Reason("dtype", f"the Triton kernels take bfloat16, float16 and float32, not {shape.dtype}")
    for name, size in (("head_dim", shape.head_dim), ("v_head_dim", shape.v_head_dim)):
        if not isinstance(size, int) or size % 8 or not 8 <= size <= 256:
            return Reason("head_dim", f"the Triton kernels take {name} of 8, 16, …, 256, not {size}")
    return None


def _refuse_cpu(
    shape: AttentionShape, program: ScoreProgram, dropout_p: float, device: torch.device
) -> Reason | None:
    if device.type != "cpu":
        return Reason("device", f"the CPU variant runs on cpu, the site is on {device.type}")
    if shape.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return Reason("dtype", f"the CPU variant takes real floating dtypes, not {shape.dtype}")
    return None


VARIANTS: tuple[Variant, ...] = (
    Variant("native", "flashfuse.kernels.native", False, native.refuse, native.prefer_ours, False),
    Variant("triton", "flashfuse.kernels.triton_attention", True, _refuse_triton),
    Variant("cpu", "flashfuse.kernels.cpu", False, _refuse_cpu),
)
"""In order of preference."""
TUNED = Variant("triton_tuned", "flashfuse.kernels.tuned", True, _refuse_triton)
"""``triton`` with tiles that are timed at the first call, where the user asks for it."""


@dataclass(frozen=True)
class Selection:
    """The chosen variant, and why the ones before it in the table were not."""

    variant: Variant
    refused: tuple[tuple[str, Reason], ...]


def select(
    shape: AttentionShape,
    program: ScoreProgram,
    dropout_p: float,
    device: torch.device,
    kernels: Kernels = "auto",
) -> Selection | Reason:
    """The first variant of the table that can run the site and is to, or the reason that none can."""
    refused: list[tuple[str, Reason]] = []
    for variant in VARIANTS:
        reason = variant.refuse(shape, program, dropout_p, device)
        if reason is None and variant.name == "native" and kernels == "triton":
            reason = Reason("option", 'the option kernels="triton" asks for our own')
        if reason is None and variant.defer is not None and variant.name != kernels:
            reason = variant.defer(shape, program, device)
        if reason is None:
            return Selection(variant, tuple(refused))
        refused.append((variant.name, reason))
    # Where no kernel of our own runs a site, what PyTorch's lack is beside the point.
    relevant = [reason for name, reason in refused if reason.code != "device" and name != "native"]
    return (
        relevant[0]
        if relevant
        else Reason("device", f"no kernel runs on {device.type}", hint="use cpu or cuda")
    )


def tuned(selection: Selection) -> Selection:
    """``selection`` with :data:`TUNED` in the place of the Triton variant."""
    return replace(selection, variant=TUNED) if selection.variant.name == "triton" else selection


_MODULES = {variant.name: variant.module for variant in (*VARIANTS, TUNED)}


@functools.cache
def implementation(name: str) -> Any:
    """The module that runs variant ``name`` (see :class:`Implementation`), imported on first use."""
    return importlib.import_module(_MODULES[name])
