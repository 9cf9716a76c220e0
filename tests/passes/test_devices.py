"""Tensors of the CPU beside those of a GPU, which PyTorch allows for indices and single numbers.

Without a GPU, on fake tensors, which subscripts do not take; hence ``aten.index``.
"""

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from flashfuse import pipeline
from flashfuse.options import Options

QKV = [(2, 3, 16, 8)] * 3


def gathered(q, k, v, table, index):
    """As in BEiT, whose index is a buffer that is made on the CPU."""
    bias = torch.ops.aten.index.Tensor(table, [index.view(-1)]).view(16, 16, 3).permute(2, 0, 1)
    return torch.softmax(q @ k.mT * 0.125 + bias, -1) @ v


def divided(q, k, v, temperature):
    return torch.softmax(q @ k.mT / temperature, -1) @ v


def shifted(q, k, v, slope):
    i = torch.arange(16, device=q.device)
    return torch.softmax(q @ k.mT - (i.unsqueeze(1) - i).abs() * slope, -1) @ v


def capped(q, k, v, cap):
    return torch.softmax(torch.tanh(q @ k.mT / cap) * cap, -1) @ v


def bucketed(q, k, v, table):
    """As in MPNet, up to transformers 5.17."""
    i = torch.arange(64)
    d = (i.unsqueeze(0) - i.unsqueeze(1)).abs()
    far = 8 + (torch.log(d.float() / 8) * 3).long()
    buckets = torch.where(d < 8, d, far.clamp(max=15)).to(q.device)
    return torch.softmax(q @ k.mT + F.embedding(buckets, table).permute(2, 0, 1), -1) @ v


def biased(q, k, v, bias):
    return torch.softmax(q @ k.mT + bias.to(q.device), -1) @ v


class Devices(fx.Interpreter):
    """Where the inputs of our operator are."""

    def call_function(self, target, args, kwargs):
        if target is torch.ops.flashfuse.attention.default:
            self.devices = {t.device.type for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        return super().call_function(target, args, kwargs)


CASES = [
    (gathered, [(9, 3)], torch.zeros(16, 16, dtype=torch.int64)),
    (divided, [], torch.ones(())),
    (shifted, [], torch.ones(())),
    (capped, [], torch.ones(())),
]


@pytest.mark.parametrize("f,there,here", CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_what_the_cpu_holds_is_moved(f, there, here):
    with FakeTensorMode() as mode:
        q, k, v = (torch.empty(s, device="cuda") for s in QKV)
        others = [torch.empty(s, device="cuda") for s in there]
        gm = make_fx(f)(q, k, v, *others, mode.from_tensor(here))
    new, report = pipeline.run(gm, Options())
    assert (report.num_fused, report.num_proved) == (1, 1), str(report)
    with mode:
        seen = Devices(new)
        seen.run(q, k, v, *others, mode.from_tensor(here))
    assert seen.devices == {"cuda"}


def captured(f, shape, device):
    """The program and what it captures."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 3, 64, 8, device="cuda") for _ in range(3))
        gm = make_fx(f)(q, k, v, torch.empty(shape, device=device))
    new, report = pipeline.run(gm, Options())
    assert (report.num_fused, report.num_proved) == (1, 1), str(report)
    (call,) = (n for n in new.graph.nodes if n.target is torch.ops.flashfuse.attention.default)
    return call.args[7], call.args[3], new


def test_a_table_is_made_where_the_user_makes_it():
    """Rounding may differ elsewhere; what is copied are distances, not pairs."""
    program, (_, buckets), new = captured(bucketed, (16, 3), "cuda")
    assert "kv + 63 - q" in program
    assert buckets.target == "to" and buckets.args[1].type == "cuda"
    made = [n for n in new.graph.nodes if n.target in (torch.ops.aten.log.default, torch.log)]
    assert made and all(n.meta["val"].device.type == "cpu" and n.meta["val"].shape == (127,) for n in made)


def test_what_the_user_copies_is_not_copied_again():
    _, (bias,), _ = captured(biased, (64, 64), "cpu")
    assert bias.target is torch.ops.aten._to_copy.default and bias.meta["val"].device.type == "cuda"
