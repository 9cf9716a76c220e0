"""cuDNN's attention behind the operator, on a real GPU: results, layouts, repeatability, CUDA graphs."""

import itertools

import pytest
import torch
from kernel_cases import Case, run_case

from flashfuse.kernels import native
from flashfuse.kernels.spec import ScoreProgram

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability()[0] != 9
    or native._missing() is not None,
    reason="no Hopper device with cuDNN attention",
)
BF16, F16 = torch.bfloat16, torch.float16
FULL, CAUSAL = "s*0.11", "s*0.11 where kv <= q"


@pytest.fixture(autouse=True)
def only_cudnn(monkeypatch):
    """Sizes that cuDNN refuses would silently be ours."""
    monkeypatch.setattr(native, "_WORKS", {})
    yield
    assert all(native._WORKS.values())


@pytest.fixture
def no_other(monkeypatch):
    monkeypatch.setattr(native, "_ours", lambda: pytest.fail("our own kernels ran"))


def tensors(sizes, n=4, layout="bshd", grad=False):
    b, h, s, d = sizes
    if layout == "packed":
        made = [*torch.randn(b, s, 3, h, d, device="cuda", dtype=BF16).unbind(2)]
        made = [t.transpose(1, 2) for t in made] + tensors(sizes, max(0, n - 3))
    elif layout == "bhsd":
        made = [torch.randn(b, h, s, d, device="cuda", dtype=BF16) for _ in range(n)]
    else:
        made = [torch.randn(b, s, h, d, device="cuda", dtype=BF16).transpose(1, 2) for _ in range(n)]
    return [t.detach().requires_grad_() for t in made[:n]] if grad else made[:n]


def both(q, k, v, do, text=CAUSAL, implementation=native):
    program = ScoreProgram.parse(text)
    out, lse = implementation.forward(q, k, v, (), (), (), None, program, 0.0)
    return [out, lse, *implementation.backward(do, q, k, v, out, lse, (), (), (), None, program, 0.0, ())]


def cases():
    for dim, text, length in itertools.product((64, 128), (FULL, CAUSAL), (128, 257, 1000, 4096)):
        yield Case(text, (2, 3, length, length), 3, (dim, dim), dtype=BF16)
    for layout, text, length in itertools.product(("bhsd", "packed"), (FULL, CAUSAL), (257, 1024)):
        yield Case(text, (2, 4, length, length), 4, (64, 64), dtype=BF16, layout=layout)
    for text in (FULL, CAUSAL):
        yield Case(text, (2, 6, 300, 300), 2, (128, 128), dtype=BF16)
        yield Case(text, (1, 1, 1000, 1000), 1, (64, 64), dtype=F16)
        yield Case(text, (1, 2, 200, 200), 2, (40, 40), dtype=BF16)
    yield Case(FULL, (2, 3, 200, 333), 3, (64, 64), dtype=BF16)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case}|{case.layout}")
def test_equal_under_rule(no_other, case):
    run_case(native, case, "cuda")


@pytest.mark.parametrize("sizes", [(2, 4, 512, 64), (1, 4, 512, 128), (2, 1, 300, 64)], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed"])
@pytest.mark.parametrize("text", [FULL, CAUSAL])
def test_either_kernel_goes_with_either(no_other, sizes, layout, text):
    """The same lse up to rounding, and the same sizes, strides and dtypes of everything."""
    from flashfuse.kernels import triton_attention

    torch.manual_seed(0)
    inputs = tensors(sizes, layout=layout)
    theirs, ours = both(*inputs, text), both(*inputs, text, triton_attention)
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    assert (theirs[1] - ours[1]).abs().max() < 1e-4
    q, k, v, do = inputs
    program = ScoreProgram.parse(text)
    for forward, backward in ((native, triton_attention), (triton_attention, native)):
        out, lse = forward.forward(q, k, v, (), (), (), None, program, 0.0)
        mixed = backward.backward(do, q, k, v, out, lse, (), (), (), None, program, 0.0, ())
        for name, a, b in zip(("dq", "dk", "dv"), mixed, ours[2:], strict=True):
            assert (a.float() - b.float()).norm() < 0.02 * b.float().norm(), name


def test_what_cudnn_does_not_know_is_ours(monkeypatch):
    """A gradient of lse, and the maximum."""
    from flashfuse.kernels import triton_attention

    torch.manual_seed(0)
    q, k, v, do = tensors((2, 4, 512, 64))
    program = ScoreProgram.parse(CAUSAL)
    rest = ((), (), (), None, program, 0.0)
    out, lse = native.forward(q, k, v, *rest)
    assert native._WORKS
    monkeypatch.setattr(native, "_WORKS", {})
    dlse, highest, again = (torch.randn_like(lse) for _ in range(3))
    ours = triton_attention.backward(do, q, k, v, out, lse, *rest, (), dlse)
    for a, b in zip(native.backward(do, q, k, v, out, lse, *rest, (), dlse), ours, strict=True):
        assert torch.equal(a, b)
    native.forward(q, k, v, *rest, highest)
    triton_attention.forward(q, k, v, *rest, again)
    assert torch.equal(highest, again) and not native._WORKS


@pytest.mark.parametrize("other", ["bhsd", "expanded", "bshd"])
def test_plans_of_the_users_own_calls_are_not_taken(no_other, other):
    """A gradient that lies otherwise in a call of SDPA, before ours, of tensors that lie alike."""
    torch.manual_seed(0)
    sizes = (2, 4, 384, 64)
    inputs = tensors(sizes)
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.11)
        if other == "expanded":
            do = torch.ones(1, 1, 1, 64, device="cuda", dtype=BF16).expand(sizes)
        else:
            do = tensors(sizes, 1, other)[0]
        torch.autograd.grad(out, leaves, do)
    from flashfuse.kernels import triton_attention

    for a, b in zip(both(*inputs), both(*inputs, CAUSAL, triton_attention), strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()
    # A gradient that lies otherwise in a second call of ours.
    transposed = [*inputs[:3], inputs[3].contiguous()]
    for a, b in zip(both(*transposed), both(*inputs, CAUSAL, triton_attention), strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def test_deterministic_algorithms_give_the_same_bits():
    torch.manual_seed(0)
    inputs = tensors((2, 8, 2048, 64))
    torch.use_deterministic_algorithms(True)
    try:
        first = both(*inputs)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, both(*inputs), strict=True))
        assert not native._WORKS
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_switch_thrown_between_forward_and_backward_is_harmless():
    torch.manual_seed(0)
    q, k, v, do = tensors((1, 4, 512, 64))
    program = ScoreProgram.parse(CAUSAL)
    expected = both(q, k, v, do)
    out, lse = native.forward(q, k, v, (), (), (), None, program, 0.0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        grads = native.backward(do, q, k, v, out, lse, (), (), (), None, program, 0.0, ())
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    for a, b in zip(grads, expected[2:], strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def test_a_cuda_graph_records_both_directions(no_other):
    torch.manual_seed(0)
    q, k, v, do = tensors((1, 4, 512, 64))
    both(q, k, v, do)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = both(q, k, v, do)
    for _ in range(2):
        q.normal_()
        graph.replay()
        for a, b in zip(recorded, both(q, k, v, do), strict=True):
            assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(mode):
    import flashfuse

    flashfuse.clear_reports()
    torch._dynamo.reset()

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    run = torch.compile(attend, backend="flashfuse", mode=mode)
    sizes = (2, 32, 1024, 64)
    for seed in range(4):
        torch.manual_seed(seed)
        leaves, do = tensors(sizes, 3, grad=True), tensors(sizes, 1)[0]
        torch.compiler.cudagraph_mark_step_begin()
        out = run(*leaves)
        grads = torch.autograd.grad(out, leaves, do)
        again = attend(*leaves)
        for a, b in zip((out, *grads), (again, *torch.autograd.grad(again, leaves, do)), strict=True):
            assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()
    report = flashfuse.last_report()
    assert report is not None and [site.variant for site in report.sites] == ["native"]


def test_a_length_that_changes_is_ours():
    import flashfuse

    flashfuse.clear_reports()
    torch._dynamo.reset()

    @torch.compile(backend="flashfuse")
    def attend(q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    for length in (2048, 2304, 2560):
        attend(tensors((2, 32, length, 64), 1)[0])
    variants = [site.variant for report in flashfuse.reports() for site in report.sites]
    assert variants == ["native", "triton"]
