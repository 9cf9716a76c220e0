"""Tiles that are timed at a kernel's first call, where the user asks for it; remembered on disk.

Candidates are the choice of the tables and what else is in them for the kernel, less what a rule expects
not to fit.  The tables' choice is the first of them, and stays unless another is clearly faster, so
whatever goes wrong here (a candidate does not compile, a file is damaged, the disk is full) costs time
and nothing else.

Other tiles round differently, so bits may differ between machines, and between runs until a result is on
disk; nothing is tuned where deterministic algorithms are asked for, nor while a CUDA graph is captured.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashfuse.kernels import configs
from flashfuse.kernels.configs import Config
from flashfuse.kernels.launch import Launch, direct, launch

log = logging.getLogger("flashfuse")

WRITTEN: dict[str, tuple[str, ...]] = {
    "forward": ("Out", "Lse"),
    "dkdv": ("DK", "DV_"),
    "dk": ("DK",),
    "dv": ("DV_",),
    "dq": ("DQ",),
    "table": (),
}
"""The kernels that are tuned, and the parameters that they write; what ``gptrs`` holds they add to.

That of dq mends ``Stats`` besides, of which each trial has a copy.
"""

_TILES = ("BM", "BN", "TILE")
_MOST = 6
_MARGIN = 0.03
"""How much faster than the tables' choice is faster."""
_ROUNDS = 3
_SLICE_MS = 2.0
_FEW_SPILLS = 32
"""Registers of a thread; those of the tables' choice are allowed too."""
_REGISTERS = 192
"""Of the 255 of a thread, those that hold sums and scores; no measured choice has more of them."""
_COARSE = 2**-4
"""Of the largest element: what no rounding does.  Whether results are *equal* is for the tests to say."""
_FORMAT = 1

# --- candidates --------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Padded D and Dv, bytes of an element of q, bytes of shared memory that a program may have, dropout."""

    dim: int
    v_dim: int
    itemsize: int
    shared: int
    dropout: bool


def needs(kernel: str, config: Config, sizes: Sizes) -> tuple[int, int]:
    """Bytes of shared memory, and registers of a thread for sums and scores, estimated.

    From the elements that a program holds, streams and sums up.  For 16-bit numbers on sm_90 the first is
    what the compiler takes, to a few KiB; dropout and loads per element take more.
    """
    bm, bn, warps, stages, _ = config
    both = sizes.dim + sizes.v_dim
    held, streamed, sums, scores = {
        "forward": (bm * sizes.dim, bn * both, bm * sizes.v_dim, 1),
        "dkdv": (bn * both, bm * both, bn * both, 2),
        "dk": (bn * both, bm * both, bn * sizes.dim, 2),
        "dv": (bn * sizes.dim, bm * both, bn * sizes.v_dim, 1),
        "dq": (bm * both, bn * both, bm * sizes.dim, 2),
        "table": (0, 2 * bm * both, 0, 3),
    }[kernel]
    sums += (scores + sizes.dropout) * bm * bn
    return (held + streamed * stages) * sizes.itemsize, sums // (32 * warps)


def fits(kernel: str, config: Config, sizes: Sizes) -> bool:
    """Whether ``config`` is one of the kernel's at all, and worth compiling."""
    bm, bn, warps, _, _ = config
    shared, registers = needs(kernel, config, sizes)
    return (
        128 % bm == 0
        and 128 % bn == 0
        and bn % 32 == 0
        # A warp's share of the scores is at least a tile of the tensor cores.
        and bm * bn >= 128 * warps
        and shared <= sizes.shared
        and registers <= _REGISTERS
    )


def candidates(kernel: str, static: Config, sizes: Sizes) -> list[Config]:
    """``static``, then the measured configs that fit, the most alike first."""

    def distance(config: Config) -> float:
        tiles = zip(config[:3], static[:3], strict=True)
        return sum(abs(math.log2(a / b)) for a, b in tiles) + abs(config.stages - static.stages)

    others = (c for c in configs.measured(kernel, sizes.itemsize) if c != static and fits(kernel, c, sizes))
    return [static, *sorted(others, key=distance)[: _MOST - 1]]


# --- trials ------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A candidate that was launched once: what it spills, what it wrote, and how to launch it again."""

    spills: int
    results: list[Tensor]
    run: Callable[[], None]


@dataclass
class Bench:
    """Launches candidates of one kernel on a call's tensors, and on copies of those that are added to."""

    kernel: str
    make: Callable[..., Launch]
    tensors: tuple[Any, ...]
    copies: dict[int, Tensor] = field(default_factory=dict)

    def key(self) -> dict[str, Any]:
        """All that the kernel is compiled for, but for its tiles."""
        what = self.make()
        rest = zip(what.kernel.params[len(self.tensors) :], what.numbers, strict=True)
        constants = {p.name: _named(value) for p, value in rest if p.is_constexpr and p.name not in _TILES}
        return {"kernel": self.kernel, "constants": constants, "tensors": [_type(t) for t in self.tensors]}

    def __call__(self, config: Config) -> Trial:
        what = self.make(config=config)
        given = dict(zip(what.kernel.arg_names, self.tensors, strict=False))
        results = [given[name] for name in WRITTEN[self.kernel]]
        if self.kernel == "dq":
            given["Stats"] = given["Stats"].clone()
        if "gptrs" in given:
            given["gptrs"] = tuple(self._copy(t) for t in given["gptrs"])
            results += self.copies.values()
        tensors = tuple(given.values())
        compiled = launch(what, *tensors)
        again = functools.partial(direct(compiled, what), *tensors)
        return Trial(compiled.n_spills, results, again)

    def _copy(self, buffer: Tensor) -> Tensor:
        """That of ``buffer``, which may come more than once, with zeros."""
        if id(buffer) not in self.copies:
            self.copies[id(buffer)] = torch.empty_like(buffer)
        return self.copies[id(buffer)].zero_()


def _named(value: Any) -> Any:
    """A constant as JSON has it.  Generated functions lie in modules named after a digest of their source."""
    return f"{value.__module__}.{value.__name__}" if callable(value) else value


def _type(tensor: Any) -> Any:
    if isinstance(tensor, tuple):
        return [_type(t) for t in tensor]
    return None if tensor is None else str(tensor.dtype)


def elapsed_ms(run: Callable[[], None]) -> float:
    """Milliseconds of one ``run`` on the current stream, averaged over a few."""

    def of(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    return of(max(1, min(50, int(_SLICE_MS / max(of(1), 1e-3)))))


def _alike(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    for a, b in zip(results, expected, strict=True):
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return False
        largest = torch.where(finite, b, 0).abs().max() if b.numel() else 0
        if b.numel() and bool(torch.where(finite, a - b, 0).abs().max() > _COARSE * largest):
            return False
    return True


def _fastest(what: str, choices: Sequence[Config], attempt: Callable[[Config], Trial]) -> Config | None:
    """The fastest of ``choices``; ``None`` where not even the first of them could be timed."""
    static, started = choices[0], time.perf_counter()
    trials: dict[Config, Trial] = {}
    expected: list[Tensor] = []
    for config in choices:
        try:
            trial = attempt(config)
            if config == static:
                expected = [t.clone() for t in trial.results]
            elif trial.spills > max(_FEW_SPILLS, trials[static].spills):
                continue
            elif not _alike(trial.results, expected):
                log.warning("%s with %s differs by more than roundings, not used", what, tuple(config))
                continue
        except Exception as error:
            log.debug("%s with %s: %s: %s", what, config, type(error).__name__, error)
            if config == static:
                return None
            continue
        trials[config] = trial
    times = dict.fromkeys(trials, math.inf)
    for _ in range(_ROUNDS):
        for config, trial in trials.items():
            times[config] = min(times[config], elapsed_ms(trial.run))
    fastest = min(times, key=lambda config: times[config])
    if times[fastest] > (1 - _MARGIN) * times[static]:
        fastest = static
    log.info(
        "tuned %s: %s %.4g ms, the tables' %s %.4g ms; %d of %d candidates timed, %.1f s",
        *(what, _text(fastest), times[fastest], _text(static), times[static]),
        *(len(trials), len(choices), time.perf_counter() - started),
    )
    return fastest


def _text(config: Config) -> tuple[int, ...]:
    return tuple(n for n in config if n is not None)


# --- the choice --------------------------------------------------------------------------------

_lock = threading.Lock()
_known: dict[str, Config] = {}
"""By digest of the key: what this process has launched."""


def best(
    key: Mapping[str, Any],
    device: torch.device,
    choices: Sequence[Config],
    attempt: Callable[[Config], Trial],
) -> Config:
    """The fastest of ``choices`` for ``key``, a site's kernel: remembered, read from disk, or timed now.

    ``attempt`` launches one of them on the tensors of this call.
    """
    if len(choices) == 1:
        return choices[0]
    text = json.dumps({**_environment(device), **key}, sort_keys=True, default=str)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    with _lock:
        config = _known.get(name)
        if config is not None and config in choices:
            return config
        if torch.cuda.is_current_stream_capturing():
            return choices[0]
        try:
            config = _read(name, text, choices)
            if config is None:
                config = _fastest(_title(key), choices, attempt)
                if config is None:
                    return choices[0]
                _write(name, text, config)
            else:
                # A driver may refuse what another took.
                attempt(config)
        except Exception as error:
            log.debug("tuning %s failed: %s: %s", _title(key), type(error).__name__, error)
            return choices[0]
        _known[name] = config
        return config


def bucket(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 227 * 1024)


def _title(key: Mapping[str, Any]) -> str:
    return ", ".join([key["kernel"], *(f"{name} {value}" for name, value in key["sizes"].items())])


def _environment(device: torch.device) -> dict[str, Any]:
    """What a result rests on beside its site."""
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} sm_{capability[0]}{capability[1]}"
    return {"format": _FORMAT, "sources": _sources(), "triton": version("triton"), "device": name}


@functools.cache
def _sources() -> str:
    """A digest of the kernels' source, which is finer than a version of the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# --- on disk -----------------------------------------------------------------------------------


def folder() -> Path | None:
    """The folder of the results, made if there is none; ``None`` where others could write to it."""
    given = os.environ.get("FLASHFUSE_CACHE_DIR")
    try:
        cache = os.environ.get("XDG_CACHE_HOME")
        path = Path(given) if given else (Path(cache) if cache else Path.home() / ".cache") / "flashfuse"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except (OSError, RuntimeError):
        return None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        _warn(f"{path} belongs to somebody else or can be written by others; tuned tiles are not kept")
        return None
    return path


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _read(name: str, text: str, choices: Sequence[Config]) -> Config | None:
    """The stored choice, if the file is whole, for this very key, and names one of ``choices``."""
    path = folder()
    if path is None:
        return None
    try:
        stored = json.loads((path / f"{name}.json").read_text())
        if json.dumps(stored["key"], sort_keys=True) != text:
            return None
        return next((c for c in choices if stored["config"] == c._asdict()), None)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def _write(name: str, text: str, config: Config) -> None:
    """Readers see the file of before or this one, whole; of several writers the last one stays."""
    path = folder()
    if path is None:
        return
    content = json.dumps({"key": json.loads(text), "config": config._asdict()}, indent=1)
    try:
        handle, temporary = tempfile.mkstemp(dir=path, prefix=f".{name}", suffix=".tmp")
    except OSError:
        return
    try:
        with open(handle, "w") as file:
            file.write(content)
        os.replace(temporary, path / f"{name}.json")
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
