"""How a kernel is launched.

Triton's own path binds and specialises every argument at each call, which costs tens of
microseconds.  A site launches the same kernels with the same numbers every time, so after the first
call :class:`Launches` calls the compiled kernel directly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One launch but for its tensors, which are the kernel's first arguments.

    ``numbers`` follow the tensors and end with the constexprs.
    """

    kernel: Any
    programs: int
    numbers: tuple[Any, ...]
    num_warps: int = 4
    num_stages: int = 1


def launch(what: Launch, *tensors: Any) -> Any:
    """Run ``what``; returns the compiled kernel (``None`` under Triton's interpreter)."""
    return what.kernel[(what.programs,)](
        *tensors,
        *what.numbers,
        num_warps=what.num_warps,
        num_stages=what.num_stages,
        enable_fp_fusion=True,
    )


_NO_GUARD: AbstractContextManager[Any] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _NO_GUARD
    return torch.cuda.device(device)


def direct(compiled: Any, programs: int) -> Callable[..., None]:
    """``compiled`` on ``programs`` programs of the current device, as a function of its arguments.

    What ``compiled[grid]`` asks Triton at each call (the device, its stream's getter, metadata for hooks that
    nobody has set) is asked once.  Where hooks are set, as profilers do, or Triton is made otherwise than
    3.6 to 3.9 are, that way is taken.
    """
    slow: Callable[..., None] = compiled[(programs, 1, 1)]
    try:
        # The module that compiled it knows the driver; this file does not import Triton.
        triton = sys.modules[type(compiled).__module__]
        stream_of, runtime = triton.driver.active.get_current_stream, triton.knobs.runtime
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        hooks = runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls
    except (AttributeError, KeyError):
        return slow
    device = torch.cuda.current_device()
    entering, leaving = hooks

    def fast(*arguments: Any) -> None:
        if entering or leaving:
            slow(*arguments)
        else:
            run(programs, 1, 1, stream_of(device), function, packed, None, None, None, *arguments)

    return fast


class Launches:
    """The launches of one site by name; ``make`` is asked once for each, through ``tune`` if there is one."""

    def __init__(self, tune: Callable[[Hashable, Callable[..., Launch], Any], Launch] | None = None) -> None:
        self._tune = tune
        self._ready: dict[Hashable, tuple[Callable[..., None], tuple[Any, ...]]] = {}
        self._made: dict[Hashable, Launch] = {}

    def run(self, name: Hashable, aligned: bool, make: Callable[..., Launch], *tensors: Any) -> None:
        """Launch on ``tensors``: tensors, ``None`` or tuples of tensors, the same kinds at every call.

        ``aligned``: every pointer is a multiple of 16 bytes, for which kernels are specialised.
        """
        if aligned:
            ready = self._ready.get(name)
            if ready is not None:
                ready[0](*tensors, *ready[1])
                return
        what = self._made.get(name)
        if what is None:
            what = self._made[name] = make() if self._tune is None else self._tune(name, make, tensors)
        compiled = launch(what, *tensors)
        if aligned and compiled is not None:
            self._ready[name] = (direct(compiled, what.programs), what.numbers)
