"""Calls of ``flashfuse.attention`` that go past Dynamo, and all that must not."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flashfuse
from flashfuse import functional, recall
from flashfuse.functional import formula
from flashfuse.kernels import kept_maps

pytestmark = pytest.mark.usefixtures("one_thread")


def causal(b, h, q, kv):
    return kv <= q


def qkv(length=40, dtype=torch.float32, requires_grad=False):
    return [torch.randn(2, 2, length, 16, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


@pytest.fixture
def asked(monkeypatch):
    """How often Dynamo was asked, which knows of nothing at first."""
    count = [0]
    torch._dynamo.reset()
    monkeypatch.setattr(functional, "_runs", {})
    compiled = functional._compiled

    def counting(*args):
        count[0] += 1
        return compiled(*args)

    monkeypatch.setattr(functional, "_compiled", counting)
    monkeypatch.setattr(recall, "_graphs", {})
    return count


def assert_equal(inputs, score=None, mask=None, scale=None):
    found = flashfuse.attention(*inputs, score, mask, scale=scale)
    torch.testing.assert_close(found, formula(*inputs, score, mask, scale, 0.0))
    return found


FUNCTIONS = {
    "none": (None, None),
    "causal": (None, causal),
    "methods": (lambda s, b, h, q, kv: (s / 5).tanh() * 5, lambda b, h, q, kv: (q - kv).abs() < 20),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dynamo_is_asked_once(asked, name, requires_grad):
    for _ in range(3):
        inputs = qkv(requires_grad=requires_grad)
        found = assert_equal(inputs, *FUNCTIONS[name])
        if requires_grad:
            expected = torch.autograd.grad(formula(*inputs, *FUNCTIONS[name], None, 0.0).sum(), inputs)
            torch.testing.assert_close(torch.autograd.grad(found.sum(), inputs), expected)
    assert asked == [1]


def strided(inputs):
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]


CHANGES = {
    "length": lambda inputs: [t[:, :, :30].clone() for t in inputs],
    "strides": strided,
    "dtype": lambda inputs: [t.double() for t in inputs],
    "one tensor twice": lambda inputs: [inputs[0], inputs[0], inputs[2]],
    "gradients": lambda inputs: [t.requires_grad_() for t in inputs],
    "a parameter": lambda inputs: [torch.nn.Parameter(inputs[0]), *inputs[1:]],
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_tensors_are_other_calls(asked, name):
    assert_equal(qkv(), None, causal)
    assert_equal(CHANGES[name](qkv()), None, causal)
    assert asked == [2]
    assert_equal(qkv(), None, causal)
    assert asked == [2]


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "state",
    [torch.no_grad, torch.inference_mode, default_dtype, deterministic],
    ids=lambda s: s.__name__,
)
def test_another_state_is_another_call(asked, state):
    assert_equal(qkv(), None, causal)
    with state():
        assert_equal(qkv(), None, causal)
    assert asked == [2]
    inputs = qkv(requires_grad=True)
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(assert_equal(inputs, None, causal).sum(), inputs)
    )


@pytest.mark.parametrize("state", [Seen, BaseTorchFunctionMode, FakeTensorMode])
def test_under_a_mode_nothing_is_known(state):
    with state():
        assert recall.key(qkv(), (None, causal), (None, 0.0)) is None
    assert recall.key(qkv(), (None, causal), (None, 0.0)) is not None


def test_autocast_is_followed(asked):
    inputs = qkv()
    assert assert_equal(inputs, None, causal).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert flashfuse.attention(*inputs, mask_mod=causal).dtype == torch.bfloat16
    assert assert_equal(inputs, None, causal).dtype == torch.float32


def test_other_scales_are_other_calls(asked):
    for scale in (None, 0.5, 2, 0.5):
        assert_equal(qkv(), None, causal, scale)
    assert asked == [3]


WINDOW = 7
BIAS = torch.randn(2)


def test_what_is_around_a_function_may_change(asked, monkeypatch):
    inputs, number, captured = qkv(), 5, torch.randn(2)

    def near(b, h, q, kv):
        return (q - kv).abs() < number

    def biased(s, b, h, q, kv):
        return s + captured[h]

    def near_global(b, h, q, kv):
        return (q - kv).abs() < WINDOW

    def near_default(most):
        return lambda b, h, q, kv, most=most: (q - kv).abs() < most

    def biased_global(s, b, h, q, kv):
        return s + BIAS[h]

    def check():
        assert_equal(inputs, biased, near)
        assert_equal(inputs, biased_global, near_global)
        assert_equal(inputs, None, near_default(number))

    for _ in range(2):
        check()
    number = 9
    captured.mul_(3)
    BIAS.mul_(3)
    monkeypatch.setitem(globals(), "WINDOW", 3)
    check()
    monkeypatch.setitem(globals(), "BIAS", torch.zeros(2))
    captured = torch.zeros(2)
    check()
    assert not recall._graphs


def test_inner_functions_are_not_looked_into(asked):
    def mask(b, h, q, kv):
        return (lambda x: x <= WINDOW)(q - kv)

    assert_equal(qkv(), None, mask)
    assert not recall._graphs


def test_dropout_is_drawn_anew(asked):
    inputs, runs = qkv(), []
    flashfuse.attention(*inputs, dropout_p=0.4)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs += [flashfuse.attention(*inputs, dropout_p=0.4) for _ in range(2)]
    assert asked == [1]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[4])


def test_mistakes_are_still_said(asked):
    q, k, v = qkv()
    assert_equal((q, k, v), None, causal)
    with pytest.raises(ValueError, match="one dtype and device"):
        flashfuse.attention(q, k.double(), v, mask_mod=causal)
    with pytest.raises(ValueError, match="0 ≤ p < 1"):
        flashfuse.attention(q, k, v, mask_mod=causal, dropout_p=1)


def test_the_output_lies_as_models_reshape_it(asked):
    out = flashfuse.attention(*qkv(), mask_mod=causal)
    assert out.transpose(1, 2).is_contiguous()


@pytest.fixture
def maps(monkeypatch):
    monkeypatch.setattr(kept_maps, "_kept", {})
    return kept_maps._kept


CAUSAL = (2, 2, 300, 300, "0 where kv <= q")


def test_maps_are_kept(maps):
    like = torch.empty(0)
    with torch.inference_mode():
        first = kept_maps.block_map([], [], like, *CAUSAL)
    assert not any(m.is_inference() for m in first)
    assert kept_maps.block_map([], [], like, *CAUSAL) is first
    for a, b in zip(first, torch.ops.flashfuse.block_map([], [], like, *CAUSAL), strict=True):
        assert torch.equal(a, b)
    window = (2, 2, 300, 300, "0 where kv <= q + n")
    near, far = (kept_maps.block_map([], [n], like, *window)[0] for n in (0, 200))
    assert not torch.equal(near, far)
    assert len(maps) == 3


def test_maps_of_tensors_and_of_modes_are_not_kept(maps):
    like, pad = torch.empty(0), torch.ones(2, 300, dtype=torch.bool)
    padded = (2, 2, 300, 300, "0 where pad[b, kv]")
    before = kept_maps.block_map([pad], [], like, *padded)[0].clone()
    pad[:, 100:] = False
    assert not torch.equal(before, kept_maps.block_map([pad], [], like, *padded)[0])
    with Seen():
        kept_maps.block_map([], [], like, *CAUSAL)
    assert not maps
