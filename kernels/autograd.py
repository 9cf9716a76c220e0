"""What stands between autograd and an operator.

``torch.library.register_autograd`` flattens arguments, results and gradients as trees at every call of an
operator that takes lists of tensors, and runs what is below through the dispatcher once more.  On a small
problem that was most of what a call cost on the host.  Here the lists are flattened by hand, and tensors
with nothing between autograd and their device go to the device's kernel straight away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

Run = Callable[[tuple[Any, ...]], Any]
"""Runs an operator on its arguments, below autograd."""

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
# Operators that make no views and write to nothing have no business with ADInplaceOrView, and those that are
# given tensors none with BackendSelect.
_OF_NO_EFFECT = DispatchKeySet(DispatchKey.ADInplaceOrView) | DispatchKeySet(DispatchKey.BackendSelect)
_TO_LOOK_AT = (_BELOW_AUTOGRAD - _OF_NO_EFFECT).raw_repr()
_PLAIN = frozenset(DispatchKeySet(key).raw_repr() for key in (DispatchKey.CPU, DispatchKey.CUDA))
_ORDINARY = frozenset({Tensor, torch.nn.Parameter, type(None)})


def is_plain(*tensors: Tensor) -> bool:
    """No trace, fake tensor, mode or transform stands between an operator on ``tensors`` and their device."""
    if torch.compiler.is_compiling():
        return False
    keyset = torch._C._dispatch_tls_local_include_set()
    for tensor in tensors:
        keyset = keyset | torch._C._dispatch_keys(tensor)
    return keyset.raw_repr() & _TO_LOOK_AT in _PLAIN


def register(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    leading: int,
    function: type[torch.autograd.Function],
) -> None:
    """Registers ``function`` as the autograd of the operator ``name``, which ``kernel`` runs on CPU and CUDA.

    The tensors that may require gradients are the operator's first ``leading`` arguments and the list of
    tensors that follows them.  Where one does, ``function.apply(run, plain, args, *tensors)`` is called:
    ``run(args)`` is the operator below autograd, and ``plain`` says that nothing lies between.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default
    # What ``function.apply`` comes to where there is nothing of transforms of functions, which it looks for.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def straight(args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)

    def dispatched(keyset: DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _BELOW_AUTOGRAD, *args)

    def differentiable(keyset: DispatchKeySet, *args: Any) -> Any:
        # Tracing, fake tensors, modes, transforms and lazy conjugation have keys of their own.
        plain = keyset.raw_repr() & _TO_LOOK_AT in _PLAIN
        run = straight if plain else functools.partial(dispatched, keyset)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            tensors = (*args[:leading], *args[leading])
            if forward_ad._current_level >= 0:
                _refuse_tangents(name, tensors)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
                ordinary = plain and not torch._C._are_functorch_transforms_active()
                return (apply if ordinary else function.apply)(run, plain, args, *tensors)
        return run(args)

    library.impl(name, differentiable, "Autograd", with_keyset=True)


def backward_of(op: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, which ``kernel`` runs, for a backward: a function of ``(plain, saved, gradient, *rest)``.

    ``op(gradient, *rest)`` goes straight to ``kernel`` where nothing lies between: what is ``saved`` was
    ``plain`` in the forward, so is the gradient, and nothing is active that wants to see operators.
    """

    def call(plain: bool, saved: Sequence[Tensor | None], gradient: Tensor, *rest: Any) -> Any:
        # Hooks on saved tensors may have given back tensors of another type.
        ordinary = plain and _ORDINARY.issuperset(map(type, saved))
        if ordinary and not torch.is_grad_enabled() and is_plain(gradient):
            with torch._C._AutoDispatchBelowAutograd():
                return kernel(gradient, *rest)
        return op(gradient, *rest)

    return call


class NoSecondDerivative(torch.autograd.Function):
    """An operator that computes gradients: what asks for theirs is told so, instead of missing a part."""

    @staticmethod
    def forward(ctx: Any, run: Run, plain: bool, args: tuple[Any, ...], *_: Tensor) -> tuple[Tensor, ...]:
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
