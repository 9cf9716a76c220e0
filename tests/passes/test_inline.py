"""Calls that hold attention are taken apart, and only where that is of use."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import flashfuse
from flashfuse import pipeline
from flashfuse.kernels.spec import Reason
from flashfuse.numbers import compare
from flashfuse.options import Options
from flashfuse.passes.inline import _MEANING, encoder_layer

pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.usefixtures("one_thread"),
]

S, E = 7, 16
PADDING = torch.arange(S)[None] >= torch.tensor([S - 2, S])[:, None]
FUTURE = torch.ones(S, S, dtype=torch.bool).triu(1)

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias of k and v": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "own projections": {"kdim": 12, "vdim": 10},
    "sequence first": {"batch_first": False},
}
CALLS: dict[str, dict[str, Any]] = {
    "no mask": {"need_weights": False},
    "weights unused": {},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "future": {"attn_mask": FUTURE, "need_weights": False},
    "causal": {"attn_mask": FUTURE, "is_causal": True, "need_weights": False},
    "both": {"attn_mask": FUTURE, "key_padding_mask": PADDING, "need_weights": False},
    "biases": {"attn_mask": torch.randn(2 * 4, S, S)},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    flashfuse.clear_reports()


def programs(report: flashfuse.Report) -> list[str]:
    assert not [r for site in report.sites for r in site.reasons]
    assert report.num_fused == report.num_sites
    return [site.program for site in report.sites]


@pytest.mark.parametrize(
    ("module", "call", "train"),
    [
        (m, c, bool(i % 2))
        for i, (m, c) in enumerate(itertools.product(MODULES, CALLS))
        if m == "plain" or i % 3 == 0
    ],
)
def test_multihead_attention_under_dynamo(module: str, call: str, train: bool):
    fields, kwargs = {"batch_first": True} | MODULES[module], CALLS[call]
    attention = nn.MultiheadAttention(E, 4, dropout=0.1, **fields).train(train)
    sizes = (2, S) if attention.batch_first else (S, 2)
    inputs = [torch.randn(*sizes, n) for n in (E, attention.kdim, attention.vdim)]
    report = flashfuse.explain(lambda q, k, v: attention(q, k, v, **kwargs)[0], *inputs)
    assert len(programs(report)) == 1
    assert report.sites[0].dropout_p == (0.1 if train else 0.0)
    assert report.check.ok, [i for i in report.check.items if not i.ok]


def test_masks_are_closed_forms():
    attention = nn.MultiheadAttention(E, 4, batch_first=True)

    def attend(x, pad):
        future = torch.ones(S, S, dtype=torch.bool).triu(1)
        return attention(x, x, x, key_padding_mask=pad, attn_mask=future, need_weights=False)[0]

    (program,) = programs(flashfuse.explain(attend, torch.randn(2, S, E), PADDING))
    assert program == "s*0.5 where kv <= q and not arg_1[b, kv] else zero"


def test_returned_weights_under_dynamo():
    attention, x = nn.MultiheadAttention(E, 4, batch_first=True), torch.randn(2, S, E)
    report = flashfuse.explain(attention, x, x, x)
    assert [(site.status, site.check.ok) for site in report.sites] == [("fused", True)]
    assert report.check.ok


def test_a_call_of_which_nothing_is_fused_stays_as_it_was(monkeypatch):
    monkeypatch.setattr("flashfuse.kernels.dispatch.select", lambda *_: Reason("no_kernel", "none"))
    attention, x = nn.MultiheadAttention(E, 4, batch_first=True), torch.randn(2, S, E)
    graphs = []

    def collect(gm, example_inputs):
        before = str(gm.graph)
        new, report = pipeline.run(gm, Options())
        graphs.append((new is gm, before == str(gm.graph), report))
        return gm

    torch.compile(attention, backend=collect)(x, x, x)
    ((untouched, unchanged, report),) = graphs
    assert untouched and unchanged
    assert [r.code for site in report.sites for r in site.reasons] == ["no_kernel"]
    assert [site.name for site in report.sites] == ["multi_head_attention_forward"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_under_dynamo(norm_first: bool):
    model = nn.Transformer(E, 4, 2, 1, 32, batch_first=True, norm_first=norm_first)
    source, target = torch.randn(2, S, E), torch.randn(2, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    report = flashfuse.explain(
        model, source, target, src_key_padding_mask=PADDING, tgt_mask=causal, tgt_is_causal=True
    )
    assert len(programs(report)) == 4
    # The gradients of the many small sums around the sites are a matter of luck; the sites' own are checked.
    assert all(site.check.ok for site in report.sites)
    assert report.check.items[0].ok, report.check.items[0]


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_without_gradients_takes_the_fast_path(padded: bool):
    layer = nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, activation="gelu")
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, S, E)
    kwargs = {"src_key_padding_mask": PADDING} if padded else {}
    with torch.no_grad():
        report = flashfuse.explain(model, x, **kwargs)
        assert len(programs(report)) == 2
        assert report.check.ok, [i for i in report.check.items if not i.ok]
        compiled = torch.compile(model, backend="flashfuse", options={"inner": "eager"})
        ours, original = compiled(x, **kwargs), model(x, **kwargs)
    assert compare("out", ours, original, model.double()(x.double(), **kwargs)).ok


@pytest.mark.parametrize("mask_type", [None, 0, 1, 2])
@pytest.mark.parametrize("norm_first", [False, True])
def test_definition_of_the_fast_path(mask_type: int | None, norm_first: bool):
    """Rows without a key and masks of floats included."""

    def weights(*sizes: int) -> Tensor:
        return torch.randn(*sizes) / E**0.5

    shapes = {None: (), 0: (S, S), 1: (2, S), 2: (2, 4, S, S)}
    mask = None if mask_type is None else torch.rand(shapes[mask_type]) < 0.4
    args = [
        torch.randn(2, S, E), E, 4, weights(3 * E, E), weights(3 * E), weights(E, E), weights(E), True,
        norm_first, 1e-5, weights(E), weights(E), weights(E), weights(E), weights(32, E), weights(32),
        weights(E, 32), weights(E),
    ]  # fmt: skip
    masks = [None] if mask is None else [mask, torch.where(mask, float("-inf"), 0.0), mask.float() * 0.5]
    if mask is not None:
        masks[0][0] = True
    for m in masks:
        with torch.no_grad():
            original = torch._transformer_encoder_layer_fwd(*args, m, mask_type)
            ours = encoder_layer(*args, m, mask_type)
            double = [a.double() if isinstance(a, Tensor) else a for a in args]
            assert compare("out", ours, original, encoder_layer(*double, m, mask_type)).ok


def test_dynamic_lengths():
    attention = nn.MultiheadAttention(E, 4, batch_first=True)

    def attend(x):
        return attention(x, x, x, need_weights=False)[0]

    compiled = torch.compile(attend, backend="flashfuse", dynamic=True, options={"inner": "eager"})
    for length in (5, 9):
        x = torch.randn(2, length, E)
        ours, original = compiled(x), attend(x)
        exact = copy.deepcopy(attention).double()(*[x.double()] * 3, need_weights=False)[0]
        assert compare("out", ours, original, exact).ok
    assert [site.status for r in flashfuse.reports() for site in r.sites] == ["fused"]


class Block(nn.Module):
    def __init__(self, train: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(E, 4, 32, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(E, 4, batch_first=True, add_bias_kv=True)
        self.train(train)

    def forward(self, x, y):
        x = self.layer(x)
        return x + self.cross(x, y, y)[0]


@pytest.mark.parametrize("train", [False, True])
def test_leaf_modules_of_symbolic_trace(train: bool):
    model, x, y = Block(train), torch.randn(2, S, E), torch.randn(2, 5, E)
    traced = fx.symbolic_trace(model)
    assert {n.op for n in traced.graph.nodes} >= {"call_module"}
    new, report = flashfuse.rewrite(traced, (x, y), options={"verify": "full"})
    assert len(programs(report)) == 2
    gradients = []
    for run in (new, model):
        model.zero_grad()
        out = run(x, y)
        out.sum().backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    exact = model.double()
    exact.zero_grad()
    out = exact(x.double(), y.double())
    out.sum().backward()
    for ours, original, best in zip(
        *gradients, [out.detach(), *(p.grad for p in exact.parameters())], strict=True
    ):
        assert compare("gradient", ours, original, best).ok


def test_a_module_read_as_a_whole_stays():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)

    traced = fx.symbolic_trace(Both())
    new, report = flashfuse.rewrite(traced, (torch.randn(2, S, E),))
    assert new is not None and report.num_fused == 0
    assert [r.code for site in report.sites for r in site.reasons] == ["whole_module"]
    assert any(n.op == "call_module" for n in new.graph.nodes)


def test_definitions_take_what_the_calls_take():
    """The arguments of ``torch._transformer_encoder_layer_fwd``, by its schema."""
    names = [a.name for a in torch.ops.aten._transformer_encoder_layer_fwd.default._schema.arguments]
    assert list(inspect.signature(encoder_layer).parameters) == names
    assert set(_MEANING) == {F.multi_head_attention_forward, torch._transformer_encoder_layer_fwd}
