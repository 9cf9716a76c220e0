"""Tile sizes, warps and pipeline stages per kernel: a table, so that nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """BM queries × BN keys per tile; both divide the map's block of 128, BN is a multiple of 32."""

    bm: int
    bn: int
    warps: int
    stages: int


_HALF = {
    # kernel → padded head dim (the larger of D and Dv) → config
    "forward": {
        64: Config(64, 128, 4, 3),
        128: Config(64, 64, 4, 3),
        256: Config(64, 32, 4, 2),
    },
    "dkdv": {
        64: Config(64, 64, 4, 2),
        128: Config(32, 64, 4, 2),
        256: Config(32, 32, 4, 1),
    },
    "dq": {
        64: Config(64, 64, 4, 2),
        128: Config(64, 32, 4, 2),
        256: Config(32, 32, 4, 1),
    },
}
_SINGLE = {
    "forward": {64: Config(32, 32, 4, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 32, 8, 1)},
    "dkdv": {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
    "dq": {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
}


def choose(kernel: str, head_dim: int, itemsize: int) -> Config:
    """The config of ``forward``, ``dkdv`` or ``dq`` for padded ``head_dim`` and the dtype's size in bytes."""
    table = (_HALF if itemsize == 2 else _SINGLE)[kernel]
    return table[next(bucket for bucket in (64, 128, 256) if head_dim <= bucket)]
