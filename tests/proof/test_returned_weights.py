"""Weights that a model returns: proved with the output, and a wrong one is caught."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_equal_under_rule
from torch.nn import functional as F

from flashfuse import pipeline
from flashfuse.options import Options
from flashfuse.passes.find import find_regions
from flashfuse.passes.plan import plan
from flashfuse.proof.prove import emitted, prove_replacement, prove_site

pytestmark = pytest.mark.usefixtures("one_thread")


def returned(q, k, v, pad):
    added = torch.where(pad[:, None, None], 0.0, torch.finfo(torch.float32).min)
    weights = (q @ k.transpose(-1, -2) * 0.3 + added).softmax(-1)
    dropped = F.dropout(weights, 0.2)
    return dropped @ v, weights, dropped


def qkv():
    return [torch.randn(2, 3, 9, 8) for _ in range(3)]


def site():
    inputs = (*qkv(), torch.rand(2, 9) < 0.7)
    gm = pipeline.with_example_values(torch.fx.symbolic_trace(returned), inputs)
    (found,) = plan(find_regions(gm.graph))
    return found


def calls(replacement):
    target = torch.ops.flashfuse.attention_weights.default
    return [n for n in replacement.graph.nodes if n.target is target]


def test_certificate_names_the_weights():
    certificate = prove_site(site())
    assert certificate.ok
    assert certificate.compared[:3] == ("out", "weights", "dropped weights")


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (5, "s*0.31 where pad[b, kv] else uniform"),
        (5, "s*0.3 else uniform"),
        (5, "s*0.3 where pad[b, kv] else mean"),
        (5, "s*0.3 where pad[b, kv] else zero"),
        (6, 0.5),
        (6, 0.0),
    ],
)
def test_wrong_weights_are_caught(position, value):
    fuse = site()
    name = fuse.region.program.captures[0]
    replacement = emitted(fuse)
    value = value.replace("pad", name) if isinstance(value, str) else value
    call = calls(replacement)[-1]
    if isinstance(value, str) and "where" not in value:
        call.args = (*call.args[:2], [], *call.args[3:])
    call.args = (*call.args[:position], value, *call.args[position + 1 :])
    assert not prove_replacement(fuse.region, replacement).ok


def test_exchanged_weights_are_caught():
    fuse = site()
    replacement = emitted(fuse)
    replacement.outputs[1:] = replacement.outputs[:0:-1]
    assert not prove_replacement(fuse.region, replacement).ok


def beside_a_sink(q, k, v, sinks):
    column = sinks.view(1, -1, 1, 1).expand(2, -1, 9, -1)
    weights = torch.cat([q @ k.transpose(-1, -2) * 0.3, column], -1).softmax(-1)[..., :-1]
    dropped = F.dropout(weights, 0.2)
    return dropped @ v, weights, dropped


def test_weights_beside_a_sink():
    inputs = (*qkv(), torch.randn(3))
    gm = pipeline.with_example_values(torch.fx.symbolic_trace(beside_a_sink), inputs)
    (fuse,) = plan(find_regions(gm.graph))
    certificate = prove_site(fuse)
    assert certificate.ok
    assert certificate.compared == ("out", "weights", "dropped weights", "dq", "dk", "dv", "dsinks")
    text, name = str(fuse.region.program), fuse.region.program.captures[0]
    for wrong in (text.partition(" sink")[0], text.replace(f"{name}[h]", "0.0"), text.replace("[h]", "[0]")):
        replacement = emitted(fuse)
        call = calls(replacement)[-1]
        captures = call.args[2] if name in wrong else []
        call.args = (*call.args[:2], captures, *call.args[3:5], wrong, *call.args[6:])
        assert not prove_replacement(fuse.region, replacement).ok


def test_dropped_weights_beside_a_sink_are_those_of_the_output():
    inputs = (*qkv(), torch.randn(3))
    gm = pipeline.with_example_values(torch.fx.symbolic_trace(beside_a_sink), inputs)
    new, report = pipeline.run(gm, Options(verify="full"))
    assert report.num_fused == 1
    out, weights, dropped = new(*inputs)
    assert_equal_under_rule(out, dropped @ inputs[2], dropped.double() @ inputs[2].double())
    kept = weights[dropped != 0]
    assert_equal_under_rule(dropped[dropped != 0], kept / 0.8, kept.double() / 0.8)


def test_products_that_share_dropped_weights_share_the_mask():
    def twice(q, k, v):
        weights = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5)
        return weights @ v, weights @ (2.0 * v), weights

    inputs = qkv()
    gm = pipeline.with_example_values(torch.fx.symbolic_trace(twice), inputs)
    new, report = pipeline.run(gm, Options())
    assert report.num_fused == 2
    one, two, weights = new(*inputs)
    assert torch.equal(two, 2.0 * one)
    assert_equal_under_rule(one, weights @ inputs[2], weights.double() @ inputs[2].double())
