"""A dozen points of the grid, forward and backward, in one process: something to run under a sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py [--described]

Every value of every axis is in it, at lengths that a sanitizer can bear, and few queries against many keys.
``--described``: tiles come by descriptors, as they do at larger sizes.
Exits with 1 if a result is outside the rule; the sanitizer says the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

import torch
from grid import DESCRIBED, run_point, setup


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--described", action="store_true")
    options = parser.parse_args()
    device = options.device
    if options.described:
        os.environ[DESCRIBED] = "1"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no cuda device")
    _, grid, _ = setup(device)
    # Those of a cut of the grid, all of which the grid itself has.
    small = dataclasses.replace(grid, partner={n: grid.partner[n] for n in (1, 63, 257)})
    points = small.covering(1)
    few = dataclasses.replace(points[0], length=1, relation="more keys", dropout=0.0)
    others = {"causal": ("none", "plain"), "padding": ("mean", "bias"), "blocks by head": ("zero", "sinks")}
    points += [
        dataclasses.replace(few, mask=mask, dead=dead, program=program, group=8)
        for mask, (dead, program) in others.items()
    ]
    failed = 0
    for point in points:
        result = run_point(device, str(point), seed=0)
        failed += result.kind in ("failure", "memory")
        print(f"{result.kind}: {point} {result.text}", flush=True)
    print(f"{len(points) - failed} of {len(points)} equal")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
