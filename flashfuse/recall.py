"""Graphs of ``flashfuse.attention`` that are known without asking Dynamo.

Dynamo looks at all that a graph may depend on at each call, which costs more than the attention of a small
problem.  Where both functions are made of nothing but their arguments, constants and methods, as most masks
are, a graph depends on little else than sizes: :func:`key` says on what, and a graph that was run once under
a key is run again.  Everything else (closures, globals, autocast, modes, transforms, subclasses of tensors)
has no key and goes through Dynamo, so that a changed number or tensor is seen.
"""

from __future__ import annotations

import dis
import functools
import threading
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashfuse.kernels.autograd import is_plain

_OWN = ("LOAD_FAST", "LOAD_CONST", "LOAD_ATTR", "LOAD_METHOD")
"""What may be loaded: arguments and variables, constants, and attributes of these."""

_graphs: dict[Hashable, Callable[[Sequence[Tensor]], Tensor]] = {}
_MOST_GRAPHS = 256
_run = threading.local()


def key(tensors: Sequence[Tensor], functions: Sequence[Any], numbers: Sequence[Any]) -> Hashable | None:
    """All that the graph of a call depends on, or ``None`` where it may depend on more."""
    codes = []
    for function in functions:
        if function is not None:
            if type(function) is not types.FunctionType or not _is_pure(function.__code__):
                return None
            if function.__defaults__ or function.__kwdefaults__:
                return None
        codes.append(None if function is None else function.__code__)
    for number in numbers:
        if number is not None and type(number) not in (int, float):
            return None
    query, key, value = tensors
    if type(query) is not Tensor or type(key) is not Tensor or type(value) is not Tensor:
        return None
    device = query.device
    if torch.is_autocast_enabled(device.type) or torch._C._is_torch_function_mode_enabled():
        return None
    if not is_plain(query, key, value):
        return None
    state = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    return (
        *(*codes, *numbers, device, key.device, value.device, *state),
        torch.are_deterministic_algorithms_enabled(),
        # Dynamo gives a graph each tensor once.
        *(query is key, query is value, key is value),
        *(query.shape, query.stride(), query.dtype, query.requires_grad),
        *(key.shape, key.stride(), key.dtype, key.requires_grad),
        *(value.shape, value.stride(), value.dtype, value.requires_grad),
    )


@functools.lru_cache(maxsize=256)
def _is_pure(code: types.CodeType) -> bool:
    """Nothing is read from around a function of this code, and it makes no functions or classes."""
    if code.co_freevars or any(isinstance(c, types.CodeType) for c in code.co_consts):
        return False
    loads = (i.opname for i in dis.get_instructions(code) if i.opname.startswith(("LOAD_", "IMPORT_")))
    return all(name.startswith(_OWN) for name in loads)


def find(key: Hashable | None) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """The graph that was kept under ``key``, as a function of the three tensors."""
    return None if key is None else _graphs.get(key)


def noted(gm: fx.GraphModule) -> Callable[..., Any]:
    """``gm``, whose last run is noted for :func:`keep`."""

    forward = gm.forward

    def run(*arguments: Any) -> Any:
        results = forward(*arguments)
        _run.last = forward, arguments, results
        return results

    return run


def forget() -> None:
    """The next :func:`keep` is not of a run before this."""
    _run.last = None


def keep(key: Hashable | None, tensors: Sequence[Tensor], out: object) -> None:
    """Keep under ``key`` the graph that made ``out`` of ``tensors`` in this thread."""
    last, _run.last = _run.last, None
    if key is None or last is None:
        return
    forward, arguments, results = last
    if len(results) != 1 or results[0] is not out:
        return
    places: list[int] = []
    for argument in arguments:
        at = [i for i, t in enumerate(tensors) if t is argument]
        if not at:
            return
        places.append(at[0])

    def again(tensors: Sequence[Tensor]) -> Tensor:
        made: Tensor = forward(*[tensors[i] for i in places])[0]
        return made

    if len(_graphs) >= _MOST_GRAPHS:
        _graphs.clear()
    _graphs[key] = again
