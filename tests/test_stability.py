"""What the sweep calls unstable: a model that hangs on a rounding; never a wrong rewrite in such a model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from flashfuse import pipeline
from flashfuse.options import Options
from flashfuse.passes.rewrite import Emitter

pytestmark = pytest.mark.usefixtures("one_thread")

_spec = importlib.util.spec_from_file_location(
    "stability", Path(__file__).parents[1] / "benchmarks" / "stability.py"
)
stability = sys.modules["stability"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stability)


def chaotic(q, k, v, levels):
    """Whole numbers that are rounded down: a rounding of one of them changes it by 1."""
    return torch.floor(levels)[:, None, None] * ((q @ k.mT * 0.25).softmax(-1) @ v)


def steady(q, k, v, levels):
    return levels[:, None, None] * ((q @ k.mT * 0.25).softmax(-1) @ v)


def captured(run):
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]
    inputs.append(torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True))
    found: list[tuple[fx.GraphModule, list[torch.Tensor]]] = []
    torch.compile(run, backend=lambda gm, given: found.append((gm, list(given))) or gm, dynamic=False)(
        *inputs
    )
    return found[0]


@pytest.fixture
def another_scale(monkeypatch):
    """Every emitted operator has another scale."""
    right = Emitter.site

    def wrong(self, *args):
        results = right(self, *args)
        call = next(
            n for n in reversed(self.graph.nodes) if n.target is torch.ops.flashfuse.attention.default
        )
        call.args = (*call.args[:7], call.args[7].replace("s*0.25", "s*0.3"), *call.args[8:])
        return results

    monkeypatch.setattr(Emitter, "site", wrong)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(stability, "DRAWS", 2)
    redraw = stability.redrawn

    def whole(inputs, seed):
        """The levels stay whole numbers in every draw."""
        return [
            x if isinstance(x, torch.Tensor) and x.dim() == 1 else y
            for x, y in zip(inputs, redraw(inputs, seed), strict=True)
        ]

    monkeypatch.setattr(stability, "redrawn", whole)


def rewritten(gm):
    new, report = pipeline.run(gm, Options(verify="off"))
    assert report.num_fused == 1
    return new


@pytest.mark.parametrize("run", [chaotic, steady])
def test_a_right_rewrite_is_neither(run):
    gm, inputs = captured(run)
    assert stability.differences(gm, rewritten(gm), inputs, True) == ([], [])


def test_a_rounding_elsewhere_is_unstable():
    gm, inputs = captured(chaotic)
    wrong, unstable = stability.differences(gm, stability.nudged(rewritten(gm), 77), inputs, True)
    assert wrong == []
    assert unstable and all("nudged" in text for text in unstable)


@pytest.mark.parametrize("run", [chaotic, steady])
def test_a_wrong_rewrite_is_wrong(run, another_scale):
    gm, inputs = captured(run)
    wrong, unstable = stability.differences(gm, rewritten(gm), inputs, True)
    assert wrong and unstable == []


def test_only_the_site_shows_it(another_scale):
    """The model alone would excuse the wrong rewrite, or the test above would prove nothing."""
    gm, inputs = captured(chaotic)
    draws = [stability.check_graph(gm, rewritten(gm), inputs, True).items]
    outside = {i: p for i, p in enumerate(stability.pooled(draws)) if not p.ok}
    assert outside and stability._excused(gm, inputs, True, outside)
    assert "alone" in stability.sites_outside(gm, inputs, True)


def test_numbers_that_the_model_draws_are_the_same_without_dropout():
    """The seed of a site is drawn from the same generator, and would move what is drawn after it."""

    def sampled(q, k, v, levels):
        weights = torch.nn.functional.dropout((q @ k.mT * 0.25).softmax(-1), 0.1)
        out = levels[:, None, None] * (weights @ v)
        return torch.where(torch.rand(out.shape) < 0.5, out, -out)

    gm, inputs = captured(sampled)
    items = stability.check_graph(gm, rewritten(gm), inputs, True).items
    assert items and all(item.ok for item in items)
