"""The block map on the device: one program per row of a map, vectorised over the row's blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashfuse.kernels.block_map import BLOCK, block_count
from flashfuse.kernels.codegen import generate, load_module, render
from flashfuse.kernels.expr import variables, walk
from flashfuse.kernels.interval import bounds, needs_elements
from flashfuse.kernels.launch import Launch, Launches, on_device
from flashfuse.kernels.printer import CaptureType, Names, Printer, capture_type
from flashfuse.kernels.spec import ScoreProgram


def build_on_device(
    captures: Sequence[Tensor],
    ints: Sequence[int],
    device: torch.device,
    lead: tuple[int, int],
    sizes: tuple[int, int, int, int],
    program: ScoreProgram,
) -> tuple[Tensor, Tensor]:
    """As ``block_map.build``, which checks the arguments."""
    nq, nkv = block_count(sizes[2]), block_count(sizes[3])
    kv_map = torch.empty((*lead, nq, 2 + nkv), dtype=torch.int32, device=device)
    q_map = torch.empty((*lead, nkv, 2 + nq), dtype=torch.int32, device=device)
    types, strides = zip(*map(capture_type, captures), strict=True) if captures else ((), ())
    nums = (*(n for s in strides for n in s), *ints)
    plan = _plan(program, types, nums, lead, sizes[2:], device)
    ptrs = tuple(captures)
    aligned = all(t.data_ptr() % 16 == 0 for t in ptrs)
    states = None
    with on_device(device):
        by_element = plan.by_element
        if by_element is not None:
            states = torch.empty((*lead, nq, nkv), dtype=torch.int8, device=device)
            plan.launches.run("states", aligned, lambda: by_element, states, ptrs)
        plan.launches.run("rows", aligned, lambda: plan.rows, kv_map, q_map, states, ptrs)
    return kv_map, q_map


class _Plan(NamedTuple):
    by_element: Launch | None
    rows: Launch
    launches: Launches


@functools.lru_cache(maxsize=1024)
def _plan(
    program: ScoreProgram,
    types: tuple[CaptureType, ...],
    nums: tuple[int, ...],
    lead: tuple[int, int],
    lengths: tuple[int, int],
    device: torch.device,
) -> _Plan:
    """The launches of one map; compiled kernels belong to a device."""
    assert program.mask is not None
    nq, nkv = block_count(lengths[0]), block_count(lengths[1])
    numbers = (nums, *lengths, nq, nkv, lead[1])
    planes = lead[0] * lead[1]
    by_element: Launch | None = None
    classify: Any = None
    chunk = 256
    if needs_elements(program.mask):
        mask = generate(program, types).mask
        by_element = Launch(_block_states, planes * nq * nkv, (*numbers, mask, BLOCK), num_warps=8)
    else:
        classify, has_ranges = _classifier(program, types)
        chunk = 32 if has_ranges else 256
    rows = Launch(_map_rows, planes * (nq + nkv), (*numbers, classify, BLOCK, chunk))
    return _Plan(by_element, rows, Launches())


@functools.lru_cache(maxsize=1024)
def _classifier(program: ScoreProgram, types: tuple[CaptureType, ...]) -> tuple[Any, bool]:
    """``classify(b, h, q0, q1, kv0, kv1, ...) -> (full, some)``, and whether it reduces loads.

    One of q0 and kv0 is [1], the other [CHUNK].
    """
    assert program.mask is not None
    names = Names(program, types)
    block = bounds(program.mask, names.kinds)
    printer = Printer(names, {"q": "qi", "kv": "kvi"})
    for axis, extent in (("q", "Sq"), ("kv", "Skv")):
        if any(axis in variables(r) for r in block.ranges):
            elements = f"{axis}0[:, None] + tl.arange(0, {BLOCK})[None, :]"
            printer.lines.append(f"{axis}i = tl.minimum({elements}, {extent} - 1)")
    if any(
        n.op == "load" and variables(n) & {"q0", "kv0"} for e in (block.full, block.some) for n in walk(e)
    ):
        # What stands behind the last block is read, too.
        printer.lines += ["q0 = tl.minimum(q0, Sq - 1)", "kv0 = tl.minimum(kv0, Skv - 1)"]
    for i, source in enumerate(block.ranges):
        value = printer.text(source)
        for end, reduce in (("lo", "block_min"), ("hi", "block_max")):
            printer.lines.append(f"{end}{i} = {reduce}({value}, 1)")
            kind = names.kinds[source.args[0]]
            names.kinds[f"{end}{i}"] = "int" if kind == "bool" else kind
    everywhere = "((q0 >= 0) & (kv0 >= 0))"
    full, some = printer.as_kind(block.full, "bool"), printer.as_kind(block.some, "bool")
    lines = [*printer.lines, f"return {everywhere} & ({full}), {everywhere} & (({some}) | ({full}))"]
    source_text = render("classify", "b, h, q0, q1, kv0, kv1, Sq, Skv, ptrs, nums", lines)
    return load_module(source_text).classify, bool(block.ranges)


_LENGTHS = ["ptrs", "nums", "Sq", "Skv", "nq", "nkv", "Hm"]


@triton.jit(do_not_specialize=_LENGTHS)
def _map_rows(  # type: ignore[no-untyped-def]
    KvMap, QMap, States, ptrs, nums, Sq, Skv, nq, nkv, Hm,
    CLASSIFY: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) // (nq + nkv)
    row = tl.program_id(0) % (nq + nkv)
    if row < nq:
        out = KvMap + (plane.to(tl.int64) * nq + row) * (2 + nkv)
        _map_row(
            out, States, plane, row, nkv, ptrs, nums, Sq, Skv, nq, nkv, Hm, False, CLASSIFY, BLOCK, CHUNK
        )
    else:
        row = row - nq
        out = QMap + (plane.to(tl.int64) * nkv + row) * (2 + nq)
        _map_row(out, States, plane, row, nq, ptrs, nums, Sq, Skv, nq, nkv, Hm, True, CLASSIFY, BLOCK, CHUNK)


@triton.jit
def _map_row(  # type: ignore[no-untyped-def]
    Row, States, plane, row, n, ptrs, nums, Sq, Skv, nq, nkv, Hm,
    BY_KV: tl.constexpr, CLASSIFY: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Full blocks are written behind the partial ones, so those are counted first.
    num_partial = 0
    for start in range(0, n, CHUNK):
        partial, full = _states(
            States, plane, row, start, n, ptrs, nums, Sq, Skv, nq, nkv, Hm, BY_KV, CLASSIFY, BLOCK, CHUNK
        )
        num_partial += tl.sum(partial, 0)
    written_partial = 0
    written_full = 0
    for start in range(0, n, CHUNK):
        partial, full = _states(
            States, plane, row, start, n, ptrs, nums, Sq, Skv, nq, nkv, Hm, BY_KV, CLASSIFY, BLOCK, CHUNK
        )
        block = start + tl.arange(0, CHUNK)
        at_partial = written_partial + tl.cumsum(partial, 0) - 1
        at_full = num_partial + written_full + tl.cumsum(full, 0) - 1
        tl.store(Row + 2 + at_partial, block, mask=partial != 0)
        tl.store(Row + 2 + at_full, block, mask=full != 0)
        written_partial += tl.sum(partial, 0)
        written_full += tl.sum(full, 0)
    tl.store(Row, num_partial)
    tl.store(Row + 1, written_full)


@triton.jit
def _states(  # type: ignore[no-untyped-def]
    States, plane, row, start, n, ptrs, nums, Sq, Skv, nq, nkv, Hm,
    BY_KV: tl.constexpr, CLASSIFY: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(is partial, is full) of CHUNK blocks of a row, int32 [CHUNK]."""
    block = start + tl.arange(0, CHUNK)
    one = row + tl.arange(0, 1)
    if BY_KV:
        q_block = block
        kv_block = one
    else:
        q_block = one
        kv_block = block
    if CLASSIFY is None:
        offset = (plane.to(tl.int64) * nq + q_block) * nkv + kv_block
        state = tl.load(States + offset, mask=block < n, other=0)
        full = state == 2
        some = state != 0
    else:
        q0 = q_block * BLOCK
        kv0 = kv_block * BLOCK
        q1 = tl.minimum(q0 + (BLOCK - 1), Sq - 1)
        kv1 = tl.minimum(kv0 + (BLOCK - 1), Skv - 1)
        full, some = CLASSIFY(plane // Hm, plane % Hm, q0, q1, kv0, kv1, Sq, Skv, ptrs, nums)
    full = full & (kv_block * BLOCK + BLOCK <= Skv) & (block < n)
    some = some & (block < n)
    return (some & (full == 0)).to(tl.int32), full.to(tl.int32)


@triton.jit(do_not_specialize=_LENGTHS)
def _block_states(  # type: ignore[no-untyped-def]
    States, ptrs, nums, Sq, Skv, nq, nkv, Hm, MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """States[plane, q block, kv block] by looking at every element."""
    pid = tl.program_id(0)
    kv_block = pid % nkv
    q_block = (pid // nkv) % nq
    plane = pid // nkv // nq
    q = tl.minimum(q_block * BLOCK + tl.arange(0, BLOCK), Sq - 1)[:, None]
    kv = tl.minimum(kv_block * BLOCK + tl.arange(0, BLOCK), Skv - 1)[None, :]
    allowed = MASK(plane // Hm, plane % Hm, q, kv, Sq, Skv, ptrs, nums) & (q >= 0) & (kv >= 0)
    some = tl.max(tl.max(allowed.to(tl.int32), 1), 0)
    full = tl.min(tl.min(allowed.to(tl.int32), 1), 0)
    tl.store(States + pid.to(tl.int64), (some + full).to(tl.int8))
