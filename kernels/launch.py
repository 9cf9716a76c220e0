"""How a kernel is launched.

Triton's own path binds and specialises every argument at each call, which costs tens of
microseconds.  A site launches the same kernels with the same numbers every time, so after the first
call :class:`Launches` calls the compiled kernel directly.
"""

from __future__ import annotations

import copy
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
    registers: int | None = None
    fuses: bool = True
    """Whether a product and a sum may become one operation, which rounds once."""
    descriptors: tuple[tuple[int, Callable[[Any], Any]], ...] = ()
    """The places of tensors that the kernel takes in another form, and what makes that."""
    smaller: Callable[[], Launch | None] | None = None
    """The same with fewer stages or smaller tiles, for a device without room for this one."""


def with_descriptors(what: Launch, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """``tensors`` as the kernel takes them."""
    if not what.descriptors:
        return tensors
    given = list(tensors)
    for place, make in what.descriptors:
        given[place] = make(tensors[place])
    return tuple(given)


def launch(what: Launch, *tensors: Any) -> Any:
    """Run ``what``; returns the compiled kernel (``None`` under Triton's interpreter)."""
    return what.kernel[(what.programs,)](
        *with_descriptors(what, tensors),
        *what.numbers,
        num_warps=what.num_warps,
        num_stages=what.num_stages,
        maxnreg=what.registers,
        enable_fp_fusion=what.fuses,
    )


def launch_what_fits(what: Launch, tensors: tuple[Any, ...]) -> tuple[Any, Launch]:
    """:func:`launch`, of ``what`` or of the largest below it that the device has shared memory for.

    What was launched is kept for long, so it comes back without ``smaller``, which holds this call's tensors.
    """
    while True:
        try:
            return launch(what, *tensors), what._replace(smaller=None)
        except Exception as error:
            # Triton's, which this file does not import.
            out_of_room = type(error).__name__ == "OutOfResources"
            smaller = what.smaller() if out_of_room and what.smaller is not None else None
            if smaller is None:
                raise
            what = smaller


_NO_GUARD: AbstractContextManager[Any] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _NO_GUARD
    return torch.cuda.device(device)


def direct(compiled: Any, what: Launch) -> Callable[..., None]:
    """``compiled`` as ``what`` launches it on the current device, as a function of its tensors.

    What ``compiled[grid]`` asks Triton at each call (the device, its stream's getter, metadata for hooks that
    nobody has set) is asked once.  Where hooks are set, as profilers do, or Triton is made otherwise than
    3.6 to 3.9 are, that way is taken.
    """
    programs, numbers = what.programs, what.numbers
    slow: Callable[..., None] = compiled[(programs, 1, 1)]
    try:
        # The module that compiled it knows the driver; this file does not import Triton.
        triton = sys.modules[type(compiled).__module__]
        stream_of, runtime = triton.driver.active.get_current_stream, triton.knobs.runtime
        start = _start(compiled.run, programs, compiled.function, compiled.packed_metadata)
        hooks = runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls
    except (AttributeError, KeyError):
        return lambda *tensors: slow(*with_descriptors(what, tensors), *numbers)
    device = torch.cuda.current_device()
    entering, leaving = hooks

    def fast(*tensors: Any) -> None:
        tensors = with_descriptors(what, tensors)
        if entering or leaving:
            slow(*tensors, *numbers)
        else:
            start(stream_of(device), (*tensors, *numbers))

    return fast


def _start(run: Any, programs: int, function: Any, packed: Any) -> Callable[[Any, tuple[Any, ...]], None]:
    """Triton's launcher ``run`` as a function of the stream and of the kernel's arguments.

    The launcher is Python around one function in C: it allocates what a kernel asks for as scratch memory
    and passes on the rest.  For a kernel that asks for none, what it passes on is always the same.  So it is
    noted once, from a copy of the launcher with another function in the place of that in C, which is called
    with it from then on.
    """

    def through(stream: Any, arguments: tuple[Any, ...]) -> None:
        run(programs, 1, 1, stream, function, packed, None, None, None, *arguments)

    noted: list[tuple[Any, ...]] = []
    stream_here, argument_here = object(), object()
    try:
        in_c = run.launch
        if run.global_scratch_size or run.profile_scratch_size:
            return through
        stand_in = copy.copy(run)
        stand_in.launch = lambda *given: noted.append(given)
        stand_in(programs, 1, 1, stream_here, function, packed, None, None, None, argument_here)
        (given,) = noted
        at = given.index(stream_here)
    except (AttributeError, TypeError, ValueError):
        return through
    before, between, last = given[:at], given[at + 1 : -1], given[-1]
    if last is argument_here:  # Triton 3.6
        return lambda stream, arguments: in_c(*before, stream, *between, *arguments)
    if last == (argument_here,):  # Triton 3.9
        return lambda stream, arguments: in_c(*before, stream, *between, arguments)
    return through


class Launches:
    """The launches of one site by name; ``make`` is asked once for each, through ``tune`` if there is one."""

    def __init__(self, tune: Callable[[Hashable, Callable[..., Launch], Any], Launch] | None = None) -> None:
        self._tune = tune
        self._ready: dict[Hashable, Callable[..., None]] = {}
        self._made: dict[Hashable, Launch] = {}

    def run(self, name: Hashable, aligned: bool, make: Callable[..., Launch], *tensors: Any) -> None:
        """Launch on ``tensors``: tensors, ``None`` or tuples of tensors, the same kinds at every call.

        ``aligned``: every pointer is a multiple of 16 bytes, for which kernels are specialised.
        """
        if aligned:
            ready = self._ready.get(name)
            if ready is not None:
                ready(*tensors)
                return
        what = self._made.get(name)
        if what is None:
            what = make() if self._tune is None else self._tune(name, make, tensors)
        compiled, what = launch_what_fits(what, tensors)
        self._made[name] = what
        if aligned and compiled is not None:
            self._ready[name] = direct(compiled, what)
