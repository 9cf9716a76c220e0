"""The launches of a site's kernels: the numbers and constexprs that follow each one's tensors.

A config that is given, by a trial of ``autotune``, stands for the tables'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashfuse.kernels import backward as backward_kernels
from flashfuse.kernels import configs, decode, dropout, row_stats, tables
from flashfuse.kernels.forward import attention_forward, descriptor_of
from flashfuse.kernels.launch import Launch
from flashfuse.kernels.layout import map_strides, padded, strides_of
from flashfuse.kernels.ops import BLOCK
from flashfuse.kernels.spec import NAN, SCORES_ONLY
from flashfuse.kernels.triton_site import Site


def _descriptors(site: Site, rows: int, *places: int) -> tuple[tuple[int, Callable[[Tensor], Any]], ...]:
    """Of q, k, v or do, by their places: what makes descriptors for tiles of so many rows."""
    if not site.describes:
        return ()
    like = [(i, site.like[i]) for i in places]
    return tuple((i, descriptor_of(t.shape, t.stride(), rows, padded(t.shape[3]))) for i, t in like)


def _launch(
    site: Site,
    kernel: Any,
    programs: int,
    numbers: tuple[Any, ...],
    config: configs.Config,
    descriptors: tuple[tuple[int, Callable[[Tensor], Any]], ...] = (),
    again: Callable[[configs.Config], Launch] | None = None,
) -> Launch:
    """``again`` makes the launch with another config, where no other kernel depends on this one's."""

    def smaller() -> Launch | None:
        other = configs.smaller(config)
        return again(other) if again is not None and other is not None else None

    # In full float32 all kernels must round scores alike, or the dS of a row do not sum to 0; which
    # product becomes one with a sum depends on what the compiler sees around it.
    fuses = site.precision != "ieee"
    _, _, warps, stages, registers = config
    return Launch(kernel, programs, numbers, warps, stages, registers, fuses, descriptors, smaller)


def of_forward(site: Site, kv_map: Tensor | None, config: configs.Config | None = None) -> Launch:
    code = site.code
    config = config or site.config("forward")
    numbers = (
        *(site.nums, *site.strides[0], *site.strides[1], *site.strides[2], *site.out_strides),
        *(*site.lengths, *map_strides(kv_map), *site.drop),
        *(code.score, code.mask, code.sink, *site.end_functions, site.scale, code.folded, *site.dims),
        *(BLOCK, site.even, site.dropout, site.dead, site.precision, config.bm, config.bn),
    )
    programs = -(-site.q_len // config.bm) * site.batch * site.heads
    descriptors = _descriptors(site, config.bn, 1, 2)
    again = functools.partial(of_forward, site, kv_map)
    return _launch(site, attention_forward, programs, numbers, config, descriptors, again)


def of_split(site: Site, kv_map: Tensor | None) -> Launch:
    code = site.code
    config = site.decode_config()
    numbers = (
        *(site.nums, *site.strides[0], *site.strides[1], *site.strides[2], *site.lengths),
        *(*map_strides(kv_map)[:2], site.splits),
        *(code.score, code.mask, site.scale, code.folded, *site.dims, BLOCK),
        *(site.precision, config.bm, config.bn),
    )
    programs = site.decode_tiles() * site.splits
    return _launch(site, decode.decode_split, programs, numbers, config)


def of_combine(site: Site) -> Launch:
    code = site.code
    numbers = (
        *(site.nums, *site.strides[2], *site.out_strides, *site.lengths, site.splits),
        *(code.sink, code.scale is not None or code.folded, site.v_dim, site.dv_pad, site.dead),
        *(decode.MAX_SPLITS, 16),
    )
    return Launch(decode.decode_combine, site.batch * site.heads * site.q_len, numbers)


def of_dead_rows(site: Site) -> Launch:
    config = site.config("dq")
    numbers = (
        *(*site.strides[2], *site.out_strides, *site.lengths, *site.drop),
        *(site.v_dim, site.dv_pad, site.precision, config.bm, config.bn),
    )
    programs = -(-site.q_len // config.bm) * site.batch * site.heads
    return Launch(dropout.dead_rows_out, programs, numbers, config.warps)


def of_prepare(site: Site) -> Launch:
    bm = site.edge_of_stats
    numbers = (
        *(*site.strides[4], *site.strides[3], site.heads, site.q_len),
        *(site.v_dim, site.dv_pad, bm),
    )
    programs = -(-site.q_len // bm) * site.batch * site.heads
    return Launch(row_stats.backward_prepare, programs, numbers)


def of_rows(site: Site, kv_map: Tensor | None) -> Launch:
    code = site.code
    config = site.config("dq")
    numbers = (
        *(site.nums, *site.four_strides, *site.strides[4], *site.lengths, *map_strides(kv_map), *site.drop),
        *(code.score, code.mask, code.sink, site.scale, code.folded),
        *(site.sums_rows_exactly, site.config("dk").bm if site.end_functions[2] else None, *site.dims),
        *(BLOCK, site.dropout, site.precision, site.edge_of_stats, config.bn),
    )
    programs = -(-site.q_len // site.edge_of_stats) * site.batch * site.heads
    config = config._replace(stages=min(config.stages, 2), registers=None)
    return _launch(site, row_stats.backward_rows, programs, numbers, config)


def of_dkdv(
    site: Site,
    dk: Tensor | None,
    dv: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    q_map: Tensor | None,
    uniform: bool = False,
    config: configs.Config | None = None,
) -> Launch:
    code = site.code
    config = config or site.config("dv" if dk is None else "dk" if dv is None else "dkdv")
    numbers = (
        *(site.nums, *site.four_strides, *strides_of(dk), *strides_of(dv)),
        *(*strides_of(extra_k), *strides_of(extra_v), *site.lengths, site.flags, *map_strides(q_map)),
        *(
            *site.drop,
            site.dscale,
            code.score,
            None if uniform else code.mask,
            code.dscore,
            *((None, None, False) if uniform else site.end_functions),
            site.scale,
        ),
        *(code.folded, *site.dims, BLOCK, site.even, site.dropout, site.precision, uniform),
        *(site.program.dead_rows in NAN and not uniform, config.bm, config.bn),
    )
    programs = -(-site.kv_len // config.bn) * site.batch * site.kv_heads
    if uniform:
        config = config._replace(stages=1, registers=None)
    # What a line gains within a tile of queries is kept for this size of tiles.
    given = (site, dk, dv, extra_k, extra_v, q_map, uniform)
    again = None if site.end_functions[2] else functools.partial(of_dkdv, *given)
    kernel, descriptors = backward_kernels.backward_dkdv, _descriptors(site, config.bm, 0, 3)
    return _launch(site, kernel, programs, numbers, config, descriptors, again)


def of_dq(
    site: Site, dq: Tensor, kv_map: Tensor | None, uniform: bool, config: configs.Config | None = None
) -> Launch:
    code = site.code
    config = config or site.config("dq")
    if uniform:
        # Most of these programs leave at once: room for many of them.
        config = config._replace(stages=1, registers=None)
    accumulate = code.accumulate if uniform else code.others
    dead_rows = site.program.dead_rows
    is_constant = site.is_constant and not (uniform and dead_rows in NAN)
    if is_constant or (uniform and dead_rows in SCORES_ONLY):
        accumulate = None
    of_ends: tuple[Any, Any, int | None] = (None, None, None)
    if site.skips_ends and not uniform:
        table = next(table for table in code.tables if table.has_ends)
        of_ends = (table.add, table.slope, site.config("table").bm)
    numbers = (
        *(
            site.nums,
            site.gnums,
            *site.four_strides,
            *strides_of(dq),
            *site.lengths,
            site.flags,
            *map_strides(kv_map),
        ),
        *(*site.drop, site.dscale, code.score, None if uniform else code.mask, code.dscore, accumulate),
        *(
            *((None, None, False) if uniform else site.end_functions),
            *of_ends,
            site.scale,
            code.folded,
            *site.dims,
            BLOCK,
            site.even,
            site.dropout,
            site.precision,
            uniform,
            site.refines and not uniform,
        ),
        *(config.bm, config.bn),
    )
    programs = -(-site.q_len // config.bm) * site.batch * site.heads
    again = functools.partial(of_dq, site, dq, kv_map, uniform)
    kernel, descriptors = backward_kernels.backward_dq, _descriptors(site, config.bn, 1, 2)
    return _launch(site, kernel, programs, numbers, config, descriptors, again)


def of_table(site: Site, i: int, config: configs.Config | None = None) -> Launch:
    """The gradient of the i-th table."""
    code, table = site.code, site.code.tables[i]
    skips_ends = table.has_ends and site.skips_ends
    config = config or site.config("table" if table.by_distance else "pairs")
    together, parts = site.parts_of_table(table, config.bm)
    add = table.write if parts == 1 and table.write is not None else table.add
    numbers = (
        *(site.nums, site.gnums, *site.four_strides, site.batch, *site.lengths, parts, *site.drop),
        *(code.score, code.mask, table.slope, add, code.reach, code.reach_is_mask),
        *(*site.end_functions[:2], skips_ends, site.scale, code.folded, *site.dims),
        *(site.even, site.dropout, site.precision, table.by_distance, config.bm),
    )
    programs = site.heads * parts * together
    kernel = tables.backward_table
    return _launch(site, kernel, programs, numbers, config, _descriptors(site, config.bm, 0, 1, 2, 3))


def of_gather(site: Site, i: int) -> Launch:
    """The i-th array of what is gathered."""
    rows, keys = 16, 64
    (heads, *_), *_ = site.layouts_of_arrays[i]
    numbers = (site.nums, heads, site.q_len, site.kv_len, site.code.gather[i], rows, keys)
    return Launch(tables.gather_pairs, heads * -(-site.q_len // rows) * -(-site.kv_len // keys), numbers)
