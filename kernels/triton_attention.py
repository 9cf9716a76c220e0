"""The Triton variant: host side of the kernels in ``forward``, ``backward`` and ``dropout``.

Implements ``dispatch.Implementation``.  Shapes and formulas are those of ``attention_reference``.
Everything that does not depend on the tensors' contents is worked out once per site (sizes, strides,
program) and kept, so that a call is a look-up, the allocations and the launches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels import autotune, block_map, configs, decode, dropout, sinks, tables
from flashfuse.kernels import backward as backward_kernels
from flashfuse.kernels.codegen import LOG2E, Generated, generate
from flashfuse.kernels.device_math import is_interpreted
from flashfuse.kernels.expr import walk
from flashfuse.kernels.forward import DEAD_MEAN, DEAD_NAN, DEAD_ZERO, attention_forward, descriptor_of
from flashfuse.kernels.interval import needs_elements
from flashfuse.kernels.launch import Launch, Launches, launch, on_device
from flashfuse.kernels.layout import (
    bshd,
    fits,
    is_aligned,
    is_describable,
    map_strides,
    padded,
    strides_of,
    typed,
)
from flashfuse.kernels.ops import BLOCK
from flashfuse.kernels.spec import AVERAGING, NAN, REACHING, SCORES_ONLY, ScoreProgram, differentiable_loads


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    highest: Tensor | None = None,
    tune: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, Dv], lse [B, H, Sq] float32 natural log, −inf in dead rows).

    ``highest``, like lse, is filled with the largest score of each row.
    ``tune``: tiles are timed at the first call (``autotune``).

    Raises:
        ValueError: shapes do not fit each other, or dropout without a seed.
    """
    tune = tune and _may_tune(q.device)
    site = _site(q, k, v, captures, ints, seed, program, dropout_p, tune=tune)
    out = q.new_empty_strided(*site.layouts[3])
    lse = q.new_empty_strided(*site.layout_of_rows, dtype=torch.float32)
    if site.is_empty:
        if highest is not None:
            highest.fill_(float("-inf"))
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = site.rows(q, 0), site.rows(k, 1), site.rows(v, 2)
    # Without a map the kernel for few queries visits every key.
    every_key = site.splits and not site.shares_map
    kv_map = None if every_key else site.maps(maps, captures, ints, q.device)[0]
    ptrs = tuple(captures)
    aligned = is_aligned(q, k, v, *ptrs)
    if site.splits:
        parts = lse.new_empty((lse.numel() * site.splits, site.v_dim + 8))
        with on_device(q.device):
            make = functools.partial(site.make_split, kv_map)
            site.launches.run("split", aligned, make, q, k, v, parts, kv_map, ptrs)
            name = "combine" if highest is None else "combine with maximum"
            site.launches.run(name, aligned, site.make_combine, parts, v, out, lse, highest, ptrs)
        return out, lse
    mean = v.mean(2, dtype=torch.float32).contiguous() if site.averages and not site.dropout else None
    with on_device(q.device):
        ends = site.ends(captures, aligned)
        make = functools.partial(site.make_forward, kv_map)
        # A launch is kept by name, for the same kinds of arguments.
        name = "forward" if highest is None else "forward with maximum"
        site.launches.run(name, aligned, make, q, k, v, out, lse, highest, kv_map, seed, mean, ends, ptrs)
        if site.averages and site.dropout:
            site.launches.run("dead_rows", aligned, site.make_dead_rows, v, out, lse, seed)
    return out, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    maps: Sequence[Tensor],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    capture_grads: Sequence[int],
    dlse: Tensor | None = None,
    tune: bool = False,
) -> list[Tensor]:
    """[dq, dk, dv, *gradients of the captures listed in ``capture_grads``].

    The derivative of lse by a score is its weight, so dS = P ∘ (dP − (delta − dlse)), of the sink as well.
    """
    wanted = tuple(capture_grads)
    if do.dtype != q.dtype:
        do = do.to(q.dtype)
    tune = tune and _may_tune(q.device)
    with_dlse = dlse is not None
    site = _site(q, k, v, captures, ints, seed, program, dropout_p, do, out, wanted, with_dlse, tune)
    of_q, of_k, of_v = site.layouts[:3]
    dq, dk, dv = q.new_empty_strided(*of_q), q.new_empty_strided(*of_k), q.new_empty_strided(*of_v)
    if site.is_empty:
        return [dq.zero_(), dk.zero_(), dv.zero_(), *(torch.zeros_like(captures[i]) for i in wanted)]
    q, k, v = site.rows(q, 0), site.rows(k, 1), site.rows(v, 2)
    do, out = site.rows(do, 3), site.rows(out, 4)
    lse = lse.contiguous()
    kv_map, q_map = site.maps(maps, captures, ints, q.device)
    ptrs = tuple(captures)
    aligned = is_aligned(q, k, v, do, out, *ptrs)
    code = site.code
    run = site.launches.run
    stats = lse.new_empty((*lse.shape, 2 if code.folded else 4))
    with on_device(q.device):
        run("prepare", aligned, site.make_prepare, out, do, lse, stats)
        if not code.folded or site.sums_rows_exactly:
            run("rows", aligned, site.make_rows, q, k, v, do, stats, seed, ptrs)
        if dlse is not None:
            stats[..., 1] -= torch.where(lse == float("-inf"), 0.0, dlse)
        ends = site.ends(captures, aligned)

        def add_up(kind: str, buffers: tuple[Tensor, ...]) -> None:
            """dq, and the captures' gradients into ``buffers``, of which there is one ``kind`` per launch."""
            make = functools.partial(site.make_dq, dq, kv_map, False)
            rest = (stats, kv_map, seed, ends, ptrs, buffers)
            run(f"dq{kind}", aligned, make, q, k, v, do, dq, *rest)
            if site.sums_diagonals:
                tensors = (stats, seed, ends, ptrs, buffers)
                run(f"table{kind}", aligned, site.make_table, q, k, v, do, *tensors)
            if site.uniform:
                make = functools.partial(site.make_dq, dq, None, True)
                rest = (site.stats_of_dead_rows(lse, stats), None, seed, None, ptrs, buffers)
                run(f"uniform_dq{kind}", aligned, make, q, k, v, do, dq, *rest)

        sums = site.capture_gradients(captures, add_up)
        extra_k, extra_v = site.dead_gradients(do, lse, aligned, q, k, v, stats, seed, ptrs)
        extra = (extra_k, extra_v)
        for name, *written in site.passes_over_keys(dk, dv):
            make = functools.partial(site.make_dkdv, *written, *extra, q_map)
            run(name, aligned, make, q, k, v, do, *written, stats, *extra, q_map, seed, ends, ptrs)
        totals = dict(zip(site.of_score, sums, strict=True))
        for i, gradient in site.sink_gradients(captures, ints, lse, stats).items():
            totals[i] = totals[i] + gradient if i in totals else gradient
    return [dq, dk, dv, *(totals[i].to(captures[i].dtype) for i in wanted)]


def dropout_mask(seed: Tensor, dropout_p: float, sizes: tuple[int, int, int, int]) -> Tensor:
    """The keep mask [B, H, Sq, Skv] that ``seed`` draws."""
    batch, heads, q_len, kv_len = sizes
    keep = torch.empty(sizes, dtype=torch.bool, device=seed.device)
    if keep.numel():
        programs = -(-q_len // 32) * -(-kv_len // 64) * batch * heads
        with on_device(seed.device):
            launch(
                Launch(dropout.keep_mask, programs, (q_len, kv_len, _threshold(dropout_p), 32, 64)),
                keep,
                seed,
            )
    return keep


# --- the site ----------------------------------------------------------------------------------

_SITES: dict[Hashable, _Site] = {}
_MAX_SITES = 4096


def _site(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    ints: Sequence[int],
    seed: Tensor | None,
    program: ScoreProgram,
    dropout_p: float,
    do: Tensor | None = None,
    out: Tensor | None = None,
    wanted: tuple[int, ...] = (),
    with_dlse: bool = False,
    tune: bool = False,
) -> _Site:
    """The site with these sizes and strides; a backward has its own."""
    precision = torch.get_float32_matmul_precision() if q.dtype == torch.float32 else ""
    key = (
        *(program, dropout_p, q.device, q.dtype, k.dtype, v.dtype, seed is None, precision, wanted),
        *(with_dlse, tune),
        *(q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride()),
        tuple((c.shape, c.stride(), c.dtype) for c in captures),
        tuple(ints),
        None if do is None or out is None else (do.stride(), out.stride()),
    )
    site = _SITES.get(key)
    if site is None:
        if len(_SITES) >= _MAX_SITES:
            _SITES.clear()
        _check(q, k, v, seed, dropout_p)
        tensors = [q, k, v] if do is None or out is None else [q, k, v, do, out]
        site = _SITES[key] = _Site(tensors, captures, ints, program, dropout_p, wanted, with_dlse, tune)
    return site


FEWEST_SCORES_DESCRIBED = 2**24
"""From which on the tensor memory accelerator brings tiles: its descriptors cost the host microseconds."""
SHORTEST_WITH_ENDS = 512
"""Keys, from which on tiles are looked for in which a table of distances is one number."""


class _Site:
    """What forward and backward need to know of a site, and their launches."""

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
        self.is_empty = 0 in (self.batch, self.heads, self.q_len, self.kv_len)
        self.group = self.heads // self.kv_heads if self.kv_heads else 1
        self.program = program
        if program.mask is not None and program.mask.is_const and program.mask.value:
            self.program = dataclasses.replace(program, mask=None)
        self.d_pad, self.dv_pad = padded(self.dim), padded(self.v_dim)
        self.even = self.q_len % BLOCK == 0 and self.kv_len % BLOCK == 0
        self.dropout = dropout_p > 0
        self.threshold = _threshold(dropout_p)
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
        self.layout_of_rows = q.shape[:3], (self.heads * self.q_len, self.q_len, 1)
        self.strides = [strides_of(t) for t in self.like]
        types, numbers = typed(captures)
        self.nums = (*(n for s in numbers for n in s), *ints)
        of_score = differentiable_loads(program.score)
        of_sink = frozenset() if program.sink is None else differentiable_loads(program.sink)
        self.of_sink = tuple(i for i in wanted if program.captures[i] in of_sink)
        self.of_score = tuple(i for i in wanted if program.captures[i] not in of_sink - of_score)
        buffers = [torch.empty(captures[i].shape, device="meta") for i in self.of_score]
        buffer_types, buffer_numbers = typed(buffers)
        self.gnums = tuple(n for s in buffer_numbers for n in s)
        grads = tuple(zip(self.of_score, buffer_types, strict=True))
        approximate = self.itemsize == 2 and not is_interpreted()
        self.code: Generated = generate(self.program, types, grads, self.precision != "ieee", approximate)
        self.sums_rows_exactly = self.precision == "ieee" or self.code.sums_rows
        self.launches = Launches(self.tuned if tune else None)
        self.capability = _major_capability(q.device)
        self.describes = (
            self.capability == 9
            and self.itemsize == 2
            and self.batch * self.heads * self.q_len * self.kv_len >= FEWEST_SCORES_DESCRIBED
            and all(map(is_describable, self.like))
        )
        # Heads that share a tile must share the lists of blocks.
        self.shares_map = self.group == 1 or "h" not in self.program.mask_variables
        self.splits = 0 if self.is_empty else self._splits(q.device)

    def descriptors(self, rows: int, *places: int) -> tuple[tuple[int, Callable[[Tensor], Any]], ...]:
        """Of q, k, v or do, by their places: what makes descriptors for tiles of so many rows."""
        if not self.describes:
            return ()
        like = [(i, self.like[i]) for i in places]
        return tuple((i, descriptor_of(t.shape, t.stride(), rows, padded(t.shape[3]))) for i, t in like)

    def _launch(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[Any, ...],
        config: configs.Config,
        descriptors: tuple[tuple[int, Callable[[Tensor], Any]], ...] = (),
    ) -> Launch:
        # In full float32 all kernels must round scores alike, or the dS of a row do not sum to 0; which
        # product becomes one with a sum depends on what the compiler sees around it.
        fuses = self.precision != "ieee"
        _, _, warps, stages, registers = config
        return Launch(kernel, programs, numbers, warps, stages, registers, fuses, descriptors)

    def rows(self, t: Tensor, position: int) -> Tensor:
        """``t`` as the kernels read it: copied if its layout, or for a descriptor its address, is not fit."""
        if not self.fits[position]:
            return t.contiguous()
        if self.describes and not is_aligned(t):
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
        return configs.choose(kernel, self._kind())

    def _kind(self) -> configs.Kind:
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
        )

    def tuned(self, name: Hashable, make: Callable[..., Launch], tensors: tuple[Any, ...]) -> Launch:
        """The launch ``name`` with the tiles that are the fastest on ``tensors``."""
        if not isinstance(name, str) or name not in autotune.WRITTEN:
            return make()
        shared = autotune.shared_memory(self.device)
        sizes = autotune.Sizes(self.d_pad, self.dv_pad, self.itemsize, shared, self.dropout)
        static = self.config(name)
        choices = autotune.candidates(name, static, sizes)
        if (name in ("dkdv", "dk", "dv") and self._ends[2]) or (name == "table" and self._skips_ends):
            # Another kernel has worked with these tiles.
            choices = [c for c in choices if c.bm == static.bm]
        elif name == "dq" and self._skips_ends:
            choices = [c for c in choices if c.bn <= self.config("table").bm]
        bench = autotune.Bench(name, make, tensors)
        alike = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "dims": [self.dim, self.v_dim],
            "heads": autotune.bucket(self.batch * self.heads),
            "group": self.group,
            "lengths": [autotune.bucket(self.q_len), autotune.bucket(self.kv_len)],
        }
        key = {**bench.key(), "sizes": alike}
        return make(config=autotune.best(key, self.device, choices, bench))

    # Launches.  Each gives the numbers and constexprs that follow the kernel's tensors.

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.heads, self.group, self.q_len, self.kv_len

    @property
    def _drop(self) -> tuple[int, float]:
        return self.threshold, self.drop_scale

    @property
    def _ends(self) -> tuple[Any, float | None, bool]:
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
        if self._ends[0] is None or found is None or found.capture is None:
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
    def _dims(self) -> tuple[int, ...]:
        return self.dim, self.v_dim, self.d_pad, self.dv_pad

    @property
    def _scale(self) -> float | None:
        return None if self.code.scale is None else self.code.scale * LOG2E

    @property
    def _out_strides(self) -> tuple[int, int, int]:
        width = self.heads * self.v_dim // 8
        return self.q_len * width, self.v_dim // 8, width

    @property
    def _dead(self) -> int:
        if self.averages and not self.dropout:
            return DEAD_MEAN
        return DEAD_NAN if self.program.dead_rows in NAN else DEAD_ZERO

    def make_forward(self, kv_map: Tensor | None, config: configs.Config | None = None) -> Launch:
        code = self.code
        config = config or self.config("forward")
        numbers = (
            *(self.nums, *self.strides[0], *self.strides[1], *self.strides[2], *self._out_strides),
            *(*self._lengths, *map_strides(kv_map), *self._drop),
            *(code.score, code.mask, code.sink, *self._ends, self._scale, code.folded, *self._dims),
            *(BLOCK, self.even, self.dropout, self._dead, self.precision, config.bm, config.bn),
        )
        programs = -(-self.q_len // config.bm) * self.batch * self.heads
        return self._launch(attention_forward, programs, numbers, config, self.descriptors(config.bn, 1, 2))

    def _splits(self, device: torch.device) -> int:
        """How many parts the keys are split into; 0 where the ordinary kernel runs."""
        most = self.kv_len // decode.FEWEST_KEYS
        if self.q_len > decode.MAX_QUERIES or self.dropout or most < 2:
            return 0
        return decode.split_count(self._decode_tiles(), most, _processors(device))

    def _decode_config(self) -> configs.Config:
        config = self.config("decode")
        # Products of float32 take registers, not tensor cores: a larger tile gains nothing there.
        most = 64 if self.itemsize == 2 else config.bm
        return config._replace(bm=padded(min(self.group * self.q_len, most)))

    def _decode_tiles(self) -> int:
        return -(-self.group * self.q_len // self._decode_config().bm) * self.batch * self.kv_heads

    def make_split(self, kv_map: Tensor | None) -> Launch:
        code = self.code
        config = self._decode_config()
        numbers = (
            *(self.nums, *self.strides[0], *self.strides[1], *self.strides[2], *self._lengths),
            *(*map_strides(kv_map)[:2], self.splits),
            *(code.score, code.mask, self._scale, code.folded, *self._dims, BLOCK),
            *(self.precision, config.bm, config.bn),
        )
        programs = self._decode_tiles() * self.splits
        return self._launch(decode.decode_split, programs, numbers, config)

    def make_combine(self) -> Launch:
        code = self.code
        numbers = (
            *(self.nums, *self.strides[2], *self._out_strides, *self._lengths, self.splits),
            *(code.sink, code.scale is not None or code.folded, self.v_dim, self.dv_pad, self._dead),
            *(decode.MAX_SPLITS, 16),
        )
        return Launch(decode.decode_combine, self.batch * self.heads * self.q_len, numbers)

    def make_dead_rows(self) -> Launch:
        config = self.config("dq")
        numbers = (
            *(*self.strides[2], *self._out_strides, *self._lengths, *self._drop),
            *(self.v_dim, self.dv_pad, self.precision, config.bm, config.bn),
        )
        programs = -(-self.q_len // config.bm) * self.batch * self.heads
        return Launch(dropout.dead_rows_out, programs, numbers, config.warps)

    def make_prepare(self) -> Launch:
        bm = 64
        numbers = (
            *(*self.strides[4], *self.strides[3], self.heads, self.q_len),
            *(self.v_dim, self.dv_pad, self.code.folded, bm),
        )
        programs = -(-self.q_len // bm) * self.batch * self.heads
        return Launch(backward_kernels.backward_prepare, programs, numbers)

    def make_rows(self) -> Launch:
        code = self.code
        config = self.config("dq")
        numbers = (
            *(self.nums, *self._four_strides, *self._lengths, *self._drop),
            *(code.score, code.mask, code.sink, self._scale, code.folded),
            *(self.sums_rows_exactly, self.config("dk").bm if self._ends[2] else None, *self._dims),
            *(self.dropout, self.precision, config.bm, config.bn),
        )
        programs = -(-self.q_len // config.bm) * self.batch * self.heads
        kernel = backward_kernels.backward_rows
        return self._launch(kernel, programs, numbers, config._replace(stages=1, registers=None))

    def passes_over_keys(self, dk: Tensor, dv: Tensor) -> list[tuple[str, Tensor | None, Tensor | None]]:
        """Kernels by name, with what they write: wide dk and dv do not fit into the registers together."""
        if configs.are_apart(self._kind()):
            return [("dk", dk, None), ("dv", None, dv)]
        return [("dkdv", dk, dv)]

    def make_dkdv(
        self,
        dk: Tensor | None,
        dv: Tensor | None,
        extra_k: Tensor | None,
        extra_v: Tensor | None,
        q_map: Tensor | None,
        uniform: bool = False,
        config: configs.Config | None = None,
    ) -> Launch:
        code = self.code
        config = config or self.config("dv" if dk is None else "dk" if dv is None else "dkdv")
        numbers = (
            *(self.nums, *self._four_strides, *strides_of(dk), *strides_of(dv)),
            *(*strides_of(extra_k), *strides_of(extra_v), *self._lengths, *map_strides(q_map)),
            *(
                *self._drop,
                self._dscale,
                code.score,
                None if uniform else code.mask,
                code.dscore,
                *((None, None, False) if uniform else self._ends),
                self._scale,
            ),
            *(code.folded, *self._dims, BLOCK, self.even, self.dropout, self.precision, uniform),
            *(config.bm, config.bn),
        )
        programs = -(-self.kv_len // config.bn) * self.batch * self.kv_heads
        if uniform:
            config = config._replace(stages=1, registers=None)
        kernel = backward_kernels.backward_dkdv
        return self._launch(kernel, programs, numbers, config, self.descriptors(config.bm, 0, 3))

    def make_dq(
        self, dq: Tensor, kv_map: Tensor | None, uniform: bool, config: configs.Config | None = None
    ) -> Launch:
        code = self.code
        config = config or self.config("dq")
        accumulate = code.accumulate
        if self._is_constant or (uniform and self.program.dead_rows in SCORES_ONLY):
            accumulate = None
        elif self.sums_diagonals and not uniform:
            assert code.table is not None
            accumulate = code.table.others
        of_ends: tuple[Any, Any, int | None] = (None, None, None)
        if self._skips_ends and not uniform:
            assert code.table is not None
            of_ends = (code.table.add, code.table.slope, self.config("table").bm)
        numbers = (
            *(
                self.nums,
                self.gnums,
                *self._four_strides,
                *strides_of(dq),
                *self._lengths,
                *map_strides(kv_map),
            ),
            *(*self._drop, self._dscale, code.score, None if uniform else code.mask, code.dscore, accumulate),
            *(
                *((None, None, False) if uniform else self._ends),
                *of_ends,
                self._scale,
                code.folded,
                *self._dims,
                BLOCK,
                self.even,
                self.dropout,
                self.precision,
                uniform,
                self._refines and not uniform,
            ),
            *(config.bm, config.bn),
        )
        programs = -(-self.q_len // config.bm) * self.batch * self.heads
        kernel = backward_kernels.backward_dq
        return self._launch(kernel, programs, numbers, config, self.descriptors(config.bn, 1, 2))

    def make_table(self, config: configs.Config | None = None) -> Launch:
        code, table = self.code, self.code.table
        assert table is not None
        config = config or self.config("table")
        diagonals = -(-self.q_len // config.bm) + -(-self.kv_len // config.bm) - 1
        enough = 8 * _processors(self.device)
        # Few diagonals lie between the ends.
        busy = min(diagonals, 8) if self._skips_ends else diagonals
        tiles = self.batch * min(-(-self.q_len // config.bm), -(-self.kv_len // config.bm))
        parts = self.batch if table.uses_b else min(tiles, -(-enough // (self.heads * busy)))
        numbers = (
            *(self.nums, self.gnums, *self._four_strides, self.batch, *self._lengths, parts, *self._drop),
            *(
                code.score,
                code.mask,
                table.slope,
                table.add,
                table.reach,
                table.reach_is_mask,
                *self._ends[:2],
                self._skips_ends,
                self._scale,
                code.folded,
                *self._dims,
            ),
            *(self.even, self.dropout, self.precision, config.bm),
        )
        programs = self.heads * parts * diagonals
        kernel = tables.backward_table
        return self._launch(kernel, programs, numbers, config, self.descriptors(config.bm, 0, 1, 2, 3))

    @property
    def _skips_ends(self) -> bool:
        """Whether the kernel of dq has the gradient of the ends of a table of indices."""
        table = self.code.table
        return self._ends[0] is not None and table is not None and table.has_ends and self.sums_diagonals

    @property
    def sums_diagonals(self) -> bool:
        """The gradient of a table of distances has a kernel of its own."""
        return self.code.table is not None and not self._is_constant

    def capture_gradients(
        self, captures: Sequence[Tensor], add_up: Callable[[str, tuple[Tensor, ...]], None]
    ) -> list[Tensor]:
        """Gradients of ``of_score``; ``add_up``, which works out dq, adds to two buffers for each.

        See ``device_math.add_gradient``.  The sums are float32; of full float32 what shrinks is summed in
        float64, which libraries come near to by adding in trees.
        Where PyTorch is asked for deterministic algorithms, the sums are taken in integers, in a second
        pass, of the scale that the largest term of the first gives.  A NaN or infinite term makes the whole
        gradient NaN then.
        """
        like = [captures[i] for i in self.of_score]
        scores = self.batch * self.heads * self.q_len * self.kv_len
        if not like or not torch.are_deterministic_algorithms_enabled():
            sums = []
            for c in like:
                doubled = self.precision == "ieee" and c.numel() < scores
                dtype = torch.float64 if doubled else torch.float32
                sums.append(torch.zeros(c.shape, dtype=dtype, device=self.device))
            add_up("", tuple(t for s in sums for t in (s, s)))
            return sums
        bits = torch.zeros(len(like), dtype=torch.int32, device=self.device)
        add_up("_largest", tuple(t for i in range(len(like)) for t in (bits[i:], bits[i:])))
        # So many terms of the largest magnitude stay below 2^62.
        _, exponents = torch.frexp(bits.view(torch.float32))
        scales = torch.ldexp(torch.ones_like(bits, dtype=torch.float32), 62 - scores.bit_length() - exponents)
        scales = torch.where(bits.view(torch.float32).isfinite(), scales.clamp(max=2.0**126), float("nan"))
        wholes = [torch.zeros(c.shape, dtype=torch.int64, device=self.device) for c in like]
        add_up("_exact", tuple(t for i, w in enumerate(wholes) for t in (w, scales[i:])))
        return [(w.double() / scale).float() for w, scale in zip(wholes, scales, strict=True)]

    @property
    def _four_strides(self) -> tuple[int, ...]:
        return (*self.strides[0], *self.strides[1], *self.strides[2], *self.strides[3])

    @property
    def _is_constant(self) -> bool:
        # The weight of a single key is the constant 1: rounding must not make a gradient of it.
        return self.kv_len == 1 and self.program.sink is None and not self.with_dlse

    @property
    def _refines(self) -> bool:
        """Whether the dS of a row sum to 0, by which the kernel of dq mends delta, out being rounded."""
        return self.program.sink is None and not self.with_dlse and not self.sums_rows_exactly

    @property
    def _dscale(self) -> float:
        if self._is_constant:
            return 0.0
        return 1.0 if self.code.dscale is None else self.code.dscale

    def sink_gradients(
        self, captures: Sequence[Tensor], ints: Sequence[int], lse: Tensor, stats: Tensor
    ) -> dict[int, Tensor]:
        """By position: the gradients of the wanted captures that the sink reads."""
        if not self.of_sink:
            return {}
        if self.precision == "ieee":
            lse, stats = lse.double(), stats.double()
        sizes = (self.batch, self.heads, self.q_len, self.kv_len)
        exponent = sinks.logits(self.program, captures, ints, sizes, lse) - lse
        if not self.code.folded:
            exponent = exponent - stats[..., 2] * math.log(2)
        # No weight is above 1; the kernels have the largest sinks a little smaller than they are.
        weight = torch.where(lse == float("-inf"), 0, exponent.clamp(max=0).exp())
        names = self.program.captures
        wanted = [names[i] for i in self.of_sink]
        found = sinks.gradients(self.program, captures, ints, sizes, weight, stats[..., 1], wanted)
        return {i: found[names[i]] for i in self.of_sink}

    def dead_gradients(
        self, do: Tensor, lse: Tensor, aligned: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """What dead rows add to dk and dv, float32, shaped like them; ``rest`` as in ``backward``."""
        mode = self.program.dead_rows
        if self.uniform or (mode == "mean" and self.dropout):
            stats, seed, ptrs = rest
            stats = self.stats_of_dead_rows(lse, stats)
            extra_k = do.new_empty(k.shape, dtype=torch.float32) if self.uniform else None
            extra_v = do.new_empty(v.shape, dtype=torch.float32)
            tensors = (q, k, v, do, extra_k, extra_v, stats, None, None, None, seed, None, ptrs)
            make = functools.partial(self.make_dkdv, extra_k, extra_v, None, None, None, True)
            self.launches.run("uniform_dkdv", aligned, make, *tensors)
            return extra_k, extra_v + self._nan_of_dead_rows(lse) if mode in NAN else extra_v
        if mode == "nan":
            row = do.new_zeros((1, 1, 1, self.v_dim), dtype=torch.float32) + self._nan_of_dead_rows(lse)
            return None, row.expand(-1, -1, self.kv_len, -1)
        if mode != "mean":
            return None, None
        sums = torch.where((lse == float("-inf"))[..., None], do, 0).sum(2, dtype=torch.float32)
        total = sums.view(self.batch, self.kv_heads, self.group, self.v_dim).sum(2) / self.kv_len
        return None, total[:, :, None].expand(-1, -1, self.kv_len, -1)

    def _nan_of_dead_rows(self, lse: Tensor) -> Tensor:
        """[B, H_kv, 1, 1]: NaN where a row of a head of the group is dead, else 0."""
        dead = (lse == float("-inf")).view(self.batch, self.kv_heads, -1).any(-1)
        return torch.where(dead, float("nan"), 0.0)[..., None, None]

    def stats_of_dead_rows(self, lse: Tensor, stats: Tensor) -> Tensor:
        """``stats`` of the pass over dead rows: a delta of NaN makes every gradient NaN that they reach."""
        if self.program.dead_rows not in NAN:
            return stats
        delta = torch.where(lse == float("-inf"), float("nan"), stats[..., 1])
        return torch.cat((stats[..., :1], delta[..., None], stats[..., 2:]), -1)


def _may_tune(device: torch.device) -> bool:
    """Other tiles are other roundings, which deterministic algorithms must not choose by the clock."""
    return device.type == "cuda" and not is_interpreted() and not torch.are_deterministic_algorithms_enabled()


def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _check(q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, dropout_p: float) -> None:
    batch, heads, _, dim = q.shape
    if (
        k.shape[0] != batch
        or k.shape[3] != dim
        or v.shape[:3] != k.shape[:3]
        or (k.shape[1] and heads % k.shape[1])
    ):
        raise ValueError(
            "expected q [B, H, Sq, D], k [B, H_kv, Skv, D], v [B, H_kv, Skv, Dv] with H a multiple of H_kv, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if dim % 8 or v.shape[3] % 8 or not 8 <= dim <= 256 or not 8 <= v.shape[3] <= 256:
        raise ValueError(f"expected D and Dv of 8, 16, …, 256, got {dim} and {v.shape[3]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"expected q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if dropout_p > 0 and seed is None:
        raise ValueError("expected a seed: dropout_p > 0")


def _threshold(dropout_p: float) -> int:
    """Signed 32-bit: a uniform int32 is below it with probability ``dropout_p``."""
    return min(round(dropout_p * 2**32), 2**32 - 1) - 2**31


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "tf32"  # of no effect
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
