"""The property of the fuzz: a program comes out equal, or left alone with a reason; nothing else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_code import Program
from torch import fx

from flashfuse import FlashFuseWarning, pipeline
from flashfuse.numbers import check_graph
from flashfuse.options import Options
from flashfuse.report import CheckItem, Report


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        left: the code of each reason.
        failure: ``""``, or what is wrong: ``different``, ``crash`` or ``report``, a colon, and details.
        caught: a site that the checker left, and that would have made the program different.
        doubt: a difference under one draw of the arguments that others do not show, or a site that the
            checker left though the whole program would not have been different.
        nan: a gradient that is NaN in the original and a number in ours (DESIGN.md, rows without a key).
    """

    fused: int = 0
    left: tuple[str, ...] = ()
    failure: str = ""
    caught: str = ""
    doubt: str = ""
    nan: str = ""


DRAWS = 4
"""The rule compares largest errors, and of a handful of elements the original's may be lucky.

What computes another function differs under every draw of the arguments.
"""


def capture(program: Program, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """The graph of the program, and which of the inputs each of its placeholders takes."""
    run, every = program.function(), list(range(len(inputs)))
    if program.capture == "symbolic":
        return pipeline.with_example_values(fx.symbolic_trace(run), inputs), every
    if program.capture == "export":
        module = torch.nn.Module()
        module.forward = run
        return torch.export.export(module, tuple(inputs)).module(), every
    torch._dynamo.reset()
    graphs: list[tuple[fx.GraphModule, list[int]]] = []

    def collect(gm: fx.GraphModule, _: Any) -> Any:
        def record(*given: Any) -> Any:
            graphs.append((gm, [next(i for i in every if inputs[i] is x) for x in given]))
            return gm(*given)

        return record

    torch.compile(run, backend=collect, fullgraph=True, dynamic=False)(*inputs)
    return graphs[0]


def outcome(program: Program) -> Outcome:
    """Runs the pipeline on the program and compares; errors of ours are outcomes too.

    Raises:
        Exception: PyTorch itself cannot run or trace the program, which is a mistake of the strategy.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm, order = capture(program, program.arguments())
    before = gm.code
    # Dropout is taken out where whole graphs are compared; the check of a site has its own keep mask.
    options = Options(verify="full") if program.has_dropout else Options()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", FlashFuseWarning)
            new, report = pipeline.run(gm, options)
            alarms = "; ".join(
                f"{r.code}: {r.message}" for s in report.sites for r in s.reasons if r.code in ALARMS
            )
            found = _differing(program, gm, new, order)
            # The site is left, which is right either way: would it have differed, or was the alarm false?
            unchecked = pipeline.run(gm, Options(verify="off"))[0] if alarms else gm
            caught = bool(_differing(program, gm, unchecked, order).different)
    except Exception as error:
        return Outcome(failure=f"crash: {type(error).__name__}: {error}")
    left = tuple(reason.code for site in report.sites for reason in site.reasons)
    wrong = _wrong_in(report) or ("the input graph was changed" if gm.code != before else "")
    failure = f"report: {wrong}" if wrong else f"different: {found.different}" if found.different else ""
    doubts = [found.doubt, "" if caught else alarms]
    return Outcome(
        report.num_fused, left, failure, alarms if caught else "", "; ".join(filter(None, doubts)), found.nan
    )


ALARMS = ("check_failed", "proof_failed")
"""Reasons that say that the replacement differs."""


@dataclass(frozen=True)
class Differing:
    """What is outside the rule under every draw of the arguments, what only under the first, and NaN."""

    different: str = ""
    doubt: str = ""
    nan: str = ""


def _differing(program: Program, gm: fx.GraphModule, new: fx.GraphModule, order: Sequence[int]) -> Differing:
    first = nan = ""
    # A graph that was passed through is itself.
    for seed in range(DRAWS) if new is not gm else ():
        arguments = program.arguments(seed)
        items = check_graph(gm, new, [arguments[i] for i in order], backward=True).items
        outside = [item for item in items if not item.ok]
        known = [item for item in outside if item.name.startswith("d") and "instead of nan at" in item.note]
        nan = nan or _shown(known)
        outside = [item for item in outside if item not in known]
        if not outside:
            return Differing(doubt=first, nan=nan)
        first = first or _shown(outside)
        if any(math.isinf(item.error_ours) for item in outside):
            return Differing(_shown(outside), nan=nan)
    return Differing(different=first, nan=nan)


def _shown(items: Sequence[CheckItem]) -> str:
    return "; ".join(f"{i.name} {i.note} (error {i.error_ours:.3g}, limit {i.limit:.3g})" for i in items)


def _wrong_in(report: Report) -> str:
    for site in report.sites:
        if site.status == "left" and not (site.reasons and all(r.code and r.message for r in site.reasons)):
            return f"{site.name} is left without a reason"
        for reason in site.reasons:
            if reason.code in ("internal", "emit"):
                return f"{site.name} is left for a fault of ours: {reason.code}: {reason.message}"
    return ""
