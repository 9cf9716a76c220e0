"""Which kernels are chosen for a site, why others are not, and what ``native`` does with what it is given.

No device is needed: a stub stands for cuDNN.
"""

import math

import pytest
import torch

from flashfuse.kernels import dispatch, native
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import AttentionShape, Reason, ScoreProgram
from flashfuse.options import Options

CUDA = torch.device("cuda", 0)
CAUSAL = "s*0.125 where kv <= q"
LARGE = {"batch": 4, "heads": 32, "kv_heads": 32, "q_len": 4096, "kv_len": 4096, "dim": 64, "v_dim": 64}


@pytest.fixture
def hopper(monkeypatch):
    """A machine with an H100 and a new cuDNN, as far as the table asks."""
    monkeypatch.setattr(native, "_capability", lambda device: 9)
    monkeypatch.setattr(native, "_cudnn_version", lambda: 91900)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)


def select(
    text=CAUSAL, dtype=torch.bfloat16, dropout_p=0.0, device=CUDA, kernels="auto", **sizes
) -> dispatch.Selection | Reason:
    s = LARGE | sizes
    shape = AttentionShape(
        s["batch"], s["heads"], s["kv_heads"], s["q_len"], s["kv_len"], s["dim"], s["v_dim"], dtype
    )
    return dispatch.select(shape, ScoreProgram.parse(text), dropout_p, device, kernels)


def refusal(**how):
    """The code with which ``native`` was refused; the site is run by ``triton``."""
    chosen = select(**how)
    assert isinstance(chosen, dispatch.Selection) and chosen.variant.name == "triton"
    ((name, reason),) = chosen.refused
    assert name == "native" and reason.message
    return reason.code


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("text", ["s*0.125", CAUSAL, "s where kv <= q + Skv - Sq", f"{CAUSAL} else mean"])
def test_native_is_chosen_where_it_was_measured_faster(hopper, dim, text):
    chosen = select(text, dim=dim, v_dim=dim)
    assert isinstance(chosen, dispatch.Selection)
    assert chosen.variant.name == "native" and chosen.refused == () and not chosen.variant.needs_block_map


CANNOT = {
    "program": [
        {"text": "s*0.125 + bias[h]"},
        {"text": "tanh(s*0.02)*50.0"},
        {"text": "s*-0.125"},
        {"text": "s*0.125 where kv <= q sink 0.0"},
        {"text": "s*0.125 where kv <= q and pad[b, kv] else mean"},
        {"text": "s*0.125 where kv <= n"},
    ],
    "mask": [
        {"text": "s*0.125 where kv <= q and kv > q - 512"},
        {"text": "s*0.125 where kv < q else zero"},
        {"text": "s*0.125 where kv <= q + 1"},
        {"text": "s*0.125 where kv >= q"},
        {"q_len": 2048},
        {"text": "s where kv <= q + Skv - Sq", "q_len": 2048},
    ],
    "dropout": [{"dropout_p": 0.1}],
    "dtype": [{"dtype": torch.float32}],
    "head_dim": [{"dim": 192, "v_dim": 128}, {"dim": 256, "v_dim": 256}],
    "length": [{"text": "s", "q_len": 1}],
}
SLOWER = [
    {"dim": 96, "v_dim": 96},
    {"dtype": torch.float16},
    {"q_len": 512, "kv_len": 512},
    {"text": "s*0.125", "q_len": 2048},
    {"batch": 1, "heads": 8, "kv_heads": 8},
    {"kv_heads": 8},
]


@pytest.mark.parametrize(
    "code, how", [(code, how) for code, cases in CANNOT.items() for how in cases], ids=str
)
def test_what_native_cannot_run(hopper, code, how):
    assert refusal(**how) == code
    assert refusal(**how, kernels="native") == code


@pytest.mark.parametrize("how", SLOWER, ids=str)
def test_what_was_not_measured_faster_is_ours_unless_asked_for(hopper, how):
    assert refusal(**how) == "not_faster"
    assert select(**how, kernels="native").variant.name == "native"


def test_other_devices_have_not_been_measured(hopper, monkeypatch):
    monkeypatch.setattr(native, "_capability", lambda device: 8)
    assert refusal() == "not_faster"


def test_only_our_own_kernels_can_be_asked_for(hopper):
    assert refusal(kernels="triton") == "option"


def test_symbolic_sizes_are_ours(hopper):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    length = shapes.create_unbacked_symint()
    torch._check(length >= 2)
    assert refusal(q_len=length, kv_len=length) == "symbolic"
    assert refusal(batch=length) == "symbolic"


def test_what_the_user_switched_off_is_not_used(hopper, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert refusal() == "switched_off"
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    torch.use_deterministic_algorithms(True)
    try:
        assert refusal() == "deterministic"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(native, "_cudnn_version", lambda: 90100)
    assert refusal() == "cudnn"


def test_the_cpu_is_as_it_was():
    for kernels in ("auto", "triton", "native"):
        chosen = select(device=torch.device("cpu"), kernels=kernels)
        assert chosen.variant.name == "cpu" and {r.code for _, r in chosen.refused} == {"device"}
    reason = select(device=torch.device("cpu"), dtype=torch.complex64)
    assert isinstance(reason, Reason) and reason.code == "dtype"


def test_what_no_kernel_runs_is_told_by_our_own(hopper):
    reason = select(dim=12, v_dim=12)
    assert isinstance(reason, Reason) and reason.code == "head_dim" and "Triton" in reason.message


def test_the_option_is_checked():
    assert Options.read({"kernels": "triton"}).kernels == "triton"
    with pytest.raises(ValueError, match="kernels to be one of auto, triton, native, got 'cudnn'"):
        Options.read({"kernels": "cudnn"})


# --- running it, with a stub for cuDNN ----------------------------------------------------------------


class Stub:
    """cuDNN in plain PyTorch; results lie in memory in the order of the inputs, as cuDNN's do."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, bias, with_lse, dropout_p, causal, with_mask, *, scale):
        assert bias is None and with_lse and dropout_p == 0 and not with_mask
        self.calls.append("forward")
        out, lse = attention_reference(q, k, v, (), (), self.program(causal, scale), 0.0, None)
        return torch.empty_like(q).copy_(out), lse.float()[..., None], None, None, q.shape[2], k.shape[2]

    def backward(
        self, do, q, k, v, out, lse, seed, offset, bias, q_at, k_at, q_len, kv_len, p, causal, *, scale
    ):
        assert bias is q_at is k_at is None and (q_len, kv_len) == (q.shape[2], k.shape[2])
        assert p == 0 and math.copysign(1, p) < 0
        b, h, s, d = out.shape
        assert do.stride() == out.stride() == (s * h * d, d, h * d, 1) and lse.shape == (b, h, s, 1)
        self.calls.append("backward")
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            made, _ = attention_reference(*leaves, (), (), self.program(causal, scale), 0.0, None)
            grads = torch.autograd.grad(made, leaves, do)
        return [torch.empty_like(t).copy_(g) for t, g in zip((q, k, v), grads, strict=True)]

    @staticmethod
    def program(causal, scale):
        return ScoreProgram.parse(f"s*{scale}" + (" where kv <= q" if causal else ""))


class Ours:
    """Our own kernels, which only count."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, *rest):
        self.calls.append("forward")
        return q, q[..., 0]

    def backward(self, do, q, k, v, *rest):
        self.calls.append("backward")
        return [q, k, v]


@pytest.fixture
def stub(hopper, monkeypatch):
    made, own = Stub(), Ours()
    monkeypatch.setattr(native, "_FORWARD", made.forward)
    monkeypatch.setattr(native, "_BACKWARD", made.backward)
    monkeypatch.setattr(native, "_ours", lambda: own)
    monkeypatch.setattr(native, "_WORKS", {})
    return made, own


def lay_out(shape, layout):
    b, h, s, d = shape
    if layout == "bshd":
        return torch.randn(b, s, h, d).transpose(1, 2)
    if layout == "packed":
        return torch.randn(b, s, 3, h, d)[:, :, 1].transpose(1, 2)
    if layout == "by head":
        return torch.randn(b, s, h, 3, d)[:, :, :, 2].transpose(1, 2)
    if layout == "unaligned":
        return torch.randn(b * s * h * d + 1)[1:].view(b, s, h, d).transpose(1, 2)
    if layout == "expanded":
        return torch.randn(b, 1, s, d).expand(b, h, s, d)
    return torch.randn(b, h, s, d)


def run(q, k, v, do, text=CAUSAL, dropout_p=0.0):
    program = ScoreProgram.parse(text)
    out, lse = native.forward(q, k, v, (), (), (), None, program, dropout_p)
    return out, lse, native.backward(do, q, k, v, out, lse, (), (), (), None, program, dropout_p, ())


LAYOUTS = ["bshd", "bhsd", "packed", "by head", "unaligned", "expanded"]


@pytest.mark.parametrize("sizes", [(2, 3, 5, 8), (1, 3, 5, 8), (2, 1, 5, 8), (1, 1, 2, 16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["s*0.3", "s*0.3 where kv <= q"])
def test_results_are_laid_out_as_the_operator_says(stub, sizes, layout, text):
    q, k, v, do = (lay_out(sizes, layout) for _ in range(4))
    out, lse, grads = run(q, k, v, do, text)
    b, h, s, d = sizes
    for t in (out, *grads):
        assert t.stride() == (s * h * d, d, h * d, 1)
    assert lse.shape == (b, h, s) and lse.is_contiguous() and lse.dtype == torch.float32
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    expected, logs = attention_reference(*leaves, (), (), ScoreProgram.parse(text), 0.0, None)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(lse, logs.detach())
    for ours, exact in zip(grads, torch.autograd.grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(ours, exact)
    assert stub[0].calls == ["forward", "backward"] and not stub[1].calls


@pytest.mark.parametrize("layout", ["bshd", "packed", "by head"])
def test_what_lies_well_is_not_copied(layout):
    q = lay_out((2, 3, 5, 8), layout)
    assert native._rows(q) is q


def test_the_other_way_is_taken_where_cudnn_may_not_run(stub, monkeypatch):
    cudnn, own = stub
    q = torch.randn(2, 3, 6, 8)
    torch.use_deterministic_algorithms(True)
    try:
        run(q, q, q, q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert own.calls == ["forward", "backward"]
    for text, p in (("s*0.1 where kv <= q", 0.5), ("s*0.1 + q", 0.0), ("s*0.1 where kv < q", 0.0)):
        run(q, q, q, q, text, p)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    run(q, q, q, q)
    assert own.calls == ["forward", "backward"] * 5 and not cudnn.calls


def test_each_direction_has_its_own_choice(stub, monkeypatch):
    cudnn, own = stub
    monkeypatch.setattr(native, "FASTER", {(9, 8, True): frozenset(("forward",))})
    q = torch.randn(2, 3, 6, 8)
    run(q, q, q, q)
    assert cudnn.calls == ["forward"] and own.calls == ["backward"]


def test_sizes_that_cudnn_refuses_are_ours_from_then_on(stub, monkeypatch):
    own = stub[1]
    tried = []

    def no_plan(*_, **__):
        tried.append(1)
        raise RuntimeError("No valid execution plans built.\nmore")

    monkeypatch.setattr(native, "_FORWARD", no_plan)
    q = torch.randn(2, 3, 6, 8)
    program = ScoreProgram.parse(CAUSAL)
    with pytest.warns(UserWarning, match="cuDNN does not run .* No valid execution plans built"):
        native.forward(q, q, q, (), (), (), None, program, 0.0)
    native.forward(q, q, q, (), (), (), None, program, 0.0)
    assert len(tried) == 1 and own.calls == ["forward"] * 2

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(native, "_FORWARD", full)
    with pytest.raises(torch.OutOfMemoryError):
        native.forward(q[:1], q[:1], q[:1], (), (), (), None, program, 0.0)
