"""Numbers alone reject wrong gradients, whatever rounding of sums they allow: of factors, sinks and captures.

Only the gradient of one input is wrong, and the rest of the site is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from flashfuse.passes.find import find_regions
from flashfuse.passes.plan import Fuse, plan
from flashfuse.site import Site, extract

pytestmark = pytest.mark.usefixtures("one_thread")

B, H, S, D = 2, 4, 33, 16


def factor_of_heads(q, k, v, x):
    return ((q @ k.mT * 0.25).softmax(-1) * x[:, None, None]) @ v


def factor_of_keys(q, k, v, x):
    return ((q @ k.mT * 0.25).softmax(-1) * x[:, None, :S]) @ v


def factor_of_queries(q, k, v, x):
    return ((q @ k.mT * 0.25).softmax(-1) * x[:, :S, None]) @ v


def sink(q, k, v, x):
    scores = torch.cat([q @ k.mT * 0.25, x[:, None, None].expand(B, H, S, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def slopes(q, k, v, x):
    distance = torch.arange(S) - torch.arange(S)[:, None]
    return (q @ k.mT * 0.25 + x[:, None, None] * distance).softmax(-1) @ v


def temperature(q, k, v, x):
    return (q @ k.mT * x[:, None, None]).softmax(-1) @ v


def bias(q, k, v, x):
    return (q @ k.mT * 0.25 + x).softmax(-1) @ v


SHAPES = {factor_of_keys: (H, S), factor_of_queries: (H, S), bias: (H, S, S)}
PROGRAMS = (factor_of_heads, factor_of_keys, factor_of_queries, sink, slopes, temperature, bias)


def site_of(run: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Site, str]:
    """The site, and the name of the input that ``x`` is."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs = [torch.randn(B, H, S, D, dtype=dtype, requires_grad=True) for _ in range(3)]
    x = torch.randn(SHAPES.get(run, (H,)), dtype=dtype, requires_grad=True)
    graphs: list[fx.GraphModule] = []
    torch.compile(run, backend=lambda gm, _: graphs.append(gm) or gm, dynamic=False)(*inputs, x)
    (found,) = plan(find_regions(graphs[0].graph))
    assert isinstance(found, Fuse), found
    site = extract(found)
    (name,) = set(site.names) - {"q", "k", "v", *site.given}
    return site, name


def changed(x: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    """``x``, of which the gradient is ``by`` of what it should be."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.view_as(t)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return by(g)

    return Wrong.apply(x)


def with_gradient(site: Site, name: str, by: Callable[[Tensor], Tensor]) -> Site:
    at = site.names.index(name)

    def ours(*inputs: Any) -> Any:
        return site.ours(*inputs[:at], changed(inputs[at], by), *inputs[at + 1 :])

    return dataclasses.replace(site, ours=ours)


def without_terms(site: Site, name: str, missing: Callable[[Tensor], Tensor]) -> Site:
    """Rows of the output that ``missing`` selects have no part in the gradient of ``name``."""
    at = site.names.index(name)

    def ours(*inputs: Any) -> Any:
        out = site.ours(*inputs[:at], inputs[at].detach(), *inputs[at + 1 :])
        others = (x.detach() if isinstance(x, Tensor) else x for x in inputs)
        only = site.ours(*(inputs[i] if i == at else x for i, x in enumerate(others)))
        kept = torch.ones_like(only)
        missing(kept).zero_()
        return out + (only - only.detach()) * kept

    return dataclasses.replace(site, ours=ours)


def wrong(items: Any) -> set[str]:
    return {item.name.split()[0] for item in items if not item.ok}


def rolled(x: Tensor) -> Tensor:
    """Along its longest dimension."""
    return x.roll(1, x.shape.index(max(x.shape)))


CHANGES: dict[str, Callable[[Site, str], Site]] = {
    "too large by a hundredth": lambda site, name: with_gradient(site, name, lambda g: g * 1.01),
    "shifted by one": lambda site, name: with_gradient(site, name, rolled),
    "missing": lambda site, name: with_gradient(site, name, torch.zeros_like),
    "negated": lambda site, name: with_gradient(site, name, torch.neg),
    "without the last row": lambda site, name: without_terms(site, name, lambda x: x[:, :, -1]),
    "without one row": lambda site, name: without_terms(site, name, lambda x: x[0, -1, 5]),
    "of one batch entry": lambda site, name: without_terms(site, name, lambda x: x[1]),
}
SEEN_IN_BFLOAT16 = ("shifted by one", "missing", "negated", "of one batch entry")


@pytest.mark.parametrize("run", PROGRAMS, ids=lambda run: run.__name__)
def test_a_wrong_gradient_is_seen(run):
    site, name = site_of(run, torch.float32)
    right = site.check()
    assert all(item.ok for item in right), [str(i) for i in right if not i.ok]
    missed = [what for what, change in CHANGES.items() if wrong(change(site, name).check()) != {f"d{name}"}]
    assert missed == []


@pytest.mark.parametrize("run", PROGRAMS, ids=lambda run: run.__name__)
def test_a_wrong_gradient_is_seen_in_bfloat16(run):
    """What is wrong by less than the roundings of so few digits is the proof's to see."""
    site, name = site_of(run, torch.bfloat16)
    right = site.check()
    assert all(item.ok for item in right), [str(i) for i in right if not i.ok]
    missed = [what for what in SEEN_IN_BFLOAT16 if wrong(CHANGES[what](site, name).check()) != {f"d{name}"}]
    assert missed == []
