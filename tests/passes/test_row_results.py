"""logsumexp and the maximum of a site's scores: taken from the operator and proved with it, or left."""

import dataclasses
import math

import pytest
import torch
from tolerance import assert_equal_under_rule

from flashfuse import numbers, pipeline
from flashfuse.options import Options
from flashfuse.passes import dialect
from flashfuse.passes.find import find_regions
from flashfuse.passes.plan import plan
from flashfuse.proof.prove import emitted, prove_replacement
from flashfuse.proof.tiled import Tiled

pytestmark = pytest.mark.usefixtures("one_thread")

LOWEST = torch.finfo(torch.float32).min


def scores(q, k):
    return q @ k.transpose(-1, -2) * 0.3


def causal(s):
    return torch.where(torch.ones(9, 9, dtype=torch.bool).tril(-1), s, -math.inf)


def lse_beside(q, k, v, pad):
    s = scores(q, k)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def both_beside(q, k, v, pad):
    s = scores(q, k)
    out = s.softmax(-1) @ v
    return out, torch.logsumexp(s, (-1,), keepdim=True), s.amax(-1).detach(), s.detach().max(-1, True)[0]


def of_rows_without_a_key(q, k, v, pad):
    s = causal(scores(q, k))
    weights = torch.where((s == -math.inf).all(-1, keepdim=True), 0.0, s.softmax(-1))
    return weights @ v, s.logsumexp(-1), s.detach().amax(-1)


def without_a_gradient(q, k, v, pad):
    s = scores(q, k).masked_fill(~pad[:, None, None], -math.inf)
    out = s.softmax(-1) @ v
    return out, s.detach().logsumexp(-1), s.logsumexp(-1).detach()


def of_wider_scores(q, k, v, pad):
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    s = scores(q, k)
    return s.softmax(-1, dtype=torch.float32).bfloat16() @ v, s.float().logsumexp(-1)


def transposed(q, k, v, pad):
    s = scores(q, k).transpose(1, 2)
    return (s.softmax(-1).transpose(1, 2) @ v), s.logsumexp(-1)


def of_the_shift(q, k, v, pad):
    """The maximum that is taken off before, too."""
    s = scores(q, k)
    top = s.amax(-1, keepdim=True).detach()
    return (s - top).softmax(-1) @ v, top * 2


def used_before_and_after(q, k, v, pad):
    s = scores(q, k)
    return s.softmax(-1) @ v, s.logsumexp(-1).exp(), s.logsumexp(-1)


def beside_a_sink(q, k, v, pad):
    s = torch.cat([scores(q, k), q[..., :1]], -1)
    return s.softmax(-1)[..., :-1] @ v, s.logsumexp(-1), s.detach().amax(-1)


def dropped(q, k, v, pad):
    s = scores(q, k)
    return torch.dropout(s.softmax(-1), 0.2, True) @ v, s.logsumexp(-1)


def of_a_shared_softmax(q, k, v, pad):
    s = scores(q, k)
    weights = s.softmax(-1)
    return weights @ v, weights @ (v * 2), s.logsumexp(-1), s.detach().amax(-1)


FOUND = {
    lse_beside: ["lse"],
    both_beside: ["lse", "max", "max"],
    of_rows_without_a_key: ["lse", "max"],
    without_a_gradient: ["lse", "lse"],
    of_wider_scores: ["lse"],
    transposed: ["lse"],
    of_the_shift: ["max"],
    used_before_and_after: ["lse"],
    beside_a_sink: ["lse", "max"],
    dropped: ["lse"],
    of_a_shared_softmax: ["lse", "max"],
}


def with_a_gradient(q, k, v, pad):
    s = scores(q, k)
    return s.softmax(-1) @ v, s.amax(-1)


def over_the_queries(q, k, v, pad):
    s = scores(q, k)
    return s.softmax(-1) @ v, s.logsumexp(-2)


def over_everything(q, k, v, pad):
    s = scores(q, k)
    return s.softmax(-1) @ v, s.detach().amax(), s.detach().amax((-2, -1))


def before_the_mask(q, k, v, pad):
    s = scores(q, k)
    return causal(s).softmax(-1) @ v, s.logsumexp(-1)


def of_other_scores(q, k, v, pad):
    return scores(q, k).softmax(-1) @ v, (scores(q, k) * 2).logsumexp(-1)


def without_the_sink(q, k, v, pad):
    s = scores(q, k)
    return torch.cat([s, q[..., :1]], -1).softmax(-1)[..., :-1] @ v, s.logsumexp(-1)


def of_shifted_scores(q, k, v, pad):
    s = scores(q, k)
    s = s - s.amax(-1, keepdim=True)
    return causal(s).softmax(-1) @ v, causal(s).logsumexp(-1)


def of_finite_minima(q, k, v, pad):
    s = scores(q, k) + torch.where(pad[:, None, None], 0.0, LOWEST)
    return s.softmax(-1) @ v, s.logsumexp(-1), s.detach().amax(-1)


def with_the_places(q, k, v, pad):
    s = scores(q, k)
    top, at = s.detach().max(-1)
    return s.softmax(-1) @ v, top, at * 2


def needed_for_the_values(q, k, v, pad):
    s = scores(q, k)
    total = s.logsumexp(-1)
    return s.softmax(-1) @ (v * total.mean()), total


def in_narrower_scores(q, k, v, pad):
    s = scores(q, k)
    return s.softmax(-1) @ v, s.bfloat16().logsumexp(-1)


LEFT = {
    with_a_gradient: "amax",
    over_the_queries: "logsumexp",
    over_everything: "amax",
    before_the_mask: "logsumexp",
    of_other_scores: "logsumexp",
    without_the_sink: "logsumexp",
    of_shifted_scores: "logsumexp",
    of_finite_minima: "logsumexp",
    with_the_places: "max",
    needed_for_the_values: "logsumexp",
    in_narrower_scores: "logsumexp",
}
"""By twin: the reduction that stays the user's own."""


def example():
    torch.manual_seed(0)
    pad = torch.arange(9)[None] < torch.tensor([9, 5])[:, None]
    return [*(torch.randn(2, 3, 9, 8) for _ in range(3)), pad]


def traced(run, inputs, capture="symbolic"):
    if capture == "symbolic":
        return pipeline.with_example_values(torch.fx.symbolic_trace(run), inputs)
    found = []

    def backend(gm, _):
        found.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(run, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def names(gm):
    return [op.name for op in map(dialect.read, gm.graph.nodes) if op is not None]


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
@pytest.mark.parametrize("run", FOUND, ids=lambda run: run.__name__)
def test_taken_from_the_operator(run, capture):
    inputs = example()
    gm = traced(run, inputs, capture)
    found = [r.kind for site in find_regions(gm.graph) for r in site.row_results]
    assert found[: len(FOUND[run])] == FOUND[run]
    new, report = pipeline.run(gm, Options(verify="full"))
    assert report.num_fused == len(report.sites) and report.ok, report
    assert set(FOUND[run]) <= set(report.sites[0].check.proof.compared)
    assert not {"logsumexp", "amax", "max", "softmax", "matmul"} & set(names(new))
    targets = [n.target for n in new.graph.nodes]
    assert targets.count(torch.ops.flashfuse.attention_and_max.default) == ("max" in FOUND[run])
    if run is not dropped:
        named = dict(zip("qkvp", inputs, strict=True))
        given = [named[n.name.removeprefix("l_")[0]] for n in gm.graph.nodes if n.op == "placeholder"]
        check = numbers.check_graph(gm, new, given, True)
        assert check.ok, [item for item in check.items if not item.ok]


@pytest.mark.parametrize("run", LEFT, ids=lambda run: run.__name__)
def test_what_is_something_else_stays(run):
    inputs = example()
    gm = traced(run, inputs)
    new, report = pipeline.run(gm, Options())
    assert report.num_fused == 1
    assert LEFT[run] in names(new)
    assert numbers.check_graph(gm, new, inputs, True).ok


def fused(run):
    (found,) = plan(find_regions(traced(run, example()).graph))
    return found


def wrong_program(call):
    call.args = (*call.args[:3], [], *call.args[4:7], "s*0.3 where kv <= q else zero", *call.args[8:])


def wrong_scale(call):
    call.args = (*call.args[:7], call.args[7].replace("0.3", "0.31"), *call.args[8:])


@pytest.mark.parametrize("change", [wrong_program, wrong_scale])
@pytest.mark.parametrize("output", [1, 2])
def test_wrong_results_are_caught(change, output):
    """Where they come from another program than the output does."""
    fuse = fused(of_rows_without_a_key)
    replacement = emitted(fuse)
    graph = replacement.graph
    (call,) = (n for n in graph.nodes if n.target is torch.ops.flashfuse.attention_and_max.default)
    with graph.inserting_after(call):
        other = graph.node_copy(call, lambda n: n)
    change(other)
    (part,) = (n for n in call.users if n.args[1] == output)
    part.args = (other, output)
    certificate = prove_replacement(fuse.region, replacement)
    assert not certificate.ok and certificate.difference.startswith(("lse", "max")[output - 1])


def test_exchanged_results_are_caught():
    fuse = fused(of_rows_without_a_key)
    replacement = emitted(fuse)
    replacement.outputs[1:] = replacement.outputs[:0:-1]
    assert not prove_replacement(fuse.region, replacement).ok


def test_a_gradient_too_much_is_caught():
    fuse = fused(without_a_gradient)
    replacement = emitted(fuse)
    for node in replacement.graph.nodes:
        if node.target == "detach":
            node.replace_all_uses_with(node.args[0])
            replacement.outputs[:] = [node.args[0] if n is node else n for n in replacement.outputs]
    assert not prove_replacement(fuse.region, replacement).ok


def test_what_is_not_proved_does_not_cost_the_site():
    """-inf that is added has a gradient of NaN through logsumexp where it is all that a row has."""

    def added(q, k, v, pad):
        s = scores(q, k) + torch.where(pad[:, None, None], 0.0, -math.inf)
        return torch.ops.aten._safe_softmax(s, -1) @ v, s.logsumexp(-1)

    new, report = pipeline.run(traced(added, example()), Options())
    (site,) = report.sites
    assert site.status == "fused" and "logsumexp" in names(new)
    assert any("`logsumexp` of the scores stays as it is" in note for note in site.notes)


def test_a_training_step_that_uses_all():
    q, k, v, pad = example()

    def loss(run, dtype):
        own = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse, top = run(*own, pad)
        alive = lse[lse != -math.inf]
        value = (out.square().sum() + alive.square().sum() * 0.1) / (1 + top[top != -math.inf].amax())
        return torch.autograd.grad(value, own)

    compiled = torch.compile(of_rows_without_a_key, backend="flashfuse", options={"inner": "eager"})
    runs = [loss(compiled, torch.float32)]
    runs += [loss(of_rows_without_a_key, d) for d in (torch.float32, torch.float64)]
    for found in zip(*runs, strict=True):
        assert_equal_under_rule(*found)


class NoGradientOfLse(Tiled):
    def backward(self, do, out, m, l, dlse=None):
        return super().backward(do, out, m, l)


class OtherSign(Tiled):
    def backward(self, do, out, m, l, dlse=None):
        return super().backward(do, out, m, l, None if dlse is None else -dlse)


class WithoutTheMaximum(Tiled):
    def log_sum_exp(self, m, l):
        return super().log_sum_exp(m * 0, l)


class OfOtherKeys(Tiled):
    def largest_of_rows(self, rows):
        return Tiled.largest_of_rows(dataclasses.replace(self, k=self.k * 2), rows)


class BeforeTheMask(Tiled):
    def largest(self):
        program = dataclasses.replace(self.program, mask=None)
        return Tiled.largest(dataclasses.replace(self, program=program, captures=()))


class DeadRowsOfZero(Tiled):
    def log_sum_exp(self, m, l):
        lse = super().log_sum_exp(m, l)
        lse.level = lse.level * 0
        return lse


MODELS = (Tiled, NoGradientOfLse, OtherSign, WithoutTheMaximum, OfOtherKeys, BeforeTheMask, DeadRowsOfZero)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_wrong_kernels_are_caught(model):
    fuse = fused(of_rows_without_a_key)
    certificate = prove_replacement(fuse.region, emitted(fuse), model=model)
    assert certificate.ok == (model is Tiled)
