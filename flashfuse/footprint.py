"""What looking at a model leaves behind: nothing; and how much memory it took meanwhile."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def devices_of(*values: Any) -> set[torch.device]:
    """Where the tensors in nested ``values``, and the parameters and buffers of modules, live."""
    found: set[torch.device] = set()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.add(leaf.device)
        elif isinstance(leaf, torch.nn.Module):
            found |= {t.device for t in (*leaf.parameters(), *leaf.buffers())}
    return found


@contextlib.contextmanager
def random_state(devices: Iterable[torch.device], seed: int | None = None) -> Iterator[None]:
    """The generators of the CPU and of ``devices`` as before on leaving; inside they start from ``seed``.

    Not ``torch.random.fork_rng``: with ``manual_seed`` that wakes every GPU of the machine, or seeds
    those that wake later.
    """
    generators = [torch.default_generator]
    generators += [
        torch.cuda.default_generators[torch.cuda.current_device() if d.index is None else d.index]
        for d in set(devices)
        if d.type == "cuda"
    ]
    states = [generator.get_state() for generator in generators]
    try:
        if seed is not None:
            for generator in generators:
                generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextlib.contextmanager
def undisturbed(model: Any, *inputs: Any) -> Iterator[None]:
    """Random state, buffers, and the training mode of every part of ``model`` as before on leaving."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [(module, module.training) for module in modules]
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if modules else []
    with random_state(devices_of(model, *inputs)):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


class PeakMemory:
    """``with PeakMemory() as peak: …``, then ``peak.bytes``: the most that was held above the start.

    Of the GPUs where there are any, else of the process.  Nothing is reset, as the counters are the
    user's: where more was held at once before the start, that larger figure is given.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        self._before = _held()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes = max(0, _peak() - self._before)


def _gpus() -> range:
    awake = torch.cuda.is_available() and torch.cuda.is_initialized()
    return range(torch.cuda.device_count() if awake else 0)


def _held() -> int:
    if _gpus():
        return sum(map(torch.cuda.memory_allocated, _gpus()))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * resource.getpagesize()


def _peak() -> int:
    if _gpus():
        return sum(map(torch.cuda.max_memory_allocated, _gpus()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
