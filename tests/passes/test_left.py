"""What the report says of sites that are left."""

import pytest
import torch

from flashfuse import pipeline
from flashfuse.options import Options
from flashfuse.passes import find


def reasons(f, *inputs, dynamic=False):
    found = []

    def look(gm, _):
        found.append(pipeline.run(gm, Options())[1])
        return gm.forward

    torch.compiler.reset()
    torch.compile(f, backend=look, fullgraph=True, dynamic=dynamic)(*inputs)
    return [r for report in found for site in report.sites for r in site.reasons]


def attention(q):
    return torch.softmax(q @ q.mT, -1) @ q


def test_sizes_without_a_closed_form():
    (reason,) = reasons(
        lambda x: attention(x[:, : x.shape[1] // 2]), torch.randn(2, 8, 3, 5, 8), dynamic=True
    )
    assert reason.code == "symbolic_size" and "//2" in reason.message


def test_a_fault_of_ours_says_so(monkeypatch):
    def broken(*_):
        raise KeyError("nothing")

    monkeypatch.setattr(find, "follow", broken)
    (reason,) = reasons(attention, torch.randn(2, 3, 5, 8))
    assert reason.code == "internal"
    assert "KeyError: 'nothing' (test_left.py:" in reason.message and "report" in reason.hint


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (lambda weights, pad: weights > 0.01, "depends on the weights themselves"),
        (lambda weights, pad: pad, "the scores have no mask"),
    ],
)
def test_weights_that_are_removed(keep, said):
    def pruned(q, pad):
        weights = torch.softmax(q @ q.mT, -1)
        return torch.where(keep(weights, pad), weights, 0.0) @ q

    (reason,) = reasons(pruned, torch.randn(2, 3, 5, 8), torch.ones(5, dtype=torch.bool))
    assert reason.code == "weights_path" and said in reason.message


def test_weights_of_two_products():
    def attend(q, k):
        scores = torch.cat([q @ k.mT, q @ q.mT], -1)
        weights = torch.softmax(scores, -1)
        return weights[..., :5] @ k + weights[..., 5:] @ q

    found = reasons(attend, torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8))
    assert {r.code for r in found} == {"weights_path"}
    assert all("one softmax runs over several products" in r.message and r.hint for r in found)


def test_weights_that_are_chosen_from():
    def assigned(q):
        weights = torch.softmax(q @ q.mT, -1)
        best = weights.max(-1, keepdim=True)[1]
        hard = torch.zeros_like(weights).scatter_(-1, best, 1.0)
        return (hard - weights.detach() + weights) @ q

    (reason,) = reasons(assigned, torch.randn(2, 3, 5, 8))
    assert reason.code == "weights_path" and "chooses among the weights" in reason.message
