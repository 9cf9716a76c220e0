"""Which blocks of a mask are empty, partial or full.

``build`` returns ``kv_map`` [Bm, Hm, nq, 2 + nkv] and ``q_map`` [Bm, Hm, nkv, 2 + nq], int32, over
blocks of 128 × 128: a row of ``kv_map`` is ``[n_partial, n_full, partial kv blocks…, full kv blocks…]``
for one block of queries (what follows is undefined), ``q_map`` is the same the other way round.
Empty blocks appear nowhere.  Bm is B if the mask depends on ``b``, else 1; Hm likewise for ``h``.
A block that sticks out past Skv is never full, so full blocks need no bounds check along kv.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashfuse.kernels.expr import Expr, variables
from flashfuse.kernels.interval import bounds, needs_elements
from flashfuse.kernels.reference import Value, environment, evaluate
from flashfuse.kernels.spec import ScoreProgram

BLOCK = 128
EMPTY, PARTIAL, FULL = 0, 1, 2


def build(
    captures: Sequence[Tensor],
    ints: Sequence[int],
    device: torch.device,
    sizes: tuple[int, int, int, int],
    program: ScoreProgram,
) -> tuple[Tensor, Tensor]:
    """(kv_map, q_map) of the mask of ``program``; ``sizes`` is (B, H, Sq, Skv).

    Captures and integers are in the order of ``program.captures`` and ``program.ints``.
    """
    if program.mask is None:
        raise ValueError(f"expected a program with a mask, got {program.text!r}")
    lead = leading_sizes(program, sizes)
    nq, nkv = block_count(sizes[2]), block_count(sizes[3])
    if 0 in (*lead, nq, nkv):
        empty = torch.zeros((*lead, nq, 2 + nkv), dtype=torch.int32, device=device)
        return empty, empty.new_zeros((*lead, nkv, 2 + nq))
    if device.type == "cuda":
        from flashfuse.kernels.block_map_triton import build_on_device

        return build_on_device(captures, ints, device, lead, sizes, program)
    states = block_states(captures, ints, device, sizes, program)
    return _compacted(states), _compacted(states.transpose(-1, -2))


def block_count(length: int, block: int = BLOCK) -> int:
    return (length + block - 1) // block


def leading_sizes(program: ScoreProgram, sizes: tuple[int, int, int, int]) -> tuple[int, int]:
    used = program.mask_variables
    return sizes[0] if "b" in used else 1, sizes[1] if "h" in used else 1


def _compacted(states: Tensor) -> Tensor:
    """Rows ``[n_partial, n_full, partial…, full…, 0…]`` from states [.., rows, columns]."""
    partial, full = states == PARTIAL, states == FULL
    rank = torch.where(partial, 0, torch.where(full, 1, 2))
    order = rank.argsort(dim=-1, stable=True)
    counts = torch.stack([partial.sum(-1), full.sum(-1)], -1)
    order = torch.where(torch.arange(order.shape[-1]) < counts.sum(-1, keepdim=True), order, 0)
    return torch.cat([counts, order], -1).to(torch.int32)


def block_states(
    captures: Sequence[Tensor],
    ints: Sequence[int],
    device: torch.device,
    sizes: tuple[int, int, int, int],
    program: ScoreProgram,
    blocks: tuple[int, int] = (BLOCK, BLOCK),
) -> Tensor:
    """EMPTY, PARTIAL or FULL per block, [Bm, Hm, nq, nkv] int8, by plain PyTorch.

    ``blocks`` is the size of a block in queries and in keys.
    """
    assert program.mask is not None
    lead = leading_sizes(program, sizes)
    counts = nq, nkv = block_count(sizes[2], blocks[0]), block_count(sizes[3], blocks[1])
    env = environment(program, captures, ints, (*lead, *sizes[2:]), device)
    for axis, name in ((2, "q"), (3, "kv")):
        count, block, size = counts[axis - 2], blocks[axis - 2], sizes[axis]
        shape = [1, 1, 1, 1]
        shape[axis] = count
        start = torch.arange(count, device=device).view(shape) * block
        env[f"{name}0"], env[f"{name}1"] = start, (start + block - 1).clamp(max=size - 1)
        shape[axis] = count * block
        env[name] = torch.arange(count * block, device=device).clamp(max=size - 1).view(shape)
    shape4 = (*lead, nq, nkv)
    if needs_elements(program.mask, blocks):
        allowed = _per_block(program.mask, env, lead, counts, blocks)
        full, some = allowed.amin(-1) != 0, allowed.amax(-1) != 0
    else:
        kinds = {n: _kind(t) for n, t in zip(program.captures, captures, strict=True)}
        found = bounds(program.mask, kinds, blocks)
        for i, source in enumerate(found.ranges):
            used = variables(source)
            needed = (nq if "q" in used else 0, nkv if "kv" in used else 0)
            values = _per_block(source, env, lead, needed, blocks)
            nan = values.isnan() if values.is_floating_point() else None
            env[f"lo{i}"] = (values if nan is None else values.masked_fill(nan, -torch.inf)).amin(-1)
            env[f"hi{i}"] = (values if nan is None else values.masked_fill(nan, torch.inf)).amax(-1)
        full = torch.as_tensor(evaluate(found.full, env), device=device).bool()
        some = torch.as_tensor(evaluate(found.some, env), device=device).bool()
    inside = torch.arange(1, nkv + 1, device=device) * blocks[1] <= sizes[3]
    state = torch.where(full & inside, FULL, torch.where(some | full, PARTIAL, EMPTY))
    return state.to(torch.int8).expand(shape4)


def _kind(t: Tensor) -> str:
    return "bool" if t.dtype == torch.bool else "float" if t.is_floating_point() else "int"


def _per_block(
    e: Expr, env: dict[str, Value], lead: tuple[int, int], counts: tuple[int, int], blocks: tuple[int, int]
) -> Tensor:
    """Values of ``e`` with the elements of each block last; an axis of 0 blocks has size 1."""
    values = torch.as_tensor(evaluate(e, env))
    values = values.int() if values.dtype == torch.bool else values
    (nq, bq), (nkv, bkv) = ((n, b) if n else (1, 1) for n, b in zip(counts, blocks, strict=True))
    tiles = values.expand(*lead, nq * bq, nkv * bkv).reshape(*lead, nq, bq, nkv, bkv)
    return tiles.transpose(-3, -2).flatten(-2)
