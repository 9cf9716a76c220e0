"""What stands between autograd and an operator.

``torch.library.register_autograd`` flattens arguments, results and gradients as trees at every call of an
operator that takes lists of tensors, and runs what is below through the dispatcher once more.  On a small
problem that was most of what a call cost on the host.  Here the lists are flattened by hand, and tensors
with nothing between autograd and their device go to the device's kernel straight away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

Run = Callable[[tuple[Any, ...]], Any]
"""Runs an operator on its arguments, below autograd."""

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
# Operators that make no views and write to nothing have no business with ADInplaceOrView.
_TO_LOOK_AT = (_BELOW_AUTOGRAD - DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr()
_PLAIN = frozenset(DispatchKeySet(key).raw_repr() for key in (DispatchKey.CPU, DispatchKey.CUDA))


def register(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    leading: int,
    function: type[torch.autograd.Function],
) -> None:
    """Registers ``function`` as the autograd of the operator ``name``, which ``kernel`` runs on CPU and CUDA.

    The tensors that may require gradients are the operator's first ``leading`` arguments and the list of
    tensors that follows them.  Where one does, ``function.apply(run, args, *tensors)`` is called, where
    ``run(args)`` is the operator below autograd; else that alone.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default

    def run(keyset: DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            # Tracing, fake tensors, modes, transforms and lazy conjugation have keys of their own.
            if keyset.raw_repr() & _TO_LOOK_AT in _PLAIN:
                return kernel(*args)
            return op.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    def differentiable(keyset: DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            tensors = (*args[:leading], *args[leading])
            if forward_ad._current_level >= 0:
                _refuse_tangents(name, tensors)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
                return function.apply(functools.partial(run, keyset), args, *tensors)
        return run(keyset, args)

    library.impl(name, differentiable, "Autograd", with_keyset=True)


class NoSecondDerivative(torch.autograd.Function):
    """An operator that computes gradients: what asks for theirs is told so, instead of missing a part."""

    @staticmethod
    def forward(ctx: Any, run: Run, args: tuple[Any, ...], *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(args))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "flashfuse: the gradients of fused attention cannot be differentiated again; "
            "where second derivatives are needed, run the model as it was"
        )


def _refuse_tangents(name: str, tensors: tuple[Tensor, ...]) -> None:
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"flashfuse::{name} has no forward-mode derivative; use reverse mode")
