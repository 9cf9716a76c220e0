"""The grid of sites that the kernels are held to, in pieces: a covering array, and all of it in random order.

A :class:`Point` is a value of each axis; :meth:`Grid.case` makes a :class:`kernel_cases.Case` of it.
The grid has some 400 000 points, too many to run at once, so :meth:`Grid.covering` picks few of them in
which any two (or three) values of different axes meet, as far as they can, and :meth:`Grid.shuffled` gives
all in random order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import Case, measure_case
from torch import Tensor

from flashfuse.kernels.spec import ScoreProgram
from flashfuse.report import CheckItem

Value = Any
"""A string or a number."""
Row = dict[str, Value]
"""Values by axis."""
Chosen = tuple[tuple[str, Value], ...]
Sizes = tuple[int, int, int, int]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = {d: (d, d) for d in (16, 40, 64, 96, 128)} | {"192/128": (192, 128), 256: (256, 256)}
HEADS = {1: (2, 2, 2), 3: (2, 6, 2), 8: (2, 8, 1)}
"""Query heads that share a key head → (B, H, H_kv)."""
FEW_HEADS = {1: (2, 1, 1), 3: (1, 3, 1), 8: (1, 8, 1)}
RELATIONS = ("same", "more keys", "more queries")
NEVER_DEAD = ("none", "causal", "prefix")
MODES = ("mean", "uniform", "nan", "zero")
BLOCK = 128
"""Edge of the blocks of the block-sparse masks."""
BUCKETS = 32

MASKS = {
    "none": "",
    "causal": "kv <= {q}",
    "window": "kv <= {q} and kv > {q} - {window}",
    "prefix": "kv <= {q} or kv < prefix[b]",
    "document": "doc[b, q] == doc[b, kv]",
    "padding": "kv <= {q} and pad[b, kv]",
    "blocks": "keep[0, q // 128, kv // 128]",
    "blocks by head": "keep[h, q // 128, kv // 128]",
    "dead rows": "kv <= {q} and alive[b, q]",
}
"""``{q}`` is the last key that a query may see: q, or the end-aligned one where there are more keys."""

PROGRAMS = {
    "plain": "s*{scale}",
    "bias": "s*{scale} + bias[0, h, q, kv]",
    "T5": "s*{scale} + table[bucket[kv - q + Sq - 1], h]",
    "ALiBi": "s*{scale} + slope[h]*(kv - q)",
    "softcap": "tanh(s*{capped})*20.0",
    "sinks": "s*{scale}",
    "gather": "s*{scale} + near[h, q, bucket[kv - q + Sq - 1]]",
}
GRADS = ("bias", "table", "sinks", "near")
"""Captures whose gradients are compared."""


def _starts(b: int, skv: int) -> Tensor:
    """[B, 1]: the first sequence is padded on the left, the others not at all."""
    return torch.tensor([skv // 3] + [0] * (b - 1))[:, None]


def _ends(b: int, skv: int) -> Tensor:
    return torch.tensor([skv] + [skv - skv // 4] * (b - 1))[:, None]


def _keep(sizes: Sizes, heads: int) -> Tensor:
    """[heads, rows, columns]: half of the blocks, and the first."""
    _, _, sq, skv = sizes
    keep = torch.rand(heads, -(-sq // BLOCK), -(-skv // BLOCK)) < 0.5
    keep[:, 0, 0] = True
    return keep


def _alive(b: int, h: int, sq: int, skv: int) -> Tensor:
    """[B, Sq]: every third query has no key, nor has the last third of the first sequence."""
    alive = (torch.arange(sq) % 3 != 1).repeat(b, 1)
    alive[0, sq - sq // 3 :] = False
    return alive


def _sinks(b: int, h: int, sq: int, skv: int) -> Tensor:
    """[H]: the first of several heads has none, so that its rows can be dead."""
    sinks = 2 * torch.randn(h)
    sinks[: int(h > 1)] = -torch.inf
    return sinks


def _bucket(b: int, h: int, sq: int, skv: int) -> Tensor:
    """[Sq + Skv − 1]: near distances have a bucket each, far ones share the outermost."""
    return (torch.arange(sq + skv - 1) - (sq - 1)).clamp(-BUCKETS // 2, BUCKETS // 2 - 1) + BUCKETS // 2


CAPTURES: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "prefix": lambda b, h, sq, skv: torch.randint(0, skv + 1, (b,)),
    "doc": lambda b, h, sq, skv: torch.randint(0, 2, (b, n := max(sq, skv))).cumsum(-1) // (1 + n // 6),
    "pad": lambda b, h, sq, skv: (torch.arange(skv) >= _starts(b, skv)) & (torch.arange(skv) < _ends(b, skv)),
    "alive": _alive,
    "bias": lambda b, h, sq, skv: torch.randn(1, h, sq, skv),
    "table": lambda b, h, sq, skv: torch.randn(BUCKETS, h),
    "slope": lambda b, h, sq, skv: 2.0 ** -torch.arange(1, h + 1),
    "sinks": _sinks,
    "near": lambda b, h, sq, skv: torch.randn(h, sq, BUCKETS),
    "bucket": _bucket,
}


@dataclass(frozen=True)
class Point:
    """A value of each axis.  ``length`` is that of q, k or both; which, ``relation`` says.

    ``dead`` is what a row without a key gives, ``"none"`` where every row has one.
    """

    dtype: str
    dims: Value
    length: int
    relation: str
    group: int
    mask: str
    dead: str
    program: str
    dropout: float

    def __str__(self) -> str:
        return ",".join(str(getattr(self, axis)) for axis in AXES)

    @property
    def kernels(self) -> tuple[Value, ...]:
        """Points that agree in this share most of their compiled kernels."""
        return tuple(getattr(self, axis) for axis in KERNEL_AXES)


AXES = tuple(field.name for field in dataclasses.fields(Point))
OTHER_AXES = ("length", "relation", "group")
KERNEL_AXES = tuple(axis for axis in AXES if axis not in OTHER_AXES)


@dataclass(frozen=True)
class Grid:
    """The values of each axis, and how long the other side is where Sq and Skv differ.

    ``partner`` maps each length to another one; the longer of the two is that of the keys under
    ``"more keys"``, of the queries under ``"more queries"``.
    """

    partner: dict[int, int]
    dims: tuple[Value, ...] = tuple(DIMS)
    heads: dict[int, tuple[int, int, int]] = dataclasses.field(default_factory=lambda: HEADS)
    one_beyond: int = 1 << 20
    """One sequence where H · Sq · Skv is larger: the reference holds matrices of float64."""
    most: int = 1 << 40
    """No points where H · Sq · Skv is larger."""
    window: int = 100

    @functools.cached_property
    def values(self) -> dict[str, tuple[Value, ...]]:
        return {
            "dtype": tuple(DTYPES),
            "dims": self.dims,
            "length": tuple(self.partner),
            "relation": RELATIONS,
            "group": tuple(self.heads),
            "mask": tuple(MASKS),
            "dead": ("none", *MODES),
            "program": tuple(PROGRAMS),
            "dropout": (0.0, 0.17),
        }

    def allows(self, row: Row) -> bool:
        """Whether a point can have these values of some axes."""
        if "mask" in row and "dead" in row and (row["mask"] in NEVER_DEAD) != (row["dead"] == "none"):
            return False
        if not {"length", "relation", "group"} <= row.keys():
            return True
        sq, skv = self.lengths(row["length"], row["relation"])
        return self.heads[row["group"]][1] * sq * skv <= self.most

    def rows(self, axes: Sequence[str]) -> list[Row]:
        """All combinations of the values of ``axes``."""
        rows = (
            dict(zip(axes, values, strict=True)) for values in itertools.product(*map(self.values.get, axes))
        )
        return [row for row in rows if self.allows(row)]

    def __len__(self) -> int:
        return len(self.rows(KERNEL_AXES)) * len(self.rows(OTHER_AXES))

    def parse(self, text: str) -> Point:
        """The point that ``str`` printed.

        Raises:
            ValueError: not a point of this grid.
        """
        given = dict(zip(AXES, text.split(","), strict=False))
        found = {a: next((v for v in self.values[a] if str(v) == given.get(a)), None) for a in AXES}
        unknown = [axis for axis, value in found.items() if value is None]
        if unknown or not self.allows(found):
            raise ValueError(f"expected {', '.join(AXES)}, got {text!r}: {', '.join(unknown) or 'dead'}")
        return Point(**found)

    def lengths(self, length: int, relation: str) -> tuple[int, int]:
        """(Sq, Skv)"""
        if relation == "same":
            return length, length
        short, long = sorted((length, self.partner[length]))
        return (short, long) if relation == "more keys" else (long, short)

    def case(self, point: Point) -> Case:
        """The site of ``point``: program text, captures in the program's order, and their gradients."""
        sq, skv = self.lengths(point.length, point.relation)
        batch, heads, kv_heads = self.heads[point.group]
        dims = DIMS[point.dims]
        # A softmax of unit scale: q and k are standard normal.
        scale = dims[0] ** -0.5
        score = PROGRAMS[point.program].format(scale=f"{scale:.6g}", capped=f"{scale / 10:.6g}")
        last = "q + Skv - Sq" if point.relation == "more keys" else "q"
        mask = MASKS[point.mask].format(q=last, window=self.window)
        text = score
        text += f" where {mask}" if mask else ""
        text += " sink sinks[h]" if point.program == "sinks" else ""
        text += f" else {point.dead}" if point.dead != "none" else ""
        names = ScoreProgram.parse(text).captures
        batch = batch if heads * sq * skv <= self.one_beyond else 1

        def captures(b: int, h: int, sq: int, skv: int) -> Sequence[Tensor]:
            by_head = h if point.mask == "blocks by head" else 1
            return [
                _keep((b, h, sq, skv), by_head) if n == "keep" else CAPTURES[n](b, h, sq, skv) for n in names
            ]

        return Case(
            text,
            sizes=(batch, heads, sq, skv),
            kv_heads=kv_heads,
            dims=dims,
            captures=captures,
            grads=tuple(i for i, name in enumerate(names) if name in GRADS),
            dropout_p=point.dropout,
            dtype=DTYPES[point.dtype],
        )

    def covering(self, strength: int, seed: int = 0) -> list[Point]:
        """Few points in which any ``strength`` values of different axes meet, where a point can have them.

        Greedy (Cohen et al., The AETG System, 1997): each point starts from values that have not met, and
        takes axis by axis what makes most of them meet; the best of a few tries is kept.
        """
        draw = random.Random(seed)
        # A dictionary: its order does not depend on the hashes of strings.
        missing = dict.fromkeys(
            tuple(row.items()) for axes in itertools.combinations(AXES, strength) for row in self.rows(axes)
        )
        points = []
        while missing:
            tries = [self._complete(dict(next(iter(missing))), missing, strength, draw) for _ in range(TRIES)]
            _, best = max(tries, key=lambda found: found[0])
            for met in _met(best, AXES, strength):
                missing.pop(met, None)
            points.append(Point(**best))
        return points

    def _complete(
        self, start: Row, missing: dict[Chosen, None], strength: int, draw: random.Random
    ) -> tuple[int, Row]:
        """How many missing combinations a point has that contains ``start``, and the point."""
        row = dict(start)
        gain = 1
        rest = [axis for axis in AXES if axis not in row]
        draw.shuffle(rest)
        for axis in rest:
            scores = []
            for value in self.values[axis]:
                wider = {**row, axis: value}
                if self.allows(wider):
                    others = [a for a in AXES if a in row]
                    new = sum(c in missing for c in _met(wider, others, strength, axis))
                    scores.append((new, draw.random(), value))
            new, _, row[axis] = max(scores)
            gain += new
        return gain, row

    def shuffled(self, seed: int = 0, part: int = 0, parts: int = 1) -> Iterator[Point]:
        """Every point once, in a fixed random order; of ``parts`` equal parts the one with this number.

        Points that share kernels follow each other in small groups, for most of the time goes into compiling.
        """
        shared, others = self.rows(KERNEL_AXES), self.rows(OTHER_AXES)
        random.Random(seed).shuffle(shared)
        rounds = -(-len(others) // TOGETHER)
        for turn in range(rounds):
            for i, row in enumerate(shared):
                if (turn * len(shared) + i) % parts == part:
                    # Another order for each, the same in every round.
                    order = random.Random(f"{seed} {i}").sample(others, len(others))
                    for rest in order[turn * TOGETHER : (turn + 1) * TOGETHER]:
                        yield Point(**row, **rest)


TRIES = 8
TOGETHER = 6
"""Points with the same kernels that :meth:`Grid.shuffled` gives one after another."""


def _met(row: Row, axes: Sequence[str], strength: int, new: str | None = None) -> Iterator[Chosen]:
    """The combinations of ``row`` over ``axes``; with ``new``, those that contain this axis."""
    for some in itertools.combinations(axes, strength if new is None else strength - 1):
        names = some if new is None else sorted((*some, new), key=AXES.index)
        yield tuple((a, row[a]) for a in names)


FULL = Grid({1: 257, 63: 1000, 128: 2051, 257: 63, 1000: 128, 2051: 1}, one_beyond=1 << 23)
"""The whole grid, for a GPU."""
CPU = Grid({1: 257, 63: 1000, 128: 257, 257: 63, 1000: 128})
"""For the CPU variant."""
INTERPRETER = Grid(
    {1: 63, 33: 129, 63: 1, 129: 1}, (16, 40), FEW_HEADS, one_beyond=5000, most=17_000, window=20
)
"""As much as Triton's interpreter can run in time."""


# --- running ------------------------------------------------------------------------------------

LUCK = 8
"""A sink's gradient may have two elements, both of which the original happens to have nearly exactly."""


@dataclass(frozen=True)
class Outcome:
    """What came of a point: every comparison, what is wrong, and what was only bad luck.

    ``failure`` and ``luck`` are sentences, empty where all is well.
    """

    point: Point
    items: tuple[CheckItem, ...]
    failure: str = ""
    luck: str = ""

    @property
    def worst(self) -> tuple[float, str]:
        """The largest error in parts of what the rule allows, and of which tensor."""
        ratios = ((i.error_ours / i.limit, i.name) for i in self.items if i.limit)
        return max(ratios, default=(0.0, "")) if self.items else (0.0, "")


def check(implementation: Any, grid: Grid, point: Point, device: str, seed: int = 0) -> Outcome:
    """Forward, backward and capture gradients of ``point`` against float64 under the rule.

    The largest rounding of few elements is as much luck as anything, the original's too.  So what exceeds
    the rule by a factor below ``LUCK`` is drawn five times more, and fails if those, together, are outside.
    """
    case = grid.case(point)
    items = tuple(measure_case(implementation, case, device, seed))
    wrong = [i for i in items if not i.ok]
    if not wrong:
        return Outcome(point, items)
    if all(i.error_ours < LUCK * i.limit for i in wrong):
        again = tuple(measure_case(implementation, case, device, seed + 1000, 5))
        if all(i.ok for i in again):
            return Outcome(point, again, luck=_sentence(wrong))
        wrong = [i for i in again if not i.ok]
    return Outcome(point, items, failure=_sentence(wrong))


def _sentence(wrong: Sequence[CheckItem]) -> str:
    return "; ".join(
        f"{i.name}: error {i.error_ours:.3g}, the rule allows {i.limit:.3g} ({i.note})" for i in wrong
    )
