"""A site of the Triton variant: what its kernels are told that does not depend on the tensors' contents.

Sizes, strides, generated code and tiles are worked out once and kept, so that a call is a look-up, the
allocations and the launches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashfuse.kernels import autotune, block_map, configs, decode, tables
from flashfuse.kernels.codegen import (
    LOG2E,
    Gathered,
    Generated,
    Table,
    generate,
    is_in_rows,
    loads_of_pairs,
    with_gathered,
)
from flashfuse.kernels.device_math import is_interpreted
from flashfuse.kernels.expr import Expr, variables, walk
from flashfuse.kernels.forward import DEAD_MEAN, DEAD_NAN, DEAD_ZERO
from flashfuse.kernels.interval import needs_elements
from flashfuse.kernels.launch import Launch, Launches
from flashfuse.kernels.layout import (
    bshd,
    fits,
    is_aligned,
    is_describable,
    padded,
    strides_of,
    typed,
    whole_eights,
)
from flashfuse.kernels.ops import BLOCK
from flashfuse.kernels.printer import axis_of, follows_keys, is_of_distance, is_scattered
from flashfuse.kernels.spec import AVERAGING, NAN, REACHING, ScoreProgram, differentiable_loads

FEWEST_SCORES_DESCRIBED = 2**24
"""From which on the tensor memory accelerator brings tiles: its descriptors cost the host microseconds."""
FEWEST_SCORES_GATHERED = 2**20
"""From which on what all batch entries load for each pair is gathered in rows first."""
FEWEST_ENTRIES_GATHERED = 4
"""Of the batch: each reads the rows, which are written once."""
MOST_PAIRS_GATHERED = 2**24
"""Of heads, queries and keys, for each of which an element is kept."""
SHORTEST_WITH_ENDS = 512
"""Keys, from which on tiles are looked for in which a table of distances is one number."""


class Buffer(NamedTuple):
    """Where a capture's gradient is summed.

    ``row``: how much of the last axis is used, if not all; ``is_written``: a kernel writes all that is used.
    """

    sizes: tuple[int, ...]
    row: int | None
    dtype: torch.dtype
    is_written: bool


class Site:
    """What forward and backward need to know of a site, and the launches that they have made."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        captures: Sequence[Tensor],
        ints: Sequence[int],
        program: ScoreProgram,
        dropout_p: float,
        wanted: tuple[int, ...],
        with_dlse: bool,
        tune: bool,
    ) -> None:
        q, k, v = tensors[:3]
        self.with_dlse = with_dlse
        self.device = q.device
        self.batch, self.heads, self.q_len, self.dim = q.shape
        self.kv_heads, self.kv_len, self.v_dim = k.shape[1], k.shape[2], v.shape[3]
        self.scores = self.batch * self.heads * self.q_len * self.kv_len
        self.is_empty = 0 in (self.batch, self.heads, self.q_len, self.kv_len)
        self.group = self.heads // self.kv_heads if self.kv_heads else 1
        self.program = program
        if program.mask is not None and program.mask.is_const and program.mask.value:
            self.program = dataclasses.replace(program, mask=None)
        self.d_pad, self.dv_pad = padded(self.dim), padded(self.v_dim)
        self.even = self.q_len % BLOCK == 0 and self.kv_len % BLOCK == 0
        self.dropout = dropout_p > 0
        self.threshold = threshold(dropout_p)
        self.drop_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        self.precision = _precision(q.dtype)
        self.dtype, self.itemsize = q.dtype, q.element_size()
        self.averages = program.dead_rows in AVERAGING
        # "mean" without dropout has a closed form; otherwise dead rows take a pass of their own.
        self.uniform = program.dead_rows in REACHING
        self.fits = [fits(t) for t in tensors]
        # What a call's tensors are like once they fit; no memory of theirs is kept.
        meta = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in tensors]
        self.like = [t if fit else t.contiguous() for t, fit in zip(meta, self.fits, strict=True)]
        self.layouts = [bshd(sizes) for sizes in (q.shape, k.shape, v.shape, (*q.shape[:3], self.v_dim))]
        of_rows = (self.heads * self.q_len, self.q_len, 1)
        self.layout_of_rows = tuple(q.shape[:3]), of_rows
        self.strides = [strides_of(t) for t in self.like]
        types, numbers = typed(captures)
        arrays = self._arrays(captures)
        self.layouts_of_arrays = [(tuple(t.shape), t.stride(), t.dtype) for t in arrays.values()]
        array_types, array_numbers = typed(list(arrays.values()))
        gathered = tuple(
            Gathered(load, dataclasses.replace(kind, padded=True))
            for load, kind in zip(arrays, array_types, strict=True)
        )
        self.nums = (*(n for s in (*numbers, *array_numbers) for n in s), *ints)
        of_score = differentiable_loads(program.score)
        of_sink = frozenset() if program.sink is None else differentiable_loads(program.sink)
        self.of_sink = tuple(i for i in wanted if program.captures[i] in of_sink)
        self.of_score = tuple(i for i in wanted if program.captures[i] not in of_sink - of_score)
        sums = [self._sum_of(captures[i], program.captures[i]) for i in self.of_score]
        buffer_types, buffer_numbers = typed([used for _, used in sums])
        self.gnums = tuple(n for s in buffer_numbers for n in s)
        grads = tuple(zip(self.of_score, buffer_types, strict=True))
        approximate = self.itemsize == 2 and not is_interpreted()
        fold = self.precision != "ieee"
        several = self.batch > 1
        self.code: Generated = generate(self.program, types, grads, gathered, several, fold, approximate)
        self.tables = () if self.is_constant else self.code.tables
        self.sums_rows_exactly = self.precision == "ieee" or self.code.sums_rows
        self.sums_rows = self.sums_rows_exactly or not self.code.folded
        self.launches = Launches(self.tuned if tune else None)
        self.capability = _major_capability(q.device)
        self.describes = (
            self.capability == 9
            and self.itemsize == 2
            and self.scores >= FEWEST_SCORES_DESCRIBED
            and all(map(is_describable, self.like))
        )
        self.pair_bytes = self._pair_bytes(captures, gathered)
        self.dk_and_dv_apart = configs.are_apart(self.kind())
        # Heads that share a tile must share the lists of blocks.
        self.shares_map = self.group == 1 or "h" not in self.program.mask_variables
        self.splits = 0 if self.is_empty else self._splits(q.device)
        self.buffers = [self._buffer(slot, whole, used) for slot, (whole, used) in enumerate(sums)]
        width = 2 if self.code.folded else 4
        self.layout_of_stats = (*q.shape[:3], width), (*(n * width for n in of_rows), 1)
        # Rows for which there is one number that says whether one of them is dead.
        self.edge_of_stats = self.config("dq").bm if self.sums_rows else 64
        self.flags = self.group * -(-self.q_len // self.edge_of_stats)
        self.has_flags = self.visits_dead_rows or program.dead_rows in NAN

    def _pair_bytes(self, captures: Sequence[Tensor], gathered: Sequence[Gathered]) -> int:
        """Of all that the score loads, or loads as an index, in tiles of queries and keys."""
        tensors = dict(zip(self.program.captures, captures, strict=True))
        tensors.update((of.place.args[0], tensors[of.load.args[0]]) for of in gathered)
        nodes = walk(with_gathered(self.program.score, gathered))
        loads = {n for n in nodes if n.op == "load" and axis_of(n) == 2 and not is_scattered(n)}
        return sum(tensors[n.args[0]].element_size() for n in loads)

    def _arrays(self, captures: Sequence[Tensor]) -> dict[Expr, Tensor]:
        """What of the score is gathered, and an array like that which it is gathered into.

        That is what all batch entries load for each pair, and no tile can read as it lies.
        """
        few = self.batch < FEWEST_ENTRIES_GATHERED or self.scores < FEWEST_SCORES_GATHERED
        if few or self._most_splits:
            return {}
        found = {}
        for load in loads_of_pairs(self.program.score):
            table = captures[self.program.captures.index(load.args[0])]
            used = variables(load)
            axes = zip(load.operands, table.shape, table.stride(), strict=True)
            moved = set().union(*(variables(i) for i, size, stride in axes if size > 1 and stride))
            sizes = self.heads if "h" in used else 1, self.q_len, whole_eights(self.kv_len)
            in_rows = table.stride(-1) == 1 and follows_keys(load.operands[-1])
            if (
                table.is_floating_point()
                and not used & {"s", "b"}
                # Else it is one for all queries, or for all keys.
                and {"q", "kv"} <= moved
                # Of distances there are few, and tables of them have ends.
                and not is_of_distance(load)
                and not (in_rows and self.even and all(s % 8 == 0 for s in table.stride()[:-1]))
                and math.prod(sizes) <= MOST_PAIRS_GATHERED
            ):
                found[load] = torch.empty(sizes, dtype=table.dtype, device="meta")
        return found

    def _sum_of(self, capture: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """An array like the sum of the capture's gradient, rows of keys in whole eights, and what is used."""
        loads = (n for n in walk(self.program.score) if n.op == "load" and n.args[0] == name)
        array = torch.empty(capture.shape, dtype=capture.dtype, device="meta")
        if not any(map(is_in_rows, loads)) or array.shape[-1] == 1:
            return array, array
        *lead, last = array.shape
        whole = array.new_empty((*lead, whole_eights(last)))
        return whole, whole[..., :last]

    def rows(self, t: Tensor, position: int, described: bool = False) -> Tensor:
        """``t`` as the kernels read it: copied if its layout, or for a descriptor its address, is not fit."""
        if not self.fits[position]:
            return t.contiguous()
        if described and self.describes and not is_aligned(t):
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        return t

    def maps(
        self, given: Sequence[Tensor], captures: Sequence[Tensor], ints: Sequence[int], device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """(kv_map, q_map), built here if none came and the program has a mask."""
        if self.program.mask is None:
            return None, None
        if given:
            return given[0], given[1]
        mask = self.program.mask_program
        tensors = dict(zip(self.program.captures, captures, strict=True))
        numbers = dict(zip(self.program.ints, ints, strict=True))
        sizes = (self.batch, self.heads, self.q_len, self.kv_len)
        return block_map.build(
            [tensors[n] for n in mask.captures], [numbers[n] for n in mask.ints], device, sizes, mask
        )

    def config(self, kernel: str) -> configs.Config:
        """The tables' choice; of a short sequence no tile takes up twice as much as 64 rows of it."""
        config = configs.choose(kernel, self.kind())
        bm = config.bm if self.q_len > 64 else min(config.bm, 64)
        return config._replace(bm=bm, bn=config.bn if self.kv_len > 64 else min(config.bn, 64))

    def kind(self) -> configs.Kind:
        mask = self.program.mask
        return configs.Kind(
            head_dim=max(self.d_pad, self.dv_pad),
            itemsize=self.itemsize,
            capability=self.capability,
            describes=self.describes,
            dropout=self.dropout,
            plain=self.code.scale is not None,
            masked=mask is not None,
            mask_loads=mask is not None and any(node.op == "load" for node in walk(mask)),
            by_key=self.code.by_key,
            loads=self.code.loads or ("mask" if mask is not None and needs_elements(mask) else ""),
            pair_bytes=self.pair_bytes,
            few_keys=self.kv_len <= 1024,
        )

    def tuned(self, name: Hashable, make: Callable[..., Launch], tensors: tuple[Any, ...]) -> Launch:
        """The launch ``name`` with the tiles that are the fastest on ``tensors``."""
        # All tables of distances go by one name there.
        name = name.rstrip("0123456789") if isinstance(name, str) else name
        if not isinstance(name, str) or name not in autotune.WRITTEN:
            return make()
        shared = autotune.shared_memory(self.device)
        sizes = autotune.Sizes(self.d_pad, self.dv_pad, self.itemsize, shared, self.dropout)
        static = self.config(name)
        choices = autotune.candidates(name, static, sizes)
        if (name in ("dkdv", "dk", "dv") and self.end_functions[2]) or (name == "table" and self.skips_ends):
            # Another kernel has worked with these tiles.
            choices = [c for c in choices if c.bm == static.bm]
        elif name == "dq" and self.skips_ends:
            choices = [c for c in choices if c.bn <= self.config("table").bm]
        bench = autotune.Bench(name, make, tensors)
        alike = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "dims": [self.dim, self.v_dim],
            "heads": autotune.bucket(self.batch * self.heads),
            "group": self.group,
            "described": self.describes,
            "lengths": [autotune.bucket(self.q_len), autotune.bucket(self.kv_len)],
        }
        key = {**bench.key(), "sizes": alike}
        return make(config=autotune.best(key, self.device, choices, bench))

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.heads, self.group, self.q_len, self.kv_len

    @property
    def drop(self) -> tuple[int, float]:
        return self.threshold, self.drop_scale

    @property
    def end_functions(self) -> tuple[Any, float | None, bool]:
        """``Ends.of_row``, the slope of the score and ``Ends.is_line``, where tiles may lie in ends."""
        if self.code.ends is None or self.kv_len < SHORTEST_WITH_ENDS:
            return None, None, False
        if self.code.ends.is_line and self.itemsize != 2:
            # Far from the first key the row's part has roundings that show beside 32-bit numbers.
            return None, None, False
        return self.code.ends.of_row, self.code.dscale, self.code.ends.is_line

    def ends(self, captures: Sequence[Tensor], aligned: bool) -> Tensor | None:
        """[rows, 2] int32: up to which index, and from which on, each row of the table is one number."""
        found = self.code.ends
        if self.end_functions[0] is None or found is None or found.capture is None:
            return None
        table = captures[found.capture]
        table = table if table.ndim == 2 else table[None]
        rows, values = len(table), None
        strides: tuple[int, ...] = (0, 0)
        if found.values is not None:
            values = captures[found.values].movedim(found.axis, -1)
            values = values if values.ndim == 2 else values[None]
            rows, strides = len(values), values.stride()
        ends = table.new_empty((rows, 2), dtype=torch.int32)

        def make() -> Launch:
            steps = (table.stride(0) if values is None else 0, table.stride(1))
            return Launch(tables.table_ends, rows, (*steps, table.shape[1], *strides, 1024))

        self.launches.run("ends", aligned, make, table, values, ends)
        return ends

    @property
    def dims(self) -> tuple[int, ...]:
        return self.dim, self.v_dim, self.d_pad, self.dv_pad

    @property
    def scale(self) -> float | None:
        return None if self.code.scale is None else self.code.scale * LOG2E

    @property
    def out_strides(self) -> tuple[int, int, int]:
        width = self.heads * self.v_dim // 8
        return self.q_len * width, self.v_dim // 8, width

    @property
    def dead(self) -> int:
        if self.averages and not self.dropout:
            return DEAD_MEAN
        return DEAD_NAN if self.program.dead_rows in NAN else DEAD_ZERO

    @property
    def four_strides(self) -> tuple[int, ...]:
        return (*self.strides[0], *self.strides[1], *self.strides[2], *self.strides[3])

    def _splits(self, device: torch.device) -> int:
        """How many parts the keys are split into; 0 where the ordinary kernel runs."""
        most = self._most_splits
        return decode.split_count(self.decode_tiles(), most, processors(device)) if most else 0

    @property
    def _most_splits(self) -> int:
        most = self.kv_len // decode.FEWEST_KEYS
        return 0 if self.q_len > decode.MAX_QUERIES or self.dropout or most < 2 else most

    def decode_config(self) -> configs.Config:
        config = self.config("decode")
        # Products of float32 take registers, not tensor cores: a larger tile gains nothing there.
        most = 64 if self.itemsize == 2 else config.bm
        return config._replace(bm=padded(min(self.group * self.q_len, most)))

    def decode_tiles(self) -> int:
        return -(-self.group * self.q_len // self.decode_config().bm) * self.batch * self.kv_heads

    def passes_over_keys(self, dk: Tensor, dv: Tensor) -> list[tuple[str, Tensor | None, Tensor | None]]:
        """Kernels by name, with what they write."""
        if self.dk_and_dv_apart:
            return [("dk", dk, None), ("dv", None, dv)]
        return [("dkdv", dk, dv)]

    @property
    def visits_dead_rows(self) -> bool:
        """Whether a pass of its own has what dead rows add to dk and dv."""
        return self.uniform or (self.averages and self.dropout)

    def parts_of_table(self, table: Table, edge: int) -> tuple[int, int]:
        """Diagonals of tiles of edge × edge, and parts that each is summed in."""
        q_tiles, kv_tiles = (-(-length // edge) for length in (self.q_len, self.kv_len))
        together = q_tiles + kv_tiles - 1 if table.by_distance else q_tiles * kv_tiles
        if table.uses_b:
            return together, self.batch
        # Few diagonals lie between the ends.
        busy = min(together, 8) if table.has_ends and self.skips_ends else together
        tiles = self.batch * (min(q_tiles, kv_tiles) if table.by_distance else 1)
        # Every part adds a number for each distance, or for each pair.
        enough = processors(self.device) * (8 if table.by_distance else 1)
        return together, min(tiles, -(-enough // (self.heads * busy)))

    def _buffer(self, slot: int, whole: Tensor, used: Tensor) -> Buffer:
        edge = self.config("pairs").bm
        # As many elements as pairs: the indices h, q and kv of what is written meet all of them.
        is_written = used.numel() * self.batch == self.scores > 0 and any(
            table.slot == slot and table.write is not None and self.parts_of_table(table, edge)[1] == 1
            for table in self.tables
        )
        doubled = self.precision == "ieee" and used.numel() < self.scores
        dtype = torch.float64 if doubled else torch.float32
        if is_written and not (doubled or self.uniform or self.of_sink):
            # Nothing is added to it afterwards.
            dtype = used.dtype
        row = None if used.shape == whole.shape else used.shape[-1]
        return Buffer(tuple(whole.shape), row, dtype, is_written)

    @property
    def skips_ends(self) -> bool:
        """Whether the kernel of dq has the gradient of the ends of a table of indices."""
        has_ends = any(table.has_ends for table in self.tables)
        return self.end_functions[0] is not None and has_ends

    @property
    def is_constant(self) -> bool:
        # The weight of a single key is the constant 1: rounding must not make a gradient of it.
        return self.kv_len == 1 and self.program.sink is None and not self.with_dlse

    @property
    def refines(self) -> bool:
        """Whether the dS of a row sum to 0, by which the kernel of dq mends delta, out being rounded."""
        return self.program.sink is None and not self.with_dlse and not self.sums_rows_exactly

    @property
    def dscale(self) -> float:
        if self.is_constant:
            return 0.0
        return 1.0 if self.code.dscale is None else self.code.dscale


def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def threshold(dropout_p: float) -> int:
    """Signed 32-bit: a uniform int32 is below it with probability ``dropout_p``."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "tf32"  # of no effect
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
