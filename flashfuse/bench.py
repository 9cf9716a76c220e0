"""The timing table: every way to run one model, measured in turns in one process.

Rounds are interleaved, so that a slow spell of the machine hits every row; the figure is the median.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flashfuse.report import format_bytes, plain_text

MAX_ROUNDS = 7
MIN_ROUNDS = 3
BUDGET_S = 80.0
"""Time for all timed rounds together; fewer rounds are run where they would take longer."""

WAYS: Mapping[str, tuple[str | None, Any]] = {
    "eager": ("eager", None),
    "torch.compile": ("eager", "inductor"),
    "sdpa": ("sdpa", None),
    "sdpa + compile": ("sdpa", "inductor"),
    "flashfuse": (None, "flashfuse"),
}
"""Name of the row → (attention of the model; ``None`` is the one it came with, backend of the compiler)."""

OURS = "flashfuse"
BASE = "eager"


@dataclass(frozen=True)
class Row:
    """One way to run the model; ``error`` says why there is no figure.

    ``first_s`` is the first call, compilation included; ``peak_bytes`` is what one step allocates
    above weights, gradients of weights included.
    """

    name: str
    times_ms: tuple[float, ...] = ()
    peak_bytes: int | None = None
    first_s: float = 0.0
    error: str = ""

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.times_ms) if self.times_ms else None


@dataclass(frozen=True)
class Bench:
    """A measured table.  ``equal`` says that the rewritten model passed its check."""

    what: str
    machine: str
    rows: tuple[Row, ...]
    equal: bool
    notes: tuple[str, ...] = ()

    def speedup(self, name: str) -> float | None:
        """Of a row over eager; ``None`` for ours if the results differ, or if there is no figure."""
        medians = {row.name: row.median_ms for row in self.rows}
        base, own = medians.get(BASE), medians.get(name)
        if base is None or own is None or (name == OURS and not self.equal):
            return None
        return base / own

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        rows = [
            asdict(row) | {"median_ms": row.median_ms, "speedup": self.speedup(row.name)} for row in self.rows
        ]
        return {
            "what": self.what,
            "machine": self.machine,
            "equal": self.equal,
            "rows": rows,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return plain_text(self)

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("", no_wrap=True)
        for column in ("median", "range", "× eager", "peak memory", "first call"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*self._cells(row), style="bold" if row.name == OURS else "")
        lines: list[RenderableType] = [Text(self.what, style="bold"), table]
        for row in self.rows:
            if row.error:
                lines.append(Text(f"{row.name}: {row.error}", style="yellow"))
        if not self.equal:
            lines.append(
                Text(
                    f"no speed-up is shown for {OURS}: its results differ from the model's", style="bold red"
                )
            )
        lines += [Text(note, style="yellow") for note in self.notes]
        rounds = max((len(row.times_ms) for row in self.rows), default=0)
        lines.append(
            Text(
                f"{rounds} interleaved rounds · peak memory: tensors allocated during one step, "
                f"above the weights\n{self.machine}",
                style="dim",
            )
        )
        return Group(*lines)

    def _cells(self, row: Row) -> Sequence[str]:
        if row.median_ms is None:
            return row.name, "–", "", "", "", ""
        factor = self.speedup(row.name)
        return (
            row.name,
            f"{row.median_ms:.1f} ms",
            f"{min(row.times_ms):.1f} – {max(row.times_ms):.1f}",
            "–" if factor is None else f"{factor:.2f}",
            "–" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            f"{row.first_s:.1f} s",
        )


def bench_model(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    train: bool = False,
    equal: bool,
    what: str = "",
    on_step: Callable[[str], None] = lambda step: None,
) -> Bench:
    """Time one step of a Hugging Face model in every way of :data:`WAYS`.

    A step is a forward call, with ``train`` forward and backward.  The ways share their weights.
    """
    import flashfuse

    model.train(train)
    # Graphs compiled earlier count against Dynamo's limit for one function, past which it runs eagerly.
    torch.compiler.reset()
    flashfuse.clear_reports()
    steps: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    for name, (attention, backend) in WAYS.items():
        try:
            twin = _twin(model, attention)
        except (ValueError, ImportError) as error:
            refused[name] = _one_line(error)
            continue
        run = torch.compile(twin, backend=backend) if backend is not None else twin
        steps[name] = _training_step(run, twin, inputs) if train else _inference_step(run, inputs)
    device = next(model.parameters()).device
    measured = {row.name: row for row in measure(steps, device, on_step=on_step)}
    rows = tuple(measured.get(name) or Row(name, error=refused[name]) for name in WAYS)
    notes = dict.fromkeys(warning for report in flashfuse.reports() for warning in report.warnings)
    return Bench(what, machine_line(device), rows, equal, tuple(notes))


def measure(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = MAX_ROUNDS,
    budget_s: float = BUDGET_S,
    on_step: Callable[[str], None] = lambda step: None,
) -> tuple[Row, ...]:
    """Time ``steps`` in turns: first call, a warm-up that also gives the peak, then the rounds."""
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, step in steps.items():
        on_step(f"{name}: first call")
        try:
            first[name] = _seconds(step, device)
        except Exception as error:  # a way that cannot run is a row of the table, not the end of it
            failed[name] = _one_line(error)
    running = [name for name in steps if name not in failed]
    for name in running:
        # The second call may compile again, for sizes that the first one took as fixed.
        _seconds(steps[name], device)
    warm_s = sum(_seconds(steps[name], device) for name in running)
    rounds = max(min(rounds, MIN_ROUNDS), min(rounds, int(budget_s / max(warm_s, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in running}
    gc.collect()
    for number in range(rounds):
        on_step(f"timing: round {number + 1} of {rounds}")
        for name in running:
            times[name].append(1e3 * _seconds(steps[name], device))
    peaks: dict[str, int] = {}
    for name in running:
        on_step(f"{name}: peak memory")
        peaks[name] = peak_bytes(steps[name], device)
    return tuple(
        Row(name, error=failed[name])
        if name in failed
        else Row(name, tuple(times[name]), peaks[name], first[name])
        for name in steps
    )


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that ``step`` holds at once, above those that were there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Allocations rather than resident memory: what malloc keeps after a free says nothing of the model.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes to the terminal
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine_line(device: torch.device) -> str:
    """What a figure was measured on."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    return f"{chip} · {versions}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _twin(model: torch.nn.Module, attention: str | None) -> torch.nn.Module:
    """The model with another attention on the same weights; ``None`` keeps the attention."""
    tensors: Iterable[torch.Tensor] = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if attention is not None:
        twin.set_attn_implementation(attention)  # type: ignore[operator]
    return twin


def _inference_step(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], object]:
    def step() -> object:
        with torch.no_grad():
            return run(**inputs)

    return step


def _training_step(
    run: Callable[..., Any], twin: torch.nn.Module, inputs: Mapping[str, Any]
) -> Callable[[], object]:
    def step() -> object:
        twin.zero_grad(set_to_none=True)
        out = run(**inputs)[0]
        out.float().square().mean().backward()
        # Freed inside the step: weights are shared, and another way's gradients must not count here.
        twin.zero_grad(set_to_none=True)
        return None

    return step


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
