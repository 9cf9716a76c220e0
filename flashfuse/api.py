"""``explain``, ``rewrite`` and ``verify``: for any module, function or ``fx.GraphModule``."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import fx

from flashfuse import pipeline
from flashfuse.checker import check_graph
from flashfuse.options import Options
from flashfuse.report import CheckItem, ModelCheck, Report


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What FlashFuse would do with ``model(*args, **kwargs)``; nothing is compiled or changed.

    The model runs once, traced by Dynamo.  Every fused site is compared with the original on random
    and hostile inputs, and every graph on its own inputs (outputs and gradients, dropout taken out).

    Returns:
        One report of all graphs that Dynamo made.
    """
    found: list[tuple[Report, ModelCheck]] = []

    def look(original: fx.GraphModule, inputs: Sequence[Any]) -> None:
        rewritten, report = pipeline.run(original, Options(verify="full"))
        found.append((report, check_graph(original, rewritten, inputs, backward=True)))

    _each_graph(model, args, kwargs, look)
    return pipeline.merged([r for r, _ in found], check=_merged_checks([c for _, c in found]))


def verify(model: Callable[..., Any], *args: Any, backward: bool = True, **kwargs: Any) -> ModelCheck:
    """Compare ``model(*args, **kwargs)`` with its rewrite: outputs and, with ``backward``, gradients.

    The rule: our error against float64 ≤ 2 × the original's error against float64, plus rounding.
    Random state, parameters, buffers and gradients of the model stay as they are.
    """
    found: list[ModelCheck] = []

    def look(original: fx.GraphModule, inputs: Sequence[Any]) -> None:
        rewritten, _ = pipeline.run(original, Options())
        found.append(check_graph(original, rewritten, inputs, backward))

    _each_graph(model, args, kwargs, look)
    return _merged_checks(found)


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
        options: ``verify`` as for the backend.

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

    # Dynamo counts compilations by code object: a fresh one leaves the model's own compiled code alone,
    # and the limit must not end the search silently.
    fresh = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    # Sizes that changed since an earlier call must not become symbolic: sites of known size are checked.
    settings = {"recompile_limit": 1 << 20, "automatic_dynamic_shapes": False}
    with _undisturbed(model), torch._dynamo.config.patch(settings):
        torch.compile(fresh, backend=collect)(*args, **kwargs)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Random state and buffers as before."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if isinstance(model, torch.nn.Module) else []
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


def _merged_checks(checks: Sequence[ModelCheck]) -> ModelCheck:
    if not checks:
        note = "Dynamo traced no graph, so nothing was compared"
        nothing = CheckItem("graph", math.inf, 0.0, 0.0, False, note)
        return ModelCheck(False, (nothing,))
    items: tuple[CheckItem, ...] = tuple(i for c in checks for i in c.items)
    peak = max((c.peak_bytes or 0 for c in checks), default=0)
    return ModelCheck(all(c.ok for c in checks), items, peak or None)
