"""Tile sizes, warps and pipeline stages per kernel: a table, so that nothing is tuned at run time.

The rows of compute capability 9 were measured on an H100; those of 8 and 10 follow them as far as
the compiler reports no spilled registers (``tests/kernels/test_compile.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Config(NamedTuple):
    """BM queries × BN keys per tile; both divide the map's block of 128, BN is a multiple of 32.

    ``registers``: the most that a thread may have, so that more programs share a multiprocessor.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    registers: int | None = None


def smaller(config: Config) -> Config | None:
    """With fewer stages, else with a smaller tile; ``None`` below the least."""
    if config.stages > 1:
        return config._replace(stages=config.stages - 1)
    if max(config.bm, config.bn) <= 32:
        return None
    wide = config.bn >= config.bm
    return config._replace(bm=config.bm // (1 if wide else 2), bn=config.bn // (2 if wide else 1), warps=4)


_C = Config
_THREE = 168
"""Registers of a thread with which three programs of 4 warps share a multiprocessor."""
# (kernel, capability) → head dims up to 64, up to 128, up to 256
_HALF: dict[tuple[str, int], tuple[Config, Config, Config]] = {
    ("forward", 8): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(64, 32, 4, 2)),
    ("dkdv", 8): (_C(32, 64, 4, 2), _C(64, 64, 8, 2), _C(32, 32, 8, 1)),
    ("dq", 8): (_C(64, 64, 4, 2), _C(64, 32, 4, 2), _C(32, 32, 4, 1)),
    ("forward", 9): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(128, 64, 8, 2)),
    ("dkdv", 9): (_C(64, 64, 4, 3), _C(32, 64, 4, 3), _C(32, 32, 8, 1)),
    ("dq", 9): (_C(64, 64, 4, 3), _C(128, 64, 8, 3), _C(128, 32, 8, 2)),
    ("forward", 10): (_C(64, 64, 4, 3), _C(64, 64, 4, 3), _C(64, 64, 8, 2)),
    ("dkdv", 10): (_C(32, 64, 4, 2), _C(64, 64, 8, 2), _C(32, 32, 8, 1)),
    ("dq", 10): (_C(64, 64, 4, 2), _C(64, 64, 8, 2), _C(64, 32, 8, 1)),
}
# Where tiles come by the tensor memory accelerator
_DESCRIBED: dict[str, tuple[Config, Config, Config]] = {
    "forward": (_C(64, 128, 4, 2), _C(64, 64, 4, 3), _C(128, 64, 8, 2)),
    "dkdv": (_C(64, 64, 4, 3), _C(32, 64, 4, 3), _C(32, 32, 8, 1)),
    "dq": (_C(64, 64, 4, 3, _THREE), _C(64, 64, 4, 2), _C(128, 64, 8, 1)),
}
# There, in these cases
_CASES: tuple[tuple[str, int, Callable[[Kind], bool], Config], ...] = (
    ("dq", 128, lambda kind: kind.dropout or (kind.plain and not kind.masked), _C(128, 64, 8, 3)),
    ("dkdv", 128, lambda kind: kind.plain and not kind.dropout, _C(64, 64, 4, 2)),
    (
        "dkdv",
        64,
        lambda kind: kind.plain and not kind.dropout and not kind.mask_loads,
        _C(64, 64, 4, 3, _THREE),
    ),
)
# There, by what the score loads for each query and key, or is
_LOADS: dict[tuple[str, str, int], Config] = {
    ("forward", "tiles", 64): _C(128, 64, 4, 3),
    ("dkdv", "tiles", 64): _C(32, 64, 4, 2, _THREE),
    ("dq", "tiles", 64): _C(64, 32, 4, 3),
    ("forward", "tiles", 128): _C(64, 64, 4, 2),
    ("dq", "tiles", 128): _C(128, 64, 8, 2),
    ("forward", "mask", 64): _C(64, 64, 4, 3),
    ("dq", "mask", 64): _C(64, 64, 4, 3),
    ("dq", "scattered", 64): _C(64, 64, 4, 3),
    ("dq", "scattered", 128): _C(64, 32, 4, 3),
    ("dq", "distances", 64): _C(64, 64, 4, 3),
    ("forward", "buckets", 64): _C(64, 64, 4, 2),
    ("forward", "line", 64): _C(64, 128, 4, 3),
    ("dq", "line", 128): _C(128, 64, 8, 3),
    **{
        ("dq", loads, 256): _C(128, 32, 8, 2)
        for loads in ("line", "buckets", "distances", "scattered", "tiles", "mask")
    },
}
# There, up to 64, of few keys: less of the last tile lies past the end.
_FEW_KEYS = {("forward", "tiles"): _C(64, 32, 4, 3)}
# There, up to 64, where something is loaded for each key, for which wide tiles have no registers; the second
# with dropout
_BY_KEY = _C(64, 64, 4, 3), _C(64, 64, 4, 2)
# dk and dv by kernels of their own: on capability 9, up to 256
_APART = {"dk": _C(32, 128, 8, 2), "dv": _C(64, 128, 8, 2)}
_DECODE: dict[int, tuple[Config, Config, Config]] = {
    2: (_C(16, 128, 4, 3), _C(16, 64, 4, 3), _C(16, 32, 4, 3)),
    4: (_C(16, 64, 4, 2), _C(16, 32, 8, 2), _C(16, 32, 8, 2)),
}
# Where a bias or a mask is loaded per element its addresses take registers, and its tiles shared memory.
_TILE_LOADS = {
    (8, 64): {"forward": _C(64, 64, 4, 2), "dkdv": _C(32, 64, 4, 2), "dq": _C(64, 32, 4, 2)},
    (8, 128): {"forward": _C(64, 32, 8, 2), "dkdv": _C(32, 32, 8, 2), "dq": _C(32, 32, 8, 2)},
    (9, 64): {"forward": _C(64, 32, 4, 3), "dkdv": _C(32, 64, 4, 2), "dq": _C(64, 32, 4, 2)},
    (9, 128): {"forward": _C(128, 32, 8, 2), "dkdv": _C(32, 32, 4, 2), "dq": _C(64, 32, 4, 2)},
}
_WIDE_LOADS = {
    "forward": _C(64, 32, 4, 1),
    "dkdv": _C(32, 32, 8, 1),
    "dk": _C(32, 64, 4, 1),
    "dv": _C(32, 64, 4, 1),
    "dq": _C(64, 32, 8, 1),
}
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
# From capability 9 on
_PAIRS = {**_TABLE, 2: (_C(64, 64, 4, 2), _C(64, 64, 4, 2), _C(64, 64, 8, 1))}


class Kind(NamedTuple):
    """What the choice depends on.

    ``head_dim`` is the larger of the padded D and Dv, ``itemsize`` the bytes of an element of q,
    ``capability`` the device's major compute capability, ``describes`` that tiles come by the tensor memory
    accelerator, ``plain`` a score ``s*c``, ``masked`` that there is a mask, ``mask_loads`` that it loads
    something, ``by_key`` that something is loaded for each key, ``loads`` what is for each query and key, see
    ``codegen.Generated``, or ``mask`` where only the mask has to; ``pair_bytes`` is the size of an element of
    all tiles that this takes, those of indices too; ``few_keys``, that there are at most 1024 of them.
    """

    head_dim: int
    itemsize: int
    capability: int
    describes: bool
    dropout: bool
    plain: bool
    masked: bool
    mask_loads: bool
    by_key: bool
    loads: str
    pair_bytes: int = 0
    few_keys: bool = False

    @property
    def width(self) -> int:
        """The column of the tables: 64, 128 or 256."""
        return 64 if self.head_dim <= 64 else 128 if self.head_dim <= 128 else 256


def measured(kernel: str, itemsize: int) -> tuple[Config, ...]:
    """All configs of the tables for ``kernel``: each was the fastest somewhere."""
    if kernel == "table":
        square = _TABLE[2 if itemsize == 2 else 4]
        rows = [c for s in square for c in (s, s._replace(warps=8), s._replace(stages=1))]
    elif kernel in _APART:
        rows = [*_APART.values(), _WIDE_LOADS[kernel]]
    elif itemsize != 2:
        rows = list(_SINGLE[kernel])
    else:
        rows = [c for (name, _), row in _HALF.items() if name == kernel for c in row]
        rows += _DESCRIBED[kernel]
        rows += [c for name, *_, c in _CASES if name == kernel]
        rows += [c for (name, *_), c in (*_LOADS.items(), *_FEW_KEYS.items()) if name == kernel]
        rows += [
            *(row[kernel] for row in _TILE_LOADS.values()),
            _WIDE_LOADS[kernel],
            *(_BY_KEY if kernel == "forward" else ()),
        ]
    return tuple(dict.fromkeys(rows))


def are_apart(kind: Kind) -> bool:
    """Whether ``dk`` and ``dv`` are kernels of their own: of wide heads both together spill registers."""
    return kind.capability == 9 and kind.itemsize == 2 and kind.width == 256


def choose(kernel: str, kind: Kind) -> Config:
    """The config of a kernel: forward, dkdv, dk, dv, dq; that of decode is for the fewest rows.

    ``table`` and ``pairs`` are those of tables of distances and of pairs.
    """
    width, size = kind.width, 2 if kind.itemsize == 2 else 4
    column = (64, 128, 256).index(width)
    if kernel in ("decode", "table", "pairs"):
        of_pairs = _PAIRS if kind.capability >= 9 else _TABLE
        config = {"decode": _DECODE, "table": _TABLE, "pairs": of_pairs}[kernel][size][column]
        if kernel != "decode" and kind.capability != 9:
            return config._replace(warps=8)
        return config
    if kernel in _APART:
        if are_apart(kind):
            # What a line gains within a tile of queries is kept for one size of tiles.
            if kind.pair_bytes > 2:
                return _WIDE_LOADS[kernel]
            return _APART["dk" if kind.loads == "line" else kernel]
        kernel = "dkdv"
    if size != 2:
        return _SINGLE[kernel][column]
    tile_loads = _TILE_LOADS.get((9 if kind.capability >= 9 else 8, width), _WIDE_LOADS)
    # More than one bias of 16-bit numbers, with which the other tiles were measured, leaves them no room.
    if kind.pair_bytes > 2:
        return tile_loads[kernel]
    if kind.describes:
        return _described(kernel, kind)
    if kind.loads not in ("", "line") and width < 256:
        return tile_loads[kernel]
    capability = min(max(kind.capability, 8), 10)
    if kernel == "dq" and kind.dropout and capability != 9 and width == 64:
        return tile_loads[kernel]
    return _HALF[kernel, capability][column]


def _described(kernel: str, kind: Kind) -> Config:
    config = _DESCRIBED[kernel][(64, 128, 256).index(kind.width)]
    for name, width, holds, of_case in _CASES:
        if (name, width) == (kernel, kind.width) and holds(kind):
            config = of_case
    if kind.loads:
        config = _LOADS.get((kernel, kind.loads, kind.width), config)
    if kernel == "dkdv" and kind.loads == "tiles" and kind.dropout:
        # Beside a bias it takes the registers that a third program would have.
        config = config._replace(registers=None)
    if kind.few_keys and kind.width == 64:
        config = _FEW_KEYS.get((kernel, kind.loads), config)
    if kernel == "forward" and kind.by_key and config.bn > 64:
        config = _BY_KEY[kind.dropout]
    return config
