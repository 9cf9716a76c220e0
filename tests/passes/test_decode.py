"""One query against a cache that grows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import flashfuse
from flashfuse.checker import compare

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
