"""Masks that the caller of a checkpointed layer makes, and what stays where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

import flashfuse
from flashfuse import pipeline
from flashfuse.numbers import compare
from flashfuse.options import Options

pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]
LAYERS = 2


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def causal(keep: Tensor) -> Tensor:
    """Float mask [B, 1, S, S] of a padding mask [B, S]."""
    position = torch.arange(keep.shape[1])
    allowed = (position <= position[:, None]) & keep[:, None, None, :]
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return (x @ x.mT * 0.5 + mask).softmax(-1) @ x


def layers(x: Tensor, mask: Tensor, body: Any = attend) -> Tensor:
    for _ in range(LAYERS):
        x = checkpoint(body, x, mask, use_reentrant=False)
    return x


def rewritten(
    run: Any, *args: Tensor, dynamic: bool | None = None
) -> tuple[flashfuse.Report, fx.GraphModule]:
    """The report and the graph; the compiled function's output and gradient are those of ``run``."""
    made: list[tuple[fx.GraphModule, flashfuse.Report]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(pipeline.run(gm, Options()))
        return made[-1][0]

    x = args[0]
    results = []
    for f, dtype in (
        (torch.compile(run, backend=backend, dynamic=dynamic), x.dtype),
        (run, x.dtype),
        (run, torch.float64),
    ):
        at = x.detach().to(dtype).requires_grad_()
        out = f(at, *(a.clone() for a in args[1:]))
        results.append((out, *torch.autograd.grad(out.square().sum(), at)))
    for name, ours, original, exact in zip(("out", "dx"), *results, strict=True):
        item = compare(name, ours, original, exact)
        assert item.ok, item
    ((gm, report),) = made
    assert report.num_fused == report.num_sites == LAYERS
    return report, gm


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 11, 8), torch.arange(11) < torch.tensor([11, 7])[:, None]


def masks_handed_over(gm: fx.GraphModule) -> int:
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    assert len(calls) == LAYERS
    sizes = [getattr(n.meta["example_value"], "shape", ()) for call in calls for n in call.args[1:]]
    return sum(len(s) > 1 and bool(s[-1] == s[-2]) for s in sizes)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_each_layer_makes_the_mask_of_its_program(dynamic):
    report, gm = rewritten(lambda x, keep: layers(x, causal(keep)), *inputs(), dynamic=dynamic)
    assert {site.mask for site in report.sites} == {"kv <= q and keep[b, kv]"}
    assert masks_handed_over(gm) == 0
    assert not [n for n in gm.graph.nodes if n.target in (torch.where, "where")], "nobody reads the mask"


def test_what_the_caller_uses_too_stays_there():
    def run(x: Tensor, keep: Tensor) -> Tensor:
        mask = causal(keep)
        return layers(x, mask) + mask.mean(-1, keepdim=True)

    report, gm = rewritten(run, *inputs())
    assert {site.mask for site in report.sites} == {"kv <= q and keep[b, kv]"}
    assert masks_handed_over(gm) == 0
    assert [n for n in gm.graph.nodes if n.target in (torch.where, "where")]


def written_in_between(x: Tensor, keep: Tensor) -> Tensor:
    mask = causal(keep)
    keep.logical_not_()
    return layers(x, mask)


def written_to(x: Tensor, keep: Tensor) -> Tensor:
    mask = causal(keep)
    mask[..., 0] = 0.0
    return layers(x, mask)


def with_gradient(x: Tensor, keep: Tensor) -> Tensor:
    return layers(x, causal(keep) + x.mean((1, 3))[:, None, None])


def read_elsewhere(x: Tensor, keep: Tensor) -> Tensor:
    def body(x: Tensor, mask: Tensor) -> Tensor:
        return attend(x, mask) + mask.mean(-1, keepdim=True)

    return layers(x, causal(keep), body)


@pytest.mark.parametrize("run", [written_in_between, written_to, with_gradient], ids=lambda run: run.__name__)
def test_what_could_be_another_tensor_inside_is_handed_over(run):
    """Each is left as it was where its makers are written to, or need a gradient."""
    report, gm = rewritten(run, *inputs())
    assert masks_handed_over(gm) == LAYERS
    assert all("kv <= q" not in site.mask for site in report.sites)


def test_what_the_body_reads_besides_is_made_there():
    report, gm = rewritten(read_elsewhere, *inputs())
    assert {site.mask for site in report.sites} == {"kv <= q and keep[b, kv]"}
    assert masks_handed_over(gm) == 0
