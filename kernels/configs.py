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


_C = Config
# (kernel, capability) → head dims up to 64, up to 128, up to 256; up to 64 with dropout
_HALF: dict[tuple[str, int], tuple[Config, Config, Config, Config]] = {
    ("forward", 8): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(64, 32, 4, 2), _C(64, 64, 4, 3)),
    ("dkdv", 8): (_C(32, 64, 4, 2), _C(64, 64, 8, 2), _C(32, 32, 8, 1), _C(32, 64, 4, 2)),
    ("dq", 8): (_C(64, 64, 4, 2), _C(64, 32, 4, 2), _C(32, 32, 4, 1), _C(64, 32, 4, 2)),
    ("forward", 9): (_C(128, 64, 4, 3), _C(64, 64, 4, 3), _C(128, 64, 8, 2), _C(64, 64, 4, 3)),
    ("dkdv", 9): (_C(64, 64, 4, 3), _C(32, 64, 4, 3), _C(64, 64, 8, 1), _C(64, 64, 4, 3)),
    ("dq", 9): (_C(128, 64, 4, 3), _C(128, 64, 8, 3), _C(128, 32, 8, 2), _C(64, 32, 4, 3)),
    ("forward", 10): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(64, 64, 8, 2), _C(64, 64, 4, 3)),
    ("dkdv", 10): (_C(32, 64, 4, 2), _C(64, 64, 8, 2), _C(32, 32, 8, 1), _C(32, 64, 4, 2)),
    ("dq", 10): (_C(64, 64, 4, 2), _C(64, 64, 8, 2), _C(64, 32, 8, 1), _C(64, 32, 4, 2)),
}
_DECODE: dict[int, tuple[Config, Config, Config]] = {
    2: (_C(16, 128, 4, 3), _C(16, 64, 4, 3), _C(16, 32, 4, 3)),
    4: (_C(16, 64, 4, 2), _C(16, 32, 8, 2), _C(16, 32, 8, 2)),
}
# Where every tile is full, on capability 9: (kernel, bucket, long sequences)
_DENSE: dict[tuple[str, int, bool], Config] = {
    ("forward", 64, False): _C(64, 64, 4, 3),
    ("forward", 64, True): _C(64, 64, 4, 3),
    ("forward", 128, True): _C(128, 128, 8, 3),
    ("dkdv", 128, True): _C(64, 128, 8, 3),
}
_LONG = 4096
# Where a bias or a mask is loaded per element its addresses take registers, and its tiles shared memory.
_TILE_LOADS = {"forward": _C(64, 64, 4, 2), "dkdv": _C(32, 64, 4, 2), "dq": _C(64, 32, 4, 2)}
# Entries of tables, on capability 9: head dims up to 64, up to 128
_SCATTERED = {
    "forward": (_C(64, 64, 4, 3), _C(64, 64, 4, 3)),
    "dkdv": (_C(32, 64, 4, 3), _C(32, 64, 4, 2)),
    "dq": (_C(64, 32, 4, 3), _C(64, 32, 4, 3)),
}
# One table of distances, on capability 9, head dims up to 64
_DISTANCES = {"forward": _C(128, 64, 4, 3), "dkdv": _C(64, 64, 4, 3), "dq": _C(64, 64, 4, 3)}
_SINGLE: dict[str, tuple[Config, Config, Config]] = {
    "forward": (_C(32, 32, 4, 2), _C(32, 32, 8, 2), _C(16, 32, 8, 1)),
    "dkdv": (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(16, 32, 8, 1)),
    "dq": (_C(32, 32, 8, 1), _C(32, 32, 8, 1), _C(16, 32, 8, 1)),
}
# Square tiles.
_TABLE: dict[int, tuple[Config, Config, Config]] = {
    2: (_C(64, 64, 4, 2), _C(64, 64, 4, 2), _C(32, 32, 4, 1)),
    4: (_C(32, 32, 4, 1), _C(32, 32, 8, 1), _C(32, 32, 8, 1)),
}


class Kind(NamedTuple):
    """What the choice depends on.

    ``head_dim`` is the larger of the padded D and Dv, ``itemsize`` the bytes of an element of q,
    ``capability`` the device's major compute capability, ``plain`` a score ``s*c`` without a mask,
    ``loads`` is ``tiles`` where something is loaded per element, ``scattered`` where entries of tables are,
    ``distances`` where those of one table of distances are, ``line`` where the score is a line over the keys.
    """

    head_dim: int
    itemsize: int
    capability: int
    dropout: bool
    plain: bool
    loads: str
    length: int


def measured(kernel: str, itemsize: int) -> tuple[Config, ...]:
    """All configs of the tables for ``kernel``: each was the fastest somewhere."""
    if kernel == "table":
        square = _TABLE[2 if itemsize == 2 else 4]
        rows = [c for s in square for c in (s, s._replace(warps=8, stages=1), s._replace(stages=1))]
    elif itemsize != 2:
        rows = list(_SINGLE[kernel])
    else:
        rows = [c for (name, _), row in _HALF.items() if name == kernel for c in row]
        rows += [c for (name, *_), c in _DENSE.items() if name == kernel]
        rows += [_TILE_LOADS[kernel], *_SCATTERED[kernel], _DISTANCES[kernel]]
    return tuple(dict.fromkeys(rows))


def choose(kernel: str, kind: Kind) -> Config:
    """The config of ``forward``, ``dkdv``, ``dq`` or ``table``; that of ``decode`` is for the fewest rows."""
    bucket = 0 if kind.head_dim <= 64 else 1 if kind.head_dim <= 128 else 2
    if kernel in ("decode", "table"):
        config = {"decode": _DECODE, "table": _TABLE}[kernel][2 if kind.itemsize == 2 else 4][bucket]
        if kernel == "table" and kind.capability != 9:
            return config._replace(warps=8, stages=1)
        return config
    if kind.itemsize != 2:
        return _SINGLE[kernel][bucket]
    capability = min(max(kind.capability, 8), 10)
    if kind.loads == "line":
        if capability == 9 and kernel == "dq" and not bucket:
            return _DISTANCES[kernel]
    elif kind.loads and bucket < 2:
        if capability != 9 or kind.loads == "tiles":
            return _TILE_LOADS[kernel]
        if kind.loads == "distances" and not bucket:
            config = _DISTANCES[kernel]
            return config._replace(stages=2) if kernel == "dkdv" and kind.dropout else config
        return _SCATTERED[kernel][bucket]
    if capability == 9 and kind.plain and not kind.dropout:
        dense = _DENSE.get((kernel, (64, 128, 256)[bucket], kind.length >= _LONG))
        if dense is not None:
            return dense
    return _HALF[kernel, capability][3 if kind.dropout and bucket == 0 else bucket]
