"""Decide each site: which kernels run it, or why it is left."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from flashfuse.kernels import dispatch
from flashfuse.kernels import expr as E
from flashfuse.kernels.spec import Reason
from flashfuse.passes import dialect, nodes
from flashfuse.passes.nodes import same
from flashfuse.passes.region import AttentionRegion, NearMiss
from flashfuse.passes.tables import Capture, Table, device_of, dtype_of, sizes_of

MAX_CAPTURE_RANK = 8
"""Dimensions of a captured tensor that the kernels take."""


@dataclass(frozen=True)
class Cost:
    """Work and memory traffic of one site, one forward pass.

    Attributes:
        flops: multiply-adds count twice; of the two products, without skipped blocks.
        hbm_bytes_before: every tensor of the original site written once and read once.
        hbm_bytes_after: q, k, v and the captures read once, out and lse written once.
        density: fraction of the score matrix that the mask leaves; ``None`` if it is not known
            before the captures are.
    """

    flops: Any
    hbm_bytes_before: Any
    hbm_bytes_after: Any
    density: float | None = None


@dataclass(frozen=True)
class Approximation:
    """What was asked for beside the site's own mask.

    Attributes:
        pattern: which keys are kept.
        density: the fraction of scores that mask and pattern leave, apart from what depends on data such as
            padding; ``None`` if it is not known.
        exact_density: the same of the mask alone.
    """

    pattern: str
    density: float | None
    exact_density: float | None


@dataclass(frozen=True)
class Fuse:
    """Replace the site; ``selection`` says by which kernels.

    With an ``approximation`` the region's program is not the one that was proved, but has a pattern in its
    mask as well.
    """

    region: AttentionRegion
    selection: dispatch.Selection
    cost: Cost
    approximation: Approximation | None = None


@dataclass(frozen=True)
class Left:
    """Leave the site as it is."""

    site: AttentionRegion | NearMiss
    reasons: tuple[Reason, ...]


SitePlan = Fuse | Left


def plan(
    sites: Iterable[AttentionRegion | NearMiss], kernels: dispatch.Kernels = "auto"
) -> tuple[SitePlan, ...]:
    """A decision for every site; ``kernels`` says which are asked for."""
    return tuple(_plan(site, kernels) for site in sites)


def tuned(plans: Iterable[SitePlan]) -> tuple[SitePlan, ...]:
    """``plans`` with kernels that choose their tiles at the first call; what they compute is the same."""
    return tuple(
        replace(p, selection=dispatch.tuned(p.selection)) if isinstance(p, Fuse) else p for p in plans
    )


def _plan(site: AttentionRegion | NearMiss, kernels: dispatch.Kernels) -> SitePlan:
    if isinstance(site, NearMiss):
        return Left(site, site.reasons)
    device = nodes.value(site.output).device
    devices = {device, *(nodes.value(n).device for n in (*(o.node for o in site.operands), *site.factors))}
    # PyTorch reads indices and single numbers from the CPU's memory wherever the rest is; they are moved.
    devices |= {device_of(c) for c in _captured(site)} - {torch.device("cpu")}
    if devices != {device}:
        return Left(
            site, (Reason("device", f"the site mixes devices: {', '.join(sorted(map(str, devices)))}"),)
        )
    if any(
        size == 0 for size in (site.shape.batch, site.shape.num_q_heads, site.shape.q_len, site.shape.kv_len)
    ):
        return Left(site, (Reason("empty", f"a dimension is empty: {site.shape}"),))
    rank = max((len(sizes_of(c)) for c in _captured(site)), default=0)
    if rank > MAX_CAPTURE_RANK:
        return Left(
            site,
            (
                Reason(
                    "capture_rank",
                    f"a captured tensor has {rank} dimensions, at most {MAX_CAPTURE_RANK} are read",
                ),
            ),
        )
    if kernels == "auto" and any(r.kind == "max" for r in site.row_results):
        # PyTorch's do not tell the maximum.
        kernels = "triton"
    selection = dispatch.select(site.shape, site.program, site.dropout_p, device, kernels)
    if isinstance(selection, Reason):
        return Left(site, (selection,))
    return Fuse(site, selection, cost(site))


def _captured(region: AttentionRegion) -> list[Capture]:
    return [region.scope.captures[name] for name in region.program.captures]


def loads_full(region: AttentionRegion) -> dict[str, bool]:
    """Captures that hold something for every pair of a query and a key, and whether the model gave them.

    False: the graph builds the [.., Sq, Skv] tensor.
    """
    s, found = region.shape, {}
    if any(same(n, 1) for n in (s.q_len, s.kv_len)):
        return {}
    for e in (region.program.score, region.program.mask):
        for load in E.walk(e) if e is not None else ():
            if load.op != "load":
                continue
            capture = region.scope.captures[load.args[0]]
            sizes = sizes_of(capture) or (1,)
            used: set[str] = set()
            total: Any = 1
            for i, size in zip(load.operands, sizes, strict=True):
                own = E.variables(i) & {"q", "kv"}
                if own and not any(n.op == "load" for n in E.walk(i)):
                    used |= own
                    total = total * size
            if used == {"q", "kv"} and same(total, s.q_len * s.kv_len):
                found[load.args[0]] = not isinstance(capture, Table) and _is_given(capture)
    return found


def _is_given(node: fx.Node) -> bool:
    """Whether a tensor is an input or a parameter, perhaps viewed or cast."""
    while True:
        op = dialect.read(node)
        if op is None or op.name not in dialect.VIEWS | dialect.CASTS or not isinstance(op.input, fx.Node):
            return node.op in ("placeholder", "get_attr")
        node = op.input


def _nbytes(capture: Capture) -> Any:
    if not isinstance(capture, Table) and nodes.tensor(capture) is None:
        return 0
    return nodes.product(sizes_of(capture)) * dtype_of(capture).itemsize


def cost(region: AttentionRegion) -> Cost:
    """What the site costs before and after; symbolic under dynamic shapes."""
    s = region.shape
    once = sum(_nbytes(o.node) for o in region.operands) + _nbytes(region.output)
    scores = sum(
        2 * _nbytes(n) for n in {*region.interior, *region.masks} - {o.node for o in region.operands}
    )
    lse = 4 * s.batch * s.num_q_heads * s.q_len
    captured = sum(_nbytes(n) for n in dict.fromkeys(_captured(region)))
    flops = 2 * s.batch * s.num_q_heads * s.q_len * s.kv_len * (s.head_dim + s.v_head_dim)
    # Weights that something else uses are written once, and q and k read once more.
    returned = sum(_nbytes(w.node) + _nbytes(region.q.node) + _nbytes(region.k.node) for w in region.weights)
    return Cost(flops, once + scores, once + lse + captured + returned, density(region))


def density(region: AttentionRegion) -> float | None:
    """The fraction of scores that a mask without captures leaves, for one batch entry and head."""
    from flashfuse.kernels.reference import environment, evaluate

    s, mask = region.shape, region.program.mask
    if mask is None:
        return 1.0
    sizes = (s.q_len, s.kv_len)
    if (
        region.program.mask_program.captures
        or region.program.mask_program.ints
        or not all(isinstance(n, int) for n in sizes)
    ):
        return None
    # A sample of rows is enough: closed-form masks change slowly from row to row.
    step = max(1, s.q_len // 64)
    env = environment(region.program.mask_program, (), (), (1, 1, 1, s.kv_len), "cpu")
    env |= {"q": torch.arange(0, s.q_len, step).view(1, 1, -1, 1), "Sq": s.q_len}
    allowed = torch.as_tensor(evaluate(mask, env)).expand(1, 1, -1, s.kv_len)
    return float(allowed.double().mean())
