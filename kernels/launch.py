"""How a kernel is launched: one place for the options that every launch shares."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, num_stages: int = 1) -> None:
    """Run ``kernel`` as ``programs`` programs; the constexprs are the last of ``args``."""
    kernel[(programs,)](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
