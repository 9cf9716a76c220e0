"""Whether a tensor is outside the rule because a rewrite is wrong, or because the model hangs on a rounding.

A router takes the largest of two numbers that differ by a rounding, a batch norm divides by the spread of
four samples: such a model's own result is another one after any change of rounding size.  In a few draws its
error against float64 is 0 or large by luck, and so is ours; one says nothing of the other.

A tensor counts as *unstable* rather than wrong only where both hold:

- the unmodified model, with each of its inputs and weights changed by one unit in the last place, is outside
  the rule too, by so much that ours is within the rule if that run is taken for the original;
- every fused site, alone, on the inputs that it has in this model, is within the rule.

The first says that nothing can be learnt from the whole model; the second is what is left to learn from.  It
is the second that a wrong rewrite does not pass, however chaotic the model around it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flashfuse.inputs import InputSet
from flashfuse.numbers import FACTOR, check_graph, check_runs
from flashfuse.passes import nodes
from flashfuse.passes.find import find_regions
from flashfuse.passes.inline import inline
from flashfuse.passes.plan import Fuse, plan
from flashfuse.passes.rewrite import copy_graph_module
from flashfuse.report import CheckItem
from flashfuse.site import Site, extract, original_graph

DRAWS = 12
NUDGES = 3
"""Runs of the nudged original over all draws, at most."""


@dataclass(frozen=True)
class Pooled:
    """One tensor over several draws, taken together as if they were one."""

    name: str
    ours: float
    original: float
    rounding: float
    note: str
    differs: bool
    """NaN, infinity or the shape does."""

    @property
    def ok(self) -> bool:
        return not self.differs and self.ours <= FACTOR * self.original + self.rounding

    def __str__(self) -> str:
        return f"{self.name}: error {self.ours:.3g}, the original's {self.original:.3g} ({self.note})"


def pooled(draws: Sequence[Sequence[CheckItem]]) -> list[Pooled]:
    found = []
    for items in zip(*draws, strict=True):
        ours, original = (max(getattr(i, f"error_{who}") for i in items) for who in ("ours", "original"))
        bad = [i for i in items if not i.ok]
        found.append(
            Pooled(
                items[0].name,
                ours,
                original,
                max(i.limit - FACTOR * i.error_original for i in items),
                "; ".join(i.note for i in bad),
                any(i.note and not i.limit for i in bad),
            )
        )
    return found


def redrawn(inputs: Sequence[Any], seed: int) -> list[Any]:
    """``inputs`` with a tenth of noise; themselves for seed 0."""
    generator = torch.Generator().manual_seed(seed)

    def redraw(x: Any) -> Any:
        if not seed or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        noise = 0.1 * torch.randn(x.shape, generator=generator)
        return (x.detach() * (1 + noise)).requires_grad_(x.requires_grad)

    return [redraw(x) for x in inputs]


def differences(
    gm: fx.GraphModule, new: fx.GraphModule, inputs: Sequence[Any], training: bool
) -> tuple[list[str], list[str]]:
    """Outputs and gradients that are wrong, and those that are unstable.

    At these sizes the largest rounding of a run is as much luck as anything.  A tensor that is outside
    the rule is therefore looked at over several draws of weights and inputs.
    """
    draws = [check_graph(gm, new, inputs, training).items]
    if all(item.ok for item in draws[0]):
        return [], []
    draws += [check_graph(gm, new, redrawn(inputs, i), training).items for i in range(1, DRAWS)]
    outside = {i: p for i, p in enumerate(pooled(draws)) if not p.ok}
    if not outside:
        return [], []
    excused = _excused(gm, inputs, training, outside)
    if excused and (why := sites_outside(gm, inputs, training)):
        return [f"{p} [{why}]" for p in outside.values()], []
    wrong = [str(p) for i, p in outside.items() if i not in excused]
    return wrong, [f"{p} [nudged: {excused[i]:.3g}]" for i, p in outside.items() if i in excused]


# --- the original by itself -----------------------------------------------------------------------


def _excused(
    gm: fx.GraphModule, inputs: Sequence[Any], training: bool, outside: dict[int, Pooled]
) -> dict[int, float]:
    """For each tensor that the nudged original has outside the rule, as far as ours is: its error."""
    found: dict[int, float] = {}
    for seed in range(NUDGES):
        draws = [
            check_graph(gm, nudged(gm, 1000 * seed + i), redrawn(inputs, i), training).items
            for i in range(DRAWS)
        ]
        for i, own in enumerate(pooled(draws)):
            ours = outside.get(i)
            if ours is None or ours.differs or own.differs or own.ok:
                continue
            if ours.ours <= FACTOR * own.ours + own.rounding:
                found.setdefault(i, own.ours)
        if len(found) == len(outside):
            break
    return found


def nudged(gm: fx.GraphModule, seed: int) -> fx.GraphModule:
    """``gm`` with every number that it is given moved by one unit in the last place, up or down."""
    copied = copy_graph_module(gm)
    placeholders = [n for n in copied.graph.nodes if n.op == "placeholder"]
    with copied.graph.inserting_after(placeholders[-1]):
        for i, node in enumerate(placeholders):
            example = nodes.tensor(node)
            if example is None or not example.is_floating_point():
                continue
            moved = copied.graph.call_function(_nudge, (node, 1000 * seed + i))
            moved.meta.update(node.meta)
            node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
    copied.recompile()
    return copied


def _nudge(x: Tensor, seed: int) -> Tensor:
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x + x.detach() * (signs * torch.finfo(x.dtype).eps).to(x)


# --- the sites by themselves ----------------------------------------------------------------------


def sites_outside(gm: fx.GraphModule, inputs: Sequence[Any], training: bool) -> str:
    """The first fused site that is outside the rule on the inputs that it has in ``gm``, or ``""``."""
    if any(isinstance(child, fx.GraphModule) for child in gm.children()):
        return "graphs inside the graph: sites not examined alone"
    new = copy_graph_module(gm)
    inline(new, None)
    nodes.name_in_place_results(new.graph)
    plans = [p for p in plan(find_regions(new.graph)) if isinstance(p, Fuse)]
    sites = [(p, extract(p)) for p in plans]
    draws: list[list[tuple[CheckItem, ...]]] = [[] for _ in sites]
    for i in range(DRAWS):
        env = _values(new, redrawn(inputs, i))
        for (p, site), found in zip(sites, draws, strict=True):
            found.append(_check(p, site, env, training))
    for (p, _), found in zip(sites, draws, strict=True):
        for item in pooled(found):
            if not item.ok:
                return f"site {p.region.name} alone, {item}"
    return ""


def _check(p: Fuse, site: Site, env: dict[fx.Node, Any], training: bool) -> tuple[CheckItem, ...]:
    _, mapping = original_graph(p.region, site.given)
    given = {str(new.target): env[old] for old, new in mapping.items() if new.op == "placeholder"}
    own = [site.given[name] if name in site.given else given[name] for name in site.names]
    return check_runs(
        site.original, site.ours, site.reference, own, site.names, training, "",
        site.inherent(InputSet("", own)), site.computed_in,
    )  # fmt: skip


def _values(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Every value of a run, as it was when it was made."""
    env: dict[fx.Node, Any] = {}

    class Recording(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            env[n] = result.detach().clone() if isinstance(result, Tensor) else result
            return result

    with torch.no_grad():
        torch.manual_seed(0)
        Recording(gm, garbage_collect_values=False).run(
            *(x.detach().clone() if isinstance(x, Tensor) else x for x in inputs)
        )
    return env
