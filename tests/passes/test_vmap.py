"""Masks that a model builds under ``torch.vmap`` are read as the closed forms they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import flashfuse
from flashfuse import pipeline
from flashfuse.options import Options

pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]

B, H, S, D = 2, 3, 7, 16


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    flashfuse.clear_reports()


def over_indices(condition):
    """``condition(b, h, q, kv)`` at every index, as Transformers builds its masks."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        condition = torch.vmap(condition, in_dims=dims, out_dims=0)
    return condition(torch.arange(B), torch.arange(1), torch.arange(S), torch.arange(S))


def q_k_v():
    return [torch.randn(B, H, S, D) for _ in range(3)]


def test_causal_and_padded():
    def attend(q, k, v, pad):
        mask = over_indices(lambda b, h, i, j: (j <= i) & pad[b, j])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    pad = torch.arange(S)[None] >= torch.tensor([2, 0])[:, None]
    report = flashfuse.explain(attend, *q_k_v(), pad)
    assert [s.program for s in report.sites] == ["s*0.25 where kv <= q and arg_3[b, kv] else zero"]
    assert report.num_fused == 1 and report.check.ok


def test_packed_sequences():
    def attend(q, k, v, document):
        mask = over_indices(lambda b, h, i, j: (j <= i) & (document[b, i] == document[b, j]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    document = (torch.arange(S)[None] >= torch.tensor([3, 5])[:, None]).long()
    report = flashfuse.explain(attend, *q_k_v(), document)
    (site,) = report.sites
    assert site.status == "fused", site.reasons
    assert site.mask == "kv <= q and arg_3[b, q] == arg_3[b, kv]"
    assert report.check.ok


def test_window_in_the_eager_spelling():
    def attend(q, k, v):
        mask = over_indices(lambda b, h, i, j: (j <= i) & (j > i - 4))
        bias = torch.where(mask, torch.tensor(0.0), torch.finfo(torch.float32).min)
        return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v

    report = flashfuse.explain(attend, *q_k_v())
    assert [s.program for s in report.sites] == ["s*0.25 where kv <= q and kv > q - 4"]
    assert report.num_fused == 1 and report.check.ok


def untouched(run, *inputs):
    """Whether the graph of ``run`` comes back as it is, and what was found in it."""
    graphs = []

    def collect(gm, example_inputs):
        graphs.append((gm, *pipeline.run(gm, Options())))
        return gm

    torch.compile(run, backend=collect, fullgraph=True)(*inputs)
    ((gm, new, report),) = graphs
    return new is gm, report


def test_a_vmap_that_no_site_needs_stays():
    same, report = untouched(lambda x: over_indices(lambda b, h, i, j: x[b, i] > x[b, j]), torch.randn(B, S))
    assert same and not report.sites


def test_attention_under_vmap_stays():
    """What vmap computes of reals would lose its gradient; the search sees batched values there."""

    def attend(q, k, v):
        return torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)

    same, report = untouched(attend, *q_k_v())
    assert same
    assert not report.num_fused


def test_a_vmapped_bias_of_reals_is_loaded_as_it_is():
    def attend(q, k, v, slopes):
        distance = torch.vmap(lambda slope: slope * torch.arange(S).float())(slopes)
        return (q @ k.mT + distance[:, None]).softmax(-1) @ v

    report = flashfuse.explain(attend, *q_k_v(), torch.randn(H))
    assert report.check.ok
