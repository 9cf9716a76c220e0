"""``torch.compile(model, backend="flashfuse")``: rewrite, then hand over to the inner compiler."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from flashfuse import pipeline
from flashfuse.options import Options
from flashfuse.report import Report

_lock = threading.Lock()
_reports: deque[Report] = deque(maxlen=10_000)
_warned: set[str] = set()


class FlashFuseWarning(UserWarning):
    """FlashFuse could not do its work; the graph was compiled without it."""


def flashfuse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend.

    Args:
        gm: the traced graph; not changed.
        example_inputs: its (fake) inputs.
        options: see :class:`flashfuse.options.Options`.
        mode: Inductor's mode.

    Returns:
        The compiled graph.  Whatever goes wrong in the rewrite, it is that of the original graph.

    Raises:
        ValueError: an option is wrong.
    """
    chosen = Options.read(options, mode)
    try:
        rewritten, report = pipeline.run(gm, chosen)
    except Exception as error:
        rewritten, report = gm, _failed(gm, "the rewrite failed", error)
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    try:
        compiled = compile_inner(rewritten, example_inputs, chosen)
    except (RestartAnalysis, SkipFrame):
        # Not failures: Inductor asks Dynamo to trace again, and Dynamo will call us again.
        raise
    except Exception as error:
        if rewritten is gm:
            raise
        # If the original does not compile either, that error is the user's, and is raised as it is.
        compiled = compile_inner(gm, example_inputs, chosen)
        report = _failed(gm, "the rewritten graph did not compile", error)
    record(report)
    return compiled


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Hand ``gm`` to the inner compiler."""
    if options.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = dict(list_mode_options(options.mode)) if options.mode not in (None, "default") else {}
        patches |= {name.replace("-", "_"): value for name, value in options.inductor.items()}
        return compile_fx(gm, example_inputs, config_patches=patches or None)  # type: ignore[return-value, arg-type]
    import torch._dynamo

    inner = torch._dynamo.lookup_backend(options.inner) if isinstance(options.inner, str) else options.inner
    return inner(gm, list(example_inputs))


def _failed(gm: fx.GraphModule, what: str, error: Exception) -> Report:
    message = f"{what}, so this graph was compiled without FlashFuse: {type(error).__name__}: {error}"
    with _lock:
        first = message not in _warned
        _warned.add(message)
    if first:
        warnings.warn(message, FlashFuseWarning, stacklevel=3)
    n = len(gm.graph.nodes)
    return Report(graph_name=type(gm).__name__, num_nodes_before=n, num_nodes_after=n, warnings=(message,))


def record(report: Report) -> None:
    with _lock:
        _reports.append(report)


def reports() -> tuple[Report, ...]:
    """The reports of the graphs compiled in this process since :func:`clear_reports`, in order."""
    with _lock:
        return tuple(_reports)


def last_report() -> Report | None:
    """The report of the last graph compiled in this process, or ``None``."""
    with _lock:
        return _reports[-1] if _reports else None


def clear_reports() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()
