"""FlashFuse: fused, block-sparse attention in unmodified PyTorch models, found and checked.

``torch.compile(model, backend="flashfuse")`` needs no import of this package.  The names below load
on first use, so that importing it costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashfuse.api import explain, rewrite, sparsify, verify
    from flashfuse.backend import FlashFuseWarning, clear_reports, last_report, reports
    from flashfuse.functional import AttentionOutput, NotFusible, attention
    from flashfuse.passes.patterns import BlockMask, Butterfly, LocalGlobal
    from flashfuse.report import Report

__version__ = "0.1.0"

_HOMES = {
    "AttentionOutput": "functional",
    "BlockMask": "passes.patterns",
    "Butterfly": "passes.patterns",
    "LocalGlobal": "passes.patterns",
    "NotFusible": "functional",
    "attention": "functional",
    "explain": "api",
    "rewrite": "api",
    "sparsify": "api",
    "verify": "api",
    "FlashFuseWarning": "backend",
    "clear_reports": "backend",
    "last_report": "backend",
    "reports": "backend",
    "Report": "report",
}

__all__ = [
    "AttentionOutput",
    "BlockMask",
    "Butterfly",
    "FlashFuseWarning",
    "LocalGlobal",
    "NotFusible",
    "Report",
    "attention",
    "clear_reports",
    "explain",
    "last_report",
    "reports",
    "rewrite",
    "sparsify",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        # Kept, so that it is found without this function from now on.
        globals()[name] = found = getattr(importlib.import_module(f"flashfuse.{_HOMES[name]}"), name)
        return found
    raise AttributeError(f"module 'flashfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
