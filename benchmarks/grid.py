"""The kernels over the grid of ``tests/kernel_grid.py``, against float64 under the rule.

    python benchmarks/grid.py [--minutes 10] [--jobs 12] [--seed 0] [--part 0/1] [--described] [--out FILE]
    python benchmarks/grid.py --point "bf16,64,1000,same,3,padding,mean,bias,0.17"
    python benchmarks/grid.py --device cpu                      # the CPU variant, without a GPU

First a covering array, in which any three values of different axes meet, then random points of the whole grid
until the time is used.  Most of it goes into compiling: every job is a process that compiles its own points,
on one of the GPUs, and points that share kernels go to one job.  ``--part i/n`` takes the i-th of n equal
parts of both, so that the whole can be run in pieces.  ``--described``: tiles come by descriptors at every
size, not only at large ones, where the device has a tensor memory accelerator.  A point that fails, hangs or
takes its process down is a line in the result.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import multiprocessing
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from flashfuse.bench import machine_line

TESTS = Path(__file__).parent.parent / "tests"
MODULES = ("kernel_cases", "kernel_grid")
LONGEST_S = 300
"""A point that takes longer is given up."""
GRACE_S = 60
"""For what is running when the time is used."""
DESCRIBED = "FLASHFUSE_GRID_DESCRIBED"
"""Set for the jobs of a run with ``--described``."""
KEPT_BYTES = 4 << 30
"""GPU memory that a job may keep between points."""


def load() -> Any:
    """``kernel_grid`` of the tests, by its own name; the folder is never on ``sys.path``."""
    for name in MODULES:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return sys.modules["kernel_grid"]


def setup(device: str) -> tuple[Any, Any, Any]:
    """The module ``kernel_grid``, the grid for ``device``, and who runs it there."""
    from flashfuse.kernels import dispatch

    grids = load()
    on_gpu = device == "cuda"
    if os.environ.get(DESCRIBED):
        from flashfuse.kernels import triton_site

        triton_site.FEWEST_SCORES_DESCRIBED = 0
    return grids, grids.FULL if on_gpu else grids.CPU, dispatch.implementation("triton" if on_gpu else "cpu")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a job says of a point: ``kind`` is ok, luck, failure or memory."""

    point: str
    kind: str
    text: str = ""
    ratio: float = 0.0
    tensor: str = ""


def run_point(device: str, text: str, seed: int) -> Result:
    """One point, whatever happens in it."""
    grids, grid, implementation = setup(device)
    try:
        outcome = grids.check(implementation, grid, grid.parse(text), device, seed)
    except torch.OutOfMemoryError as error:
        return Result(text, "memory", _line(error))
    except Exception as error:
        return Result(text, "failure", _line(error))
    kind = "failure" if outcome.failure else "luck" if outcome.luck else "ok"
    return Result(text, kind, outcome.failure or outcome.luck, *outcome.worst)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def work(connection: Connection, stop: Any, device: str, seed: int) -> None:
    """A job: receives lists of points, sends the result of each, then None."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            for text in connection.recv():
                if stop.is_set():
                    return
                connection.send(text)
                connection.send(run_point(device, text, seed))
                if device == "cuda":
                    # After an illegal access nothing works in this process; the next one goes on.
                    torch.cuda.synchronize()
                    if torch.cuda.memory_reserved() > KEPT_BYTES:
                        torch.cuda.empty_cache()
            connection.send(None)


class Job:
    """A process, and what it was given."""

    def __init__(self, options: argparse.Namespace, stop: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, stop, options.device, options.seed), daemon=True
        )
        self.process.start()
        theirs.close()
        self.left: deque[str] = deque()
        self.running, self.since = "", 0.0

    def give(self, points: list[str]) -> None:
        self.left = deque(points)
        self.connection.send(points)

    def end(self) -> int | None:
        """Its exit status."""
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        return self.process.exitcode


def tasks(grid: Any, array: list[Any], options: argparse.Namespace) -> Iterator[list[str]]:
    """Points that share kernels, together: first those of ``array``, then all the others in random order."""
    part, parts = options.part
    done = set(array)
    by_kernels = sorted(array, key=lambda p: tuple(map(str, p.kernels)))
    groups = [list(points) for _, points in itertools.groupby(by_kernels, lambda p: p.kernels)]
    # In another order: what the time is not enough for is then of all kinds.
    random.Random(options.seed).shuffle(groups)
    for points in groups[part::parts]:
        yield [str(p) for p in points]
    rest = (p for p in grid.shuffled(options.seed, part, parts) if p not in done)
    for _, shared in itertools.groupby(rest, lambda p: p.kernels):
        yield [str(p) for p in shared]


def run_all(grid: Any, array: list[Any], options: argparse.Namespace) -> tuple[list[Result], float]:
    """The results of all points that the time was enough for, and the seconds."""
    start = time.monotonic()
    end = start + 60 * options.minutes
    stop = multiprocessing.get_context("spawn").Event()
    pending = tasks(grid, array, options)
    again: deque[list[str]] = deque()
    tried: Counter[str] = Counter()
    results: list[Result] = []
    jobs: list[Job] = []
    shown = start

    def next_task() -> list[str]:
        return again.popleft() if again else next(pending, [])

    def supply(job: Job) -> bool:
        points = [] if stop.is_set() else next_task()
        if points:
            job.give(points)
        return bool(points)

    def note(result: Result) -> None:
        tried[result.point] += 1
        if result.kind == "memory" and tried[result.point] == 1:
            # What others hold may be gone later.
            again.append([result.point])
            return
        results.append(result)
        if result.kind != "ok":
            print(f"{result.kind}: {result.point}: {result.text}", flush=True)

    def replace(job: Job, why: str) -> None:
        """Its process is gone, or is of no use: another one goes on behind the point that it was at."""
        status = job.end()
        jobs.remove(job)
        if job.running:
            note(Result(job.running, "failure", why or f"the process ended with {status}"))
        rest = [p for p in job.left if p != job.running]
        if rest:
            again.append(rest)
        if not stop.is_set():
            new = Job(options, stop)
            jobs.append(new)
            if not supply(new):
                jobs.remove(new)
                new.process.kill()

    def hear(job: Job) -> None:
        try:
            message = job.connection.recv()
        except (EOFError, OSError):
            return replace(job, "")
        if isinstance(message, str):
            job.running, job.since = message, time.monotonic()
        elif isinstance(message, Result):
            note(message)
            job.running = ""
            job.left.popleft()
        elif not supply(job):
            jobs.remove(job)
            job.process.kill()

    try:
        for _ in range(options.jobs):
            jobs.append(Job(options, stop))
            if not supply(jobs[-1]):
                jobs.pop().process.kill()
                break
        while jobs:
            heard = wait([job.connection for job in jobs], timeout=1)
            for job in [job for job in jobs if job.connection in heard]:
                hear(job)
            now = time.monotonic()
            if now > end:
                stop.set()
                if now > end + GRACE_S:
                    break
            for job in [job for job in jobs if job.running and now - job.since > LONGEST_S]:
                job.process.kill()
                replace(job, f"no result after {LONGEST_S} s")
            if now - shown > 15:
                shown = now
                wrong = sum(r.kind == "failure" for r in results)
                print(f"{now - start:.0f} s: {len(results)} points, {wrong} failed", flush=True)
    except KeyboardInterrupt:
        stop.set()
    for job in jobs:
        job.process.kill()
    return results, time.monotonic() - start


def page(grid: Any, array: list[Any], results: list[Result], seconds: float, options: Any) -> str:
    """The summary, in markdown."""
    counts = Counter(r.kind for r in results)
    of_array = {str(p) for p in array}
    run = [r for r in results if r.kind != "memory"]
    first = sum(r.point in of_array for r in run)
    of_part = "" if options.part == (0, 1) else f", part {options.part[0]}/{options.part[1]}"
    variant = "Triton kernels" if options.device == "cuda" else "CPU variant"
    rows = {
        "points run": len(run),
        f"of the covering array of {len(array)} (any three values of different axes meet)": first,
        f"of the whole grid of {len(grid)}": len(run),
        "outside the rule": counts["failure"],
        f"outside under one draw by a factor below {load().LUCK}, inside under five more": counts["luck"],
        "not run for want of memory": counts["memory"],
    }
    lines = [
        f"The {variant} over the grid of `tests/kernel_grid.py` (`python benchmarks/grid.py`, seed",
        f"{options.seed}{of_part}): out, lse and all gradients against float64; the error may be twice that",
        "of plain PyTorch in the same dtype, plus a rounding.",
        "",
        "| | |",
        "|---|---:|",
        *(f"| {name} | {n} |" for name, n in rows.items()),
        "",
        "| dtype | points | largest error, in parts of what is allowed | of | at |",
        "|---|---:|---:|---|---|",
    ]
    for dtype in dict.fromkeys(p.dtype for p in array):
        found = [r for r in run if r.point.startswith(f"{dtype},")]
        worst = max((r for r in found if r.kind == "ok"), key=lambda r: r.ratio, default=None)
        if worst is not None:
            lines.append(f"| {dtype} | {len(found)} | {worst.ratio:.2f} | {worst.tensor} | `{worst.point}` |")
    for kind, title in (("failure", "Outside the rule"), ("luck", "Outside under one draw only")):
        listed = [f"- `{r.point}`: {r.text}" for r in results if r.kind == kind]
        lines += ["", f"{title}:", "", *listed] if listed else []
    device = torch.device(options.device)
    lines += ["", f"{seconds:.0f} s with {options.jobs} jobs. {machine_line(device)}", ""]
    return "\n".join(lines)


def show(options: argparse.Namespace) -> int:
    """The points that were asked for, every comparison of each."""
    grids, grid, implementation = setup(options.device)
    failed = False
    for text in options.point:
        outcome = grids.check(implementation, grid, grid.parse(text), options.device, options.seed)
        print(f"{text}\n  {grid.case(outcome.point)}")
        for i in outcome.items:
            print(
                f"  {i.name}: error {i.error_ours:.3g}, the original's {i.error_original:.3g}, "
                f"allowed {i.limit:.3g}"
            )
        print(f"  {outcome.failure or outcome.luck or 'equal'}")
        failed |= bool(outcome.failure)
    return int(failed)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not 0 <= int(part) < int(parts):
        raise ValueError(f"expected 0/n to n-1/n, got {text!r}")
    return int(part), int(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 12))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N")
    parser.add_argument("--described", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--point", action="append", help="run this one here, and show what is compared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grid.md")
    options = parser.parse_args()
    if options.described:
        os.environ[DESCRIBED] = "1"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no cuda device; --device cpu runs the CPU variant")
    if options.point:
        return show(options)
    grid = load().FULL if options.device == "cuda" else load().CPU
    array = grid.covering(3)
    print(f"{len(array)} points in the covering array, {len(grid)} in the grid", flush=True)
    results, seconds = run_all(grid, array, options)
    text = page(grid, array, results, seconds, options)
    options.out.write_text(text)
    print(text)
    return 1 if any(r.kind == "failure" for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
