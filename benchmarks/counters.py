"""What bounds our kernels: hardware counters of a row of ``kernels.py``, read by Nsight Compute.

    python benchmarks/counters.py [--rows plain softcap "dropout 0.1"] [--out FILE]

For every kernel of forward and backward: its time under the profiler, the share of cycles in which an
instruction is issued, the busiest pipes and the most frequent reasons for which a warp waits.
Needs ``ncu`` on the path and the right to read counters.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from attention_ways import Problem, maps_of, ours, tensors

from flashfuse.bench import machine_line
from kernels import SECTIONS

ROWS = ("plain", "softcap", "ALiBi", "T5 table", "dropout 0.1", "window 1024")
PROBLEMS = {p.name: p for section in SECTIONS.values() for p in section}
GROUPS = ("ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy", "SpeedOfLight")
PIPE = re.compile(r"sm__(?:inst_executed_)?pipe_(\w+?)(?:_cycles_active)?\.avg\.pct_of_peak_sustained_active")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
ISSUED = "sm__inst_issued.avg.pct_of_peak_sustained_active"
OTHERS = {
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.per_cycle_active": "warps of an SM",
}


def run_once(problem: Problem) -> None:
    """Forward and backward, the second time under the profiler."""
    n = problem.shape[2]
    captures = [c.to(torch.bfloat16) if i in problem.grads else c for i, c in enumerate(problem.captures(n))]
    *leaves, do = tensors(problem.shape)
    leaves = [t.requires_grad_() for t in (*leaves, *(captures[i].detach() for i in problem.grads))]
    run = ours(problem, captures, maps_of(problem, captures, n))
    for step in range(2):
        torch.cuda.synchronize()
        if step:
            torch.cuda.cudart().cudaProfilerStart()
        torch.autograd.grad(run(*leaves), leaves, do)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def read(name: str) -> list[dict[str, str]]:
    """The counters of our kernels in one row, by kernel."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--kernel-name", "regex:^(attention|backward)_(forward|dkdv|dq|table)$"]
    command += [f"--section={group}" for group in GROUPS] + ["--metrics", ",".join((ISSUED, *OTHERS))]
    done = subprocess.run(
        [*command, sys.executable, __file__, "--once", name], capture_output=True, text=True, check=False
    )
    start = done.stdout.find('"ID"')
    if done.returncode or start < 0:
        raise RuntimeError(f"ncu: {(done.stderr or done.stdout).strip()[-500:]}")
    units, *rows = csv.DictReader(io.StringIO(done.stdout[start:]))
    return [{**row, "unit of time": units["gpu__time_duration.sum"]} for row in rows]


def _largest(row: dict[str, str], pattern: re.Pattern[str], scale: str, count: int = 3) -> str:
    found: dict[str, float] = {}
    for key, text in row.items():
        match = pattern.fullmatch(key or "")
        if match and text:
            name = match[1]
            found[name] = max(found.get(name, 0.0), float(text.replace(",", "")))
    first = sorted(found.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {value:{scale}}" for name, value in first)


def table(rows: dict[str, list[dict[str, str]]]) -> list[str]:
    head = [
        "row",
        "kernel",
        "time",
        "issuing",
        "busiest pipes, %",
        "waits, warps per issue",
        "registers",
        "warps",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, kernels in rows.items():
        for row in kernels:
            cells = [
                name,
                row["Kernel Name"],
                f"{row['gpu__time_duration.sum']} {row['unit of time']}",
                f"{float(row[ISSUED]):.0f} %",
                _largest(row, PIPE, ".0f"),
                _largest(row, STALL, ".1f"),
                row["launch__registers_per_thread"],
                f"{float(row['sm__warps_active.avg.per_cycle_active']):.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=PROBLEMS, default=ROWS, metavar="ROW")
    parser.add_argument("--once", choices=PROBLEMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "counters.md")
    options = parser.parse_args()
    if options.once:
        run_once(PROBLEMS[options.once])
        return 0
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        print("this needs a CUDA device, and Nsight Compute's ncu on the path", file=sys.stderr)
        return 2
    found: dict[str, list[dict[str, str]]] = {}
    for name in options.rows:
        try:
            found[name] = read(name)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(*table({name: found[name]})[2:], sep="\n", flush=True)
    head = (
        "`python benchmarks/counters.py`: Nsight Compute on the rows of kernels.md, one run of each kernel."
    )
    text = "\n".join([head, "", *table(found), "", machine_line(torch.device("cuda"))])
    options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
