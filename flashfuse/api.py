"""``explain``, ``rewrite`` and ``verify``: for any module, function or ``fx.GraphModule``."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import fx

from flashfuse import pipeline
from flashfuse.approximation import by_definition
from flashfuse.footprint import PeakMemory, undisturbed
from flashfuse.numbers import check_graph, without_dropout
from flashfuse.options import Options
from flashfuse.passes.patterns import Sparsity
from flashfuse.report import CheckItem, ModelCheck, Report

AGAINST_DEFINITION = "against attention by definition under the same pattern, without dropout"


def _silent(step: str) -> None:
    """Nobody wants to know."""


def explain(
    model: Callable[..., Any], *args: Any, on_step: Callable[[str], None] = _silent, **kwargs: Any
) -> Report:
    """What FlashFuse would do with ``model(*args, **kwargs)``; nothing is compiled or changed.

    The model runs once, traced by Dynamo.  Every site is proved, and compared with the original on
    random and hostile inputs; every graph is compared on its own inputs (outputs and gradients,
    dropout taken out).  ``on_step`` is told what is being done.

    Returns:
        One report of all graphs that Dynamo made.
    """
    reports, check = _examine(model, args, kwargs, Options(verify="full"), True, on_step)
    return pipeline.merged(reports, check=dataclasses.replace(check, sites=()))


def verify(
    model: Callable[..., Any],
    *args: Any,
    backward: bool = True,
    options: Mapping[str, Any] | None = None,
    on_step: Callable[[str], None] = _silent,
    **kwargs: Any,
) -> ModelCheck:
    """Prove every site of ``model(*args, **kwargs)``, and compare the whole model with its rewrite.

    The rule for the numbers, outputs and, with ``backward``, gradients: our error against float64 ≤
    2 × the original's error against float64, plus rounding.  Random state, parameters, buffers, modes
    and gradients of the model stay as they are.

    Args:
        options: ``verify`` (default ``proof``; ``full`` adds numbers for each site), ``repro``,
            ``kernels`` and ``sparsity``, as for the backend.  A model with approximate sites is compared with
            attention by definition under the same patterns.
        on_step: is told what is being done.
    """
    chosen = Options.read({"verify": "proof", **(options or {})})
    return _examine(model, args, kwargs, chosen, backward, on_step)[1]


def _examine(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    backward: bool,
    on_step: Callable[[str], None],
) -> tuple[list[Report], ModelCheck]:
    """The report of each graph, and one check of all."""
    found: list[tuple[Report, ModelCheck]] = []

    def look(original: fx.GraphModule, inputs: Sequence[Any]) -> None:
        rewritten, report = pipeline.run(original, options, on_step)
        on_step("comparing the whole model")
        if report.num_approximate:
            expected = by_definition(without_dropout(rewritten))
            check = check_graph(expected, rewritten, inputs, backward)
            check = dataclasses.replace(check, notes=(*check.notes, AGAINST_DEFINITION))
        else:
            check = check_graph(original, rewritten, inputs, backward)
        found.append((report, check))

    with PeakMemory() as peak:
        _each_graph(model, args, kwargs, look)
    reports = [report for report, _ in found]
    return reports, _merged_checks(reports, [check for _, check in found], peak.bytes)


def sparsify(
    model: Callable[..., Any],
    pattern: Sparsity | str,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """``model`` compiled with block-sparse attention, an approximation, forward and backward.

    Each site is found and proved as ever; then its mask becomes ``mask and pattern``.  The report says so,
    with the density of each site, and :func:`verify` with ``options={"sparsity": pattern}`` compares the
    kernels with attention by definition under the pattern.

    Args:
        pattern: :class:`~flashfuse.Butterfly`, :class:`~flashfuse.LocalGlobal`, a
            :class:`~flashfuse.BlockMask`, a condition such as ``"abs(q//128 - kv//128) <= 4 or kv < 128"``
            where ``q`` is the position of the query among the keys, several joined by ``|``, or a function
            of the :class:`~flashfuse.report.AttentionShape` of a site that gives one, or ``None`` for exact
            attention.
        dynamic, fullgraph: as for ``torch.compile``.
        options: those of the backend.

    Raises:
        ValueError: no pattern, or an option that is not known.
    """
    chosen = {**options, "sparsity": pattern}
    if pattern is None:
        raise ValueError("expected a pattern, got None")
    Options.read(chosen)
    return torch.compile(model, backend="flashfuse", options=chosen, dynamic=dynamic, fullgraph=fullgraph)


def rewrite(
    gm: fx.GraphModule, example_args: Sequence[Any] = (), *, options: Mapping[str, Any] | None = None
) -> tuple[fx.GraphModule, Report]:
    """Rewrite one ``fx.GraphModule`` from Dynamo, ``symbolic_trace`` or ``torch.export``.

    Sizes that the graph does not know as symbols are those of its example values: a graph of
    ``symbolic_trace`` is rewritten for the shapes of ``example_args``, and has no guard that says so.

    Args:
        gm: not changed.
        example_args: inputs of ``gm``, needed where its nodes do not know their shapes
            (``symbolic_trace``).
        options: ``verify``, ``repro``, ``kernels`` and ``sparsity`` as for the backend.

    Raises:
        TypeError: ``gm`` is no ``fx.GraphModule``.
        ValueError: shapes are not known and ``example_args`` do not give them.
    """
    if not isinstance(gm, fx.GraphModule):
        hint = "; use .module() of an ExportedProgram" if hasattr(gm, "graph_signature") else ""
        raise TypeError(f"expected a torch.fx.GraphModule, got {type(gm).__name__}{hint}")
    chosen = Options.read(options)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    known = all("val" in n.meta or "example_value" in n.meta for n in placeholders)
    if not known and len(example_args) != len(placeholders):
        names = ", ".join(n.name for n in placeholders)
        raise ValueError(f"expected example_args for the inputs {names}, got {len(example_args)}")
    return pipeline.run(pipeline.with_example_values(gm, example_args), chosen)


# --- capture ------------------------------------------------------------------------------------


def _each_graph(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    look: Callable[[fx.GraphModule, Sequence[Any]], None],
) -> None:
    """Run the model once and show ``look`` every graph with the inputs it ran on."""
    if not callable(model):
        raise TypeError(f"expected a module or a function, got {type(model).__name__}")

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen = False

        def run(*inputs: Any) -> Any:
            nonlocal seen
            if not seen:
                seen = True
                look(gm, inputs)
            return gm(*inputs)

        return run

    # Dynamo names the model's inputs after these arguments; the lift knows them as ``args`` and ``kwargs``.
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # The model's own compiled code is left alone, and the limit must not end the search silently.
    fresh = counted_apart(call)
    # Sizes that changed since an earlier call must not become symbolic: sites of known size are checked.
    settings = {"recompile_limit": 1 << 20, "automatic_dynamic_shapes": False}
    with undisturbed(model, args, kwargs), torch._dynamo.config.patch(settings):
        torch.compile(fresh, backend=collect)(*args, **kwargs)


def counted_apart(function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """A copy of ``function`` whose compilations Dynamo, which counts by code object, counts by themselves.

    Which sizes change from call to call it keeps by ``name``.
    """
    assert isinstance(function, types.FunctionType)
    name = name or function.__name__
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def _merged_checks(reports: Sequence[Report], checks: Sequence[ModelCheck], peak: int) -> ModelCheck:
    if not checks:
        note = "Dynamo traced no graph, so nothing was compared"
        return ModelCheck(False, (CheckItem("graph", math.inf, 0.0, 0.0, False, note),))
    return ModelCheck(
        ok=all(c.ok for c in checks) and all(r.ok for r in reports),
        items=tuple(i for c in checks for i in c.items),
        sites=tuple(site for r in reports for site in r.sites),
        notes=tuple(dict.fromkeys(note for c in checks for note in c.notes)),
        peak_bytes=peak,
        proof_ms=sum(r.proof_ms for r in reports),
    )
