"""The Triton variant: forward and backward of a site on the kernels of ``forward``, ``backward``, ``tables``.

Implements ``dispatch.Implementation``.  Shapes and formulas are those of ``attention_reference``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashfuse.kernels import dropout, sinks, triton_launches
from flashfuse.kernels.device_math import is_interpreted
from flashfuse.kernels.launch import Launch, launch, on_device
from flashfuse.kernels.layout import is_aligned
from flashfuse.kernels.spec import NAN, ScoreProgram
from flashfuse.kernels.triton_site import Site, threshold


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
    described = not site.splits
    q, k, v = site.rows(q, 0), site.rows(k, 1, described), site.rows(v, 2, described)
    # Without a map the kernel for few queries visits every key.
    every_key = site.splits and not site.shares_map
    kv_map = None if every_key else site.maps(maps, captures, ints, q.device)[0]
    aligned = is_aligned(q, k, v, *captures)
    if site.splits:
        parts = lse.new_empty((lse.numel() * site.splits, site.v_dim + 8))
        with on_device(q.device):
            ptrs = _with_arrays(site, captures, aligned)
            make = functools.partial(triton_launches.of_split, site, kv_map)
            site.launches.run("split", aligned, make, q, k, v, parts, kv_map, ptrs)
            name = "combine" if highest is None else "combine with maximum"
            make = functools.partial(triton_launches.of_combine, site)
            site.launches.run(name, aligned, make, parts, v, out, lse, highest, ptrs)
        return out, lse
    mean = v.mean(2, dtype=torch.float32).contiguous() if site.averages and not site.dropout else None
    with on_device(q.device):
        ptrs = _with_arrays(site, captures, aligned)
        ends = site.ends(captures, aligned)
        make = functools.partial(triton_launches.of_forward, site, kv_map)
        # A launch is kept by name, for the same kinds of arguments.
        name = "forward" if highest is None else "forward with maximum"
        site.launches.run(name, aligned, make, q, k, v, out, lse, highest, kv_map, seed, mean, ends, ptrs)
        if site.averages and site.dropout:
            make = functools.partial(triton_launches.of_dead_rows, site)
            site.launches.run("dead_rows", aligned, make, v, out, lse, seed)
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
    q, k, v = site.rows(q, 0, True), site.rows(k, 1, True), site.rows(v, 2, True)
    do, out = site.rows(do, 3, True), site.rows(out, 4)
    lse = lse.contiguous()
    kv_map, q_map = site.maps(maps, captures, ints, q.device)
    aligned = is_aligned(q, k, v, do, out, *captures)
    run = site.launches.run
    stats = lse.new_empty_strided(*site.layout_of_stats)
    dead = None
    if site.has_flags:
        dead = lse.new_empty(site.batch * site.kv_heads * site.flags, dtype=torch.int32)
    with on_device(q.device):
        ptrs = _with_arrays(site, captures, aligned)
        if site.sums_rows:
            make = functools.partial(triton_launches.of_rows, site, kv_map)
            run("rows", aligned, make, q, k, v, do, out, lse, stats, dead, kv_map, seed, ptrs)
        else:
            make = functools.partial(triton_launches.of_prepare, site)
            run("prepare", aligned, make, out, do, lse, stats, dead)
        if dlse is not None:
            stats[..., 1] -= torch.where(lse == float("-inf"), 0.0, dlse)
        ends = site.ends(captures, aligned)

        def add_up(kind: str, buffers: tuple[Tensor, ...]) -> None:
            """dq, and the captures' gradients into ``buffers``, of which there is one ``kind`` per launch."""
            make = functools.partial(triton_launches.of_dq, site, dq, kv_map, False)
            tensors = q, k, v, do, dq
            run(f"dq{kind}", aligned, make, *tensors, stats, None, kv_map, seed, ends, ptrs, buffers)
            for i, table in enumerate(site.tables):
                make = functools.partial(triton_launches.of_table, site, i)
                name = f"{'table' if table.by_distance else 'pairs'}{i or ''}{kind}"
                run(name, aligned, make, q, k, v, do, stats, seed, ends, ptrs, buffers)
            if site.uniform:
                make = functools.partial(triton_launches.of_dq, site, dq, None, True)
                its = _stats_of_dead_rows(site, lse, stats)
                run(f"uniform_dq{kind}", aligned, make, *tensors, its, dead, None, seed, None, ptrs, buffers)

        sums = _capture_gradients(site, add_up)
        extra = _dead_gradients(site, do, lse, aligned, dead, q, k, v, stats, seed, ptrs)
        for name, its_dk, its_dv in site.passes_over_keys(dk, dv):
            make = functools.partial(triton_launches.of_dkdv, site, its_dk, its_dv, *extra, q_map)
            tensors = q, k, v, do, its_dk, its_dv
            run(name, aligned, make, *tensors, stats, dead, *extra, q_map, seed, ends, ptrs)
        totals = dict(zip(site.of_score, sums, strict=True))
        for i, gradient in _sink_gradients(site, captures, ints, lse, stats).items():
            totals[i] = totals[i] + gradient if i in totals else gradient
    return [dq, dk, dv, *(totals[i].to(captures[i].dtype).contiguous() for i in wanted)]


def dropout_mask(seed: Tensor, dropout_p: float, sizes: tuple[int, int, int, int]) -> Tensor:
    """The keep mask [B, H, Sq, Skv] that ``seed`` draws."""
    batch, heads, q_len, kv_len = sizes
    keep = torch.empty(sizes, dtype=torch.bool, device=seed.device)
    if keep.numel():
        programs = -(-q_len // 32) * -(-kv_len // 64) * batch * heads
        with on_device(seed.device):
            launch(
                Launch(dropout.keep_mask, programs, (q_len, kv_len, threshold(dropout_p), 32, 64)),
                keep,
                seed,
            )
    return keep


def _with_arrays(site: Site, captures: Sequence[Tensor], aligned: bool) -> tuple[Tensor, ...]:
    """The captures, and what is gathered from them: what the kernels read."""
    ptrs = given = tuple(captures)
    for i, (shape, strides, dtype) in enumerate(site.layouts_of_arrays):
        array = given[0].new_empty_strided(shape, strides, dtype=dtype)
        make = functools.partial(triton_launches.of_gather, site, i)
        site.launches.run(("gather", i), aligned, make, array, given)
        ptrs += (array,)
    return ptrs


# --- gradients -----------------------------------------------------------------------------------


def _capture_gradients(site: Site, add_up: Callable[[str, tuple[Tensor, ...]], None]) -> list[Tensor]:
    """Gradients of ``of_score``; ``add_up``, which works out dq, adds to two buffers for each.

    See ``device_math.add_gradient``.  The sums are float32, but for what one program sums and writes; of full
    float32 what shrinks is summed in float64, which libraries come near to by adding in trees.
    Where PyTorch is asked for deterministic algorithms, the sums are taken in integers, in a second
    pass, of the scale that the largest term of the first gives.  A NaN or infinite term makes the whole
    gradient NaN then.
    """
    buffers = site.buffers
    if not buffers or not torch.are_deterministic_algorithms_enabled():
        sums = []
        for buffer in buffers:
            new = torch.empty if buffer.is_written else torch.zeros
            sums.append(new(buffer.sizes, dtype=buffer.dtype, device=site.device))
        add_up("", tuple(t for s in sums for t in (s, s)))
    else:
        bits = torch.zeros(len(buffers), dtype=torch.int32, device=site.device)
        add_up("_largest", tuple(t for i in range(len(buffers)) for t in (bits[i:], bits[i:])))
        # So many terms of the largest magnitude stay below 2^62.
        _, exponents = torch.frexp(bits.view(torch.float32))
        most = 62 - site.scores.bit_length()
        scales = torch.ldexp(torch.ones_like(bits, dtype=torch.float32), most - exponents)
        scales = torch.where(bits.view(torch.float32).isfinite(), scales.clamp(max=2.0**126), float("nan"))
        wholes = [torch.zeros(buffer.sizes, dtype=torch.int64, device=site.device) for buffer in buffers]
        add_up("_exact", tuple(t for i, w in enumerate(wholes) for t in (w, scales[i:])))
        sums = [(w.double() / scale).float() for w, scale in zip(wholes, scales, strict=True)]
    return [s if b.row is None else s[..., : b.row] for s, b in zip(sums, buffers, strict=True)]


def _sink_gradients(
    site: Site, captures: Sequence[Tensor], ints: Sequence[int], lse: Tensor, stats: Tensor
) -> dict[int, Tensor]:
    """By position: the gradients of the wanted captures that the sink reads."""
    if not site.of_sink:
        return {}
    if site.precision == "ieee":
        lse, stats = lse.double(), stats.double()
    sizes = (site.batch, site.heads, site.q_len, site.kv_len)
    exponent = sinks.logits(site.program, captures, ints, sizes, lse) - lse
    if not site.code.folded:
        exponent = exponent - stats[..., 2] * math.log(2)
    # No weight is above 1; the kernels have the largest sinks a little smaller than they are.
    weight = torch.where(lse == float("-inf"), 0, exponent.clamp(max=0).exp())
    names = site.program.captures
    wanted = [names[i] for i in site.of_sink]
    found = sinks.gradients(site.program, captures, ints, sizes, weight, stats[..., 1], wanted)
    return {i: found[names[i]] for i in site.of_sink}


def _dead_gradients(
    site: Site,
    do: Tensor,
    lse: Tensor,
    aligned: bool,
    dead: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """What dead rows add to dk and dv, float32, shaped like them; ``rest`` as in ``backward``.

    Where no flag of ``dead`` is set, memory as it was.  That dv is NaN there is said by ``dead`` alone.
    """
    if site.visits_dead_rows:
        stats, seed, ptrs = rest
        stats = _stats_of_dead_rows(site, lse, stats)
        extra_k = do.new_empty(k.shape, dtype=torch.float32) if site.uniform else None
        extra_v = do.new_empty(v.shape, dtype=torch.float32)
        tensors = (q, k, v, do, extra_k, extra_v, stats, dead, None, None, None, seed, None, ptrs)
        make = functools.partial(triton_launches.of_dkdv, site, extra_k, extra_v, None, None, None, True)
        site.launches.run("uniform_dkdv", aligned, make, *tensors)
        return extra_k, extra_v
    if site.program.dead_rows != "mean":
        return None, None
    sums = torch.where((lse == float("-inf"))[..., None], do, 0).sum(2, dtype=torch.float32)
    total = sums.view(site.batch, site.kv_heads, site.group, site.v_dim).sum(2) / site.kv_len
    return None, total[:, :, None].expand(-1, -1, site.kv_len, -1)


def _stats_of_dead_rows(site: Site, lse: Tensor, stats: Tensor) -> Tensor:
    """``stats`` of the pass over dead rows: a delta of NaN makes every gradient NaN that they reach."""
    if site.program.dead_rows not in NAN:
        return stats
    delta = torch.where(lse == float("-inf"), float("nan"), stats[..., 1])
    return torch.cat((stats[..., :1], delta[..., None], stats[..., 2:]), -1)


# --- sites ---------------------------------------------------------------------------------------

_SITES: dict[Hashable, Site] = {}
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
) -> Site:
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
        site = _SITES[key] = Site(tensors, captures, ints, program, dropout_p, wanted, with_dlse, tune)
    return site


def _may_tune(device: torch.device) -> bool:
    """Other tiles are other roundings, which deterministic algorithms must not choose by the clock."""
    return device.type == "cuda" and not is_interpreted() and not torch.are_deterministic_algorithms_enabled()


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
