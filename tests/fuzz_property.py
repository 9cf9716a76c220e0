"""The property of the fuzz: a program comes out equal, or left alone with a reason; nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_code import Program
from torch import fx

from flashfuse import FlashFuseWarning, pipeline
from flashfuse.checker import check_graph
from flashfuse.options import Options
from flashfuse.report import CheckItem, Report


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        left: the code of each reason.
        failure: ``""``, or what is wrong: ``different``, ``crash`` or ``report``, a colon, and details.
        doubt: a difference under one draw of the arguments that others do not show.
    """

    fused: int = 0
    left: tuple[str, ...] = ()
    failure: str = ""
    doubt: str = ""


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
            # A graph that was passed through is itself.
            differing = doubt = ""
            for seed in range(DRAWS) if new is not gm else ():
                arguments = program.arguments(seed)
                items = _differing(gm, new, [arguments[i] for i in order])
                differing = "; ".join(map(_shown, items))
                doubt = doubt or differing
                if not items or any(i.note for i in items):
                    break
    except Exception as error:
        return Outcome(failure=f"crash: {type(error).__name__}: {error}")
    left = tuple(reason.code for site in report.sites for reason in site.reasons)
    wrong = _wrong_in(report) or ("the input graph was changed" if gm.code != before else "")
    failure = f"report: {wrong}" if wrong else f"different: {differing}" if differing else ""
    return Outcome(report.num_fused, left, failure, "" if failure else doubt)


def _differing(gm: fx.GraphModule, new: fx.GraphModule, inputs: Sequence[Any]) -> list[CheckItem]:
    """The tensors outside the rule."""
    return [item for item in check_graph(gm, new, inputs, backward=True).items if not item.ok]


def _shown(item: CheckItem) -> str:
    return f"{item.name} {item.note or f'error {item.error_ours:.3g}, limit {item.limit:.3g}'}"


def _wrong_in(report: Report) -> str:
    for site in report.sites:
        if site.status == "left" and not (site.reasons and all(r.code and r.message for r in site.reasons)):
            return f"{site.name} is left without a reason"
        for reason in site.reasons:
            if reason.code in ("internal", "emit", "check_failed"):
                return f"{site.name} is left for a fault of ours: {reason.code}: {reason.message}"
    return ""
