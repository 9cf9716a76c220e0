"""The pipeline, on one screen.

``find_regions`` lifts and analyses every site, ``plan`` decides, ``SiteChecker`` proves or compares,
``rewrite`` emits, and the report says what came of it.  Between the two, and only where it was asked for,
``sparsify`` makes sites approximate.  Stages are plain functions of values; the input graph is never changed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from flashfuse.checker import SiteChecker
from flashfuse.kernels.spec import Reason
from flashfuse.options import Options
from flashfuse.passes import nodes
from flashfuse.passes.bodies import call_with, movable, move_in
from flashfuse.passes.find import find_regions
from flashfuse.passes.inline import inline
from flashfuse.passes.plan import Fuse, Left, SitePlan, loads_full, plan, tuned
from flashfuse.passes.region import AttentionRegion
from flashfuse.passes.rewrite import copy_graph_module, rewrite
from flashfuse.passes.sparsify import sparsify
from flashfuse.report import Report, SiteCheck, SiteReport


def run(
    gm: fx.GraphModule, options: Options, on_step: Callable[[str], None] = lambda text: None
) -> tuple[fx.GraphModule, Report]:
    """Rewrite ``gm``; returns the new module (``gm`` itself where nothing was fused) and the report.

    Graphs inside the graph (activation checkpointing, autocast regions) are rewritten too.
    ``on_step`` is told what is being checked.
    """
    started = time.perf_counter()
    checker = None
    if options.verify != "off":
        checker = SiteChecker(options.verify, options.repro, on_step)
    new, sites = _run(gm, checker, options)
    proof_ms, numbers_ms = (checker.proof_ms, checker.numbers_ms) if checker is not None else (0.0, 0.0)
    report = Report(
        sites=sites,
        graph_name=type(gm).__name__,
        num_nodes_before=len(gm.graph.nodes),
        num_nodes_after=len(new.graph.nodes),
        pass_ms=(time.perf_counter() - started) * 1e3 - proof_ms - numbers_ms,
        proof_ms=proof_ms,
        numbers_ms=numbers_ms,
    )
    return new, report


def _run(
    gm: fx.GraphModule, checker: SiteChecker | None, options: Options
) -> tuple[fx.GraphModule, tuple[SiteReport, ...]]:
    new, plans, checks = _rewritten(gm, checker, options)
    sites = [site_report(p, checks.get(p.region.name if isinstance(p, Fuse) else p.site.name)) for p in plans]
    changed = any(isinstance(p, Fuse) for p in plans)
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule):
            new_child, inner = _run_body(new, name, checker, options)
            sites += inner
            if new_child is not child:
                setattr(new, name, new_child)
                changed = True
    return (new if changed else gm), tuple(sites)


def _run_body(
    caller: fx.GraphModule, name: str, checker: SiteChecker | None, options: Options
) -> tuple[fx.GraphModule, tuple[SiteReport, ...]]:
    """As :func:`_run`, for the graph called ``name`` inside ``caller``, a copy.

    Masks that the caller makes and a site inside would load whole are made inside, where that helps.
    """
    body: fx.GraphModule = caller.get_submodule(name)  # type: ignore[assignment]
    arguments = movable(caller, name)
    exact = dataclasses.replace(options, sparsity=None)
    if arguments and any(site.given_full for site in _run(body, None, exact)[1]):
        inside, operands = move_in(caller, name, arguments)
        new, sites = _run(inside, checker, options)
        if all(site.status == "fused" and not site.loads_full for site in sites):
            call_with(caller, name, operands)
            return new, sites
    return _run(body, checker, options)


def _rewritten(
    gm: fx.GraphModule, checker: SiteChecker | None, options: Options
) -> tuple[fx.GraphModule, tuple[SitePlan, ...], dict[str, SiteCheck]]:
    """A rewritten copy of ``gm``, what became of each site, and the checks.

    Calls that hold attention are taken apart first.  Those of which nothing is fused are put back, that
    is, the copy is made again without them, and what was found inside is why the call is left.
    """
    wanted: frozenset[str] | None = None
    inside: dict[str, tuple[Reason, ...]] = {}
    while True:
        new = copy_graph_module(gm)
        inlined = inline(new, wanted)
        nodes.name_in_place_results(new.graph)
        plans = plan(find_regions(new.graph), options.kernels)
        checks: dict[str, SiteCheck] = {}
        if checker is not None:
            plans, checks = checker.check_all(plans)
        if options.sparsity is not None:
            plans = sparsify(new, plans, options.sparsity, options.kernels)
            if checker is not None:
                plans, checks = checker.check_approximations(plans, checks)
        if options.autotune:
            plans = tuned(plans)
        plans = rewrite(new, plans)
        regions = [p.region for p in plans if isinstance(p, Fuse)]
        fused = {n for r in regions for n in (r.output, *r.interior, *r.masks)}
        useful = frozenset(call.name for call in inlined if call.nodes & fused)
        if len(useful) == len(inlined):
            return new, explained(plans, inside), checks
        wanted = useful
        for call in inlined:
            left = [p for p in plans if isinstance(p, Left) and p.site.output in call.nodes]
            inside[call.name] = tuple(reason for p in left for reason in p.reasons)


def explained(plans: Sequence[SitePlan], inside: Mapping[str, tuple[Reason, ...]]) -> tuple[SitePlan, ...]:
    """``plans`` with the reasons found inside a call for leaving it, where there are any."""
    return tuple(
        Left(p.site, inside[p.site.name]) if isinstance(p, Left) and inside.get(p.site.name) else p
        for p in plans
    )


NOT_REPEATABLE = (
    "gradients are summed in an order that changes from run to run, except under "
    'torch.use_deterministic_algorithms(True) or with options={"kernels": "triton"}'
)


def site_report(plan: SitePlan, check: SiteCheck | None) -> SiteReport:
    """What the report says of one site."""
    region = plan.region if isinstance(plan, Fuse) else plan.site
    fused = isinstance(plan, Fuse)
    reasons = () if isinstance(plan, Fuse) else plan.reasons
    if not isinstance(region, AttentionRegion):
        return SiteReport(region.name, "left", reasons, source=region.source)
    refused = (
        [(n, r) for n, r in plan.selection.refused if r.code != "device"] if isinstance(plan, Fuse) else []
    )
    used = [f"{name} not used: {r.message}" for name, r in refused]
    if isinstance(plan, Fuse) and not plan.selection.variant.repeatable:
        used.append(NOT_REPEATABLE)
    full = loads_full(region)
    return SiteReport(
        name=region.name,
        status="fused" if fused else "left",
        reasons=reasons,
        program=region.program.text,
        mask=str(region.program.mask) if region.program.mask is not None else "",
        dead_rows=region.program.dead_rows,
        shape=region.shape,
        dropout_p=region.dropout_p,
        gqa_group=region.shape.gqa_group,
        source=region.source,
        cost=plan.cost if isinstance(plan, Fuse) else None,
        variant=plan.selection.variant.name if isinstance(plan, Fuse) else "",
        notes=(*region.notes, *used),
        check=check,
        loads_full=tuple(name for name, given in full.items() if not given),
        given_full=tuple(name for name, given in full.items() if given),
        approximation=plan.approximation if isinstance(plan, Fuse) else None,
    )


def with_example_values(gm: fx.GraphModule, example_args: Sequence[object]) -> fx.GraphModule:
    """A copy of ``gm`` whose nodes know their shapes, from ``example_args`` where they do not."""
    if all(nodes.value(n) is not None for n in gm.graph.nodes if n.op == "placeholder"):
        return gm
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    class WithNumbers(FakeTensorProp):
        """Sizes that a graph reads are kept as well; PyTorch 2.11 does so for tensors only."""

        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            n.meta.setdefault("val", result)
            return result

    copied = copy_graph_module(gm)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    WithNumbers(copied, mode).propagate(*example_args)
    return copied


def merged(reports: Sequence[Report], **fields: object) -> Report:
    """One report of several graphs."""
    return Report(
        sites=tuple(site for r in reports for site in r.sites),
        graph_name=", ".join(dict.fromkeys(r.graph_name for r in reports)),
        num_nodes_before=sum(r.num_nodes_before for r in reports),
        num_nodes_after=sum(r.num_nodes_after for r in reports),
        warnings=tuple(w for r in reports for w in r.warnings),
        pass_ms=sum(r.pass_ms for r in reports),
        proof_ms=sum(r.proof_ms for r in reports),
        numbers_ms=sum(r.numbers_ms for r in reports),
        **fields,  # type: ignore[arg-type]
    )
