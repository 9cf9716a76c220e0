"""Tile sizes, warps and pipeline stages per kernel: a table, so that nothing is tuned at run time.

The rows of compute capability 9 were measured on an H100; those of 8 and 10 follow them as far as
the compiler reports no spilled registers (``tests/kernels/test_compile.py``).
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """BM queries × BN keys per tile; both divide the map's block of 128, BN is a multiple of 32."""

    bm: int
    bn: int
    warps: int
    stages: int


Row = tuple[Config, Config, Config, Config]
"""Head dims up to 64, up to 128, up to 256; and up to 64 with dropout."""

_C = Config
_HALF: dict[tuple[str, int], Row] = {
    ("forward", 8): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(64, 32, 4, 2), _C(64, 64, 4, 3)),
    ("dkdv", 8): (_C(32, 64, 4, 2), _C(64, 64, 8, 2), _C(32, 32, 8, 1), _C(32, 64, 4, 2)),
    ("dq", 8): (_C(64, 64, 4, 2), _C(64, 32, 4, 2), _C(32, 32, 4, 1), _C(64, 32, 4, 2)),
    ("forward", 9): (_C(64, 128, 4, 2), _C(64, 64, 4, 3), _C(128, 64, 8, 2), _C(64, 64, 4, 3)),
    ("dkdv", 9): (_C(64, 64, 4, 3), _C(32, 64, 4, 3), _C(32, 32, 8, 1), _C(64, 64, 4, 2)),
    ("dq", 9): (_C(128, 64, 4, 3), _C(128, 64, 8, 3), _C(64, 32, 8, 2), _C(64, 32, 4, 3)),
    ("forward", 10): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(64, 64, 8, 2), _C(64, 64, 4, 3)),
    ("dkdv", 10): (_C(32, 64, 4, 2), _C(64, 64, 8, 2), _C(32, 32, 8, 1), _C(32, 64, 4, 2)),
    ("dq", 10): (_C(64, 64, 4, 2), _C(64, 64, 8, 2), _C(64, 32, 8, 1), _C(64, 32, 4, 2)),
}
_SINGLE: dict[str, Row] = {
    "forward": (_C(32, 32, 4, 2), _C(32, 32, 8, 2), _C(32, 32, 8, 1), _C(32, 32, 4, 2)),
    "dkdv": (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(32, 32, 8, 1)),
    "dq": (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(16, 32, 8, 1), _C(32, 32, 8, 1)),
}


def choose(kernel: str, head_dim: int, itemsize: int, capability: int, dropout: bool) -> Config:
    """The config of a kernel.

    Args:
        kernel: ``forward``, ``dkdv`` or ``dq``.
        head_dim: the larger of the padded D and Dv.
        itemsize: bytes of an element of q.
        capability: major compute capability of the device.
    """
    if itemsize == 2:
        row = _HALF[kernel, min(max(capability, 8), 10)]
    else:
        row = _SINGLE[kernel]
    if head_dim <= 64:
        return row[3] if dropout else row[0]
    return row[1] if head_dim <= 128 else row[2]
