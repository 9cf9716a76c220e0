"""PyTorch's own operations and gradients on field elements: laws that must hold, and others that must not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashfuse.proof.certificate import NotProvable
from flashfuse.proof.tensor import SOFTMAX, FieldTensor
from flashfuse.proof.value import Draw, Value

pytestmark = pytest.mark.usefixtures("one_thread")

MIN = torch.finfo(torch.float32).min
MASK = torch.ones(5, 5, dtype=torch.bool).tril(-1)
"""Its first row has no key."""


def run(f: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> list[Value]:
    """The output and the gradients of ``f(q, k, v)`` for fixed random inputs."""
    draw = Draw.seeded(0)
    inputs = [FieldTensor.of(draw.random((2, 3, 5, 4)), dtype, {n: (23, 8)}) for n in "qkv"]
    do = draw.random((2, 3, 5, 4))
    for t in inputs:
        t.requires_grad_()
    out = f(*inputs)
    grads = torch.autograd.grad(out, inputs, FieldTensor.of(do, out.dtype, {}), allow_unused=True)
    return [out.value, *(g.value for g in grads if g is not None)]


def equal(a: Value, b: Value) -> bool:
    nan = [torch.zeros(()) if x.level is None else x.level.isnan().float() for x in (a, b)]
    return bool(((a.p == b.p) | (nan[0].bool() & nan[1].bool())).all()) and bool((nan[0] == nan[1]).all())


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.5


EQUAL = {
    "in place on a view": (
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, MIN)) @ v,
        lambda q, k, v: softmax(added_in_place(scores(q, k))) @ v,
    ),
    "the maximum cancels": (
        lambda q, k, v: softmax(scores(q, k)) @ v,
        lambda q, k, v: by_hand(scores(q, k)) @ v,
    ),
    "exp of log_softmax": (
        lambda q, k, v: softmax(scores(q, k)) @ v,
        lambda q, k, v: scores(q, k).log_softmax(-1).exp() @ v,
    ),
    "exp of a difference to logsumexp": (
        lambda q, k, v: softmax(scores(q, k)) @ v,
        lambda q, k, v: (scores(q, k) - scores(q, k).logsumexp(-1, keepdim=True)).exp() @ v,
    ),
    "exp of a difference to logsumexp, masked": (
        lambda q, k, v: softmax(scores(q, k).masked_fill(~MASK, -math.inf)) @ v,
        lambda q, k, v: through_log(scores(q, k).masked_fill(~MASK, -math.inf)) @ v,
    ),
    "einsum and bmm": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", softmax(scores(q, k)), v),
        lambda q, k, v: torch.bmm(softmax(scores(q, k)).flatten(0, 1), v.flatten(0, 1)).view(2, 3, 5, 4),
    ),
    "one finite mask and another": (
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, MIN)) @ v,
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, -1e9)) @ v,
    ),
    "rows without a key, taken out": (
        lambda q, k, v: torch.where(MASK.any(-1, True), softmax(scores(q, k).masked_fill(~MASK, MIN)) @ v, 0),
        lambda q, k, v: safe(scores(q, k).masked_fill(~MASK, -math.inf)) @ v,
    ),
    "softcap in two ways": (
        lambda q, k, v: softmax(torch.tanh(scores(q, k) / 30) * 30) @ v,
        lambda q, k, v: softmax(30 * torch.tanh(q @ k.mT / 60)) @ v,
    ),
    "a product with a transposed score": (
        lambda q, k, v: softmax(scores(q, k)) @ v,
        lambda q, k, v: (k @ q.mT / 2).softmax(-2).mT @ v,
    ),
    "concatenated and sliced": (
        lambda q, k, v: softmax(scores(q, k)) @ v,
        lambda q, k, v: softmax(torch.cat([scores(q, k[:, :, :2]), scores(q, k[:, :, 2:])], -1)) @ v,
    ),
    "clamps": (
        lambda q, k, v: softmax(scores(q, k).clamp(-1, 1)) @ v,
        lambda q, k, v: softmax(torch.minimum(torch.maximum(scores(q, k), c(-1)), c(1))) @ v,
    ),
}
DIFFERENT = {
    "another scale": (
        lambda q, k, v: softmax(scores(q, k)) @ v,
        lambda q, k, v: softmax(scores(q, k) * 1.001) @ v,
    ),
    "k permuted": (
        lambda q, k, v: softmax(scores(q, q)) @ v,
        lambda q, k, v: softmax(scores(q, q.transpose(-1, -2).reshape(q.shape))) @ v,
    ),
    "filled and added masks differ in the gradient": (
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, MIN)) @ v,
        lambda q, k, v: softmax(scores(q, k).masked_fill(~MASK, MIN)) @ v,
    ),
    "−10⁹ is no mask in float64": (
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, MIN).double()) @ v.double(),
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, -1e9).double()) @ v.double(),
    ),
    "−10⁴ is no mask": (
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, MIN)) @ v,
        lambda q, k, v: softmax(scores(q, k) + torch.where(MASK, 0.0, -1e4)) @ v,
    ),
    "the gradient through the sum": (
        lambda q, k, v: softmax(scores(q, k)) @ v,
        lambda q, k, v: scores(q, k).exp() / scores(q, k).exp().sum(-1, True).detach() @ v,
    ),
    "a mask with the diagonal": (
        lambda q, k, v: safe(scores(q, k).masked_fill(~MASK, -math.inf)) @ v,
        lambda q, k, v: safe(scores(q, k).masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf)) @ v,
    ),
}


def softmax(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


def safe(x: Tensor) -> Tensor:
    return torch.ops.aten._safe_softmax(x, -1)


def c(x: float) -> Tensor:
    return torch.tensor(float(x))


def by_hand(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def through_log(x: Tensor) -> Tensor:
    return (x - x.logsumexp(-1, keepdim=True)).exp()


def added_in_place(x: Tensor) -> Tensor:
    x.view(6, 5, 5).add_(torch.where(MASK, 0.0, MIN))
    return x


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name):
    a, b = (run(f) for f in EQUAL[name])
    assert all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", DIFFERENT)
def test_different(name):
    a, b = (run(f) for f in DIFFERENT[name])
    assert not all(equal(x, y) for x, y in zip(a, b, strict=True))


def test_minus_infinity_everywhere_is_not_a_number():
    out = run(lambda q, k, v: softmax(scores(q, k).masked_fill(~MASK, -math.inf)) @ v)[0]
    assert (
        out.level is not None and out.level.isnan()[:, :, 0].all() and not out.level.isnan()[:, :, 1:].any()
    )


def test_the_minimum_of_float32_is_minus_infinity_in_bfloat16():
    def f(q, k, v):
        return softmax((scores(q, k) + torch.where(MASK, 0.0, MIN)).bfloat16().float()) @ v

    out = run(f)[0]
    assert out.level is not None and out.level.isnan()[:, :, 0].all()


@pytest.mark.parametrize(
    "f",
    [
        lambda q, k, v: softmax(torch.tanh(scores(q, k).masked_fill(~MASK, -math.inf))) @ v,
        lambda q, k, v: softmax(scores(q, k) // 1) @ v,
        lambda q, k, v: softmax(torch.fft.fft(scores(q, k)).real) @ v,
        lambda q, k, v: softmax(scores(q, k).long().float()) @ v,
    ],
)
def test_what_has_no_meaning_is_refused(f):
    with pytest.raises(NotProvable, match=r"."):
        run(f)


def test_precision_is_that_of_the_narrowest_cast_before_the_product():
    draw = Draw.seeded(0)
    q, k = (FieldTensor.of(draw.random((2, 5, 4)), torch.float32, {n: (23, 8)}) for n in "qk")
    softmax(q.bfloat16().float() @ k.mT).bfloat16()
    assert draw.precision == {"q": (7, 8), "k": (23, 8), SOFTMAX: (23, 8)}
