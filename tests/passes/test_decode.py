"""One query against a cache that grows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import flashfuse
from flashfuse.kernels.spec import AttentionShape
from flashfuse.numbers import compare
from flashfuse.passes.nodes import size_of
from flashfuse.proof.shrink import shrink

pytestmark = pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning")


def step(q, past_k, past_v, k, v):
    k, v = torch.cat([past_k, k], -2), torch.cat([past_v, v], -2)
    k, v = (t[:, :, None].expand(2, 2, 2, -1, 16).reshape(2, 4, t.shape[-2], 16) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def test_caches_of_keys_and_values_with_symbols_of_their_own():
    torch._dynamo.reset()
    flashfuse.clear_reports()
    compiled = torch.compile(step, backend="flashfuse", options={"inner": "eager"}, dynamic=True)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for past in (7, 8, 12):
            sizes = [(2, 4, 1, 16), *[(2, 2, past, 16)] * 2, *[(2, 2, 1, 16)] * 2]
            inputs = [torch.randn(*n) for n in sizes]
            exact = step(*(t.double() for t in inputs))
            assert compare("out", compiled(*inputs), step(*inputs), exact).ok
    assert [site.status for r in flashfuse.reports() for site in r.sites] == ["fused"]


def gathered(q, k, v, allowed):
    allowed = allowed[torch.arange(2)[:, None, None, None], torch.arange(k.shape[-2])[None, None, None]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def broadcast(q, k, v, allowed):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None, None])


@pytest.mark.parametrize(("run", "longer"), [(gathered, 0), (gathered, 3), (broadcast, 0)])
def test_a_mask_with_a_symbol_of_its_own(run, longer):
    """The sizes of the proof must be those at which the original runs."""
    torch._dynamo.reset()
    flashfuse.clear_reports()
    compiled = torch.compile(run, backend="flashfuse", options={"inner": "eager"})
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for n in (9, 13):
            sizes = [(2, 4, 1, 16), *[(2, 4, n, 16)] * 2]
            inputs = [*(torch.randn(*n) for n in sizes), torch.rand(2, n + longer) < 0.6]
            for tensor, dim in zip(inputs[1:], (2, 2, 1), strict=True):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
            exact = run(*(t.double() if t.is_floating_point() else t for t in inputs))
            assert compare("out", compiled(*inputs), run(*inputs), exact).ok
    (site,) = [site for r in flashfuse.reports() for site in r.sites]
    assert site.status == "fused" and site.check.proof.ok


def one_more(n, longer):
    """Symbolic sizes of a trace at ``n`` keys and a mask of ``n + longer``."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv(duck_shape=False)
    with torch._subclasses.FakeTensorMode(shape_env=env) as mode:
        tensors = [torch.randn(2, 4, n, 16), torch.rand(2, n + longer)]
        return [mode.from_tensor(t) for t in tensors]


@pytest.mark.parametrize("longer", [0, 3])
def test_sizes_as_in_the_trace(longer):
    """Equal symbols stay equal, and unequal ones in order."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("k", "mask")]
    for node, value in zip(nodes, one_more(40, longer), strict=True):
        node.meta["val"] = value
    k, mask = (node.meta["val"] for node in nodes)
    shape = AttentionShape(2, 4, 4, 1, size_of(k.shape[2]), 16, 16, torch.float32)
    sizes = shrink(shape, nodes, 0, "hints")
    assert sizes.as_traced and sizes(mask.shape[1]) - sizes(k.shape[2]) == longer
