"""The operators between autograd and their kernels: what saves, watches, traces or transforms a call."""

import functools
import gc
import io
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from tolerance import assert_equal_under_rule
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import flashfuse.kernels.ops  # noqa: F401  (defines torch.ops.flashfuse)
from flashfuse.kernels.reference import attention_reference
from flashfuse.kernels.spec import ScoreProgram

pytestmark = pytest.mark.usefixtures("one_thread")

B, H, SQ, SKV, D = 2, 2, 5, 6, 8
SEED = torch.tensor([3])
TABLE = "s*0.3 + bias[h, kv - q + 4] where kv <= q + n and pad[b, kv]"
PAD = torch.ones(B, SKV, dtype=torch.bool)
PAD[0, 4:] = False


def attention(q, k, v, bias):
    args = ([bias, PAD], [1], [], SEED, TABLE, 0.25, "cpu")
    return torch.ops.flashfuse.attention(q, k, v, *args)[0]


def weights(q, k, v, bias):
    args = ([bias, PAD], [1], SEED, TABLE, 0.25, "cpu", torch.float32)
    return torch.ops.flashfuse.attention_weights(q, k, *args) @ v


both = pytest.mark.parametrize("run", [attention, weights])


def inputs(requires_grad=True):
    torch.manual_seed(0)
    sizes = (B, H, SQ, D), (B, H, SKV, D), (B, H, SKV, D), (H, 10)
    return [torch.randn(size, requires_grad=requires_grad) for size in sizes]


def gradients(run, leaves=None):
    leaves = leaves or inputs()
    out = run(*leaves)
    return torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))


def assert_same_bits(ours, expected):
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(a, b), i


@both
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(run, use_reentrant):
    leaves = inputs()
    out = checkpoint(run, *leaves, use_reentrant=use_reentrant)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    assert_same_bits([t.grad for t in leaves], gradients(run))


@both
def test_hooks_see_every_tensor_that_is_kept(run):
    kept = []

    def pack(t):
        kept.append(t)
        return t.numpy(force=True).copy()

    leaves = inputs()
    with saved_tensors_hooks(pack, torch.from_numpy):
        found = gradients(run, leaves)
    assert_same_bits(found, gradients(run))
    q, k, _, bias = leaves
    for t in (q, k, bias, PAD, SEED):
        assert any(t is x or (t.shape == x.shape and torch.equal(t, x)) for x in kept)


def test_block_maps_are_kept_as_saved_tensors():
    q, k, v, _ = inputs()
    text = "s where kv <= q"
    maps = torch.ops.flashfuse.block_map([], [], q, B, H, SQ, SKV, text.replace("s", "0", 1))
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out, _ = torch.ops.flashfuse.attention(q, k, v, [], [], list(maps), None, text, 0.0, "cpu")
    assert {m.shape for m in maps} <= set(kept)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@both
def test_second_derivatives_are_refused(run):
    """Also where only a part of them would be missing: what has no gradient counts as 0 in a sum."""
    q, k, v, bias = inputs()
    (dq,) = torch.autograd.grad(run(q, k, v, bias).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (dq.square().sum() + q.square().sum()).backward()
    assert_same_bits([dq], torch.autograd.grad(run(q, k, v, bias).sum(), q))


@both
def test_forward_mode_is_refused(run):
    q, *rest = inputs(requires_grad=False)
    with forward_ad.dual_level():
        assert run(q, *rest).shape == q.shape
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            run(forward_ad.make_dual(q, torch.ones_like(q)), *rest)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: run(q, *rest), (q,), (q,))


@both
def test_transforms_are_refused(run):
    q, *rest = inputs(requires_grad=False)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda q: run(q, *rest).sum())(q)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(lambda q: run(q, *rest))(q[None])


@pytest.mark.parametrize("roots", [(1,), (0, 1)])
def test_lse_has_a_gradient_and_the_maximum_none(roots):
    def run(op, *leaves):
        return op(*leaves[:3], [leaves[3], PAD], [1], [], None, TABLE, 0.0, "cpu")

    def reference(q, k, v, bias):
        out, lse = attention_reference(q, k, v, [bias, PAD], [1], ScoreProgram.parse(TABLE))
        return out, lse

    def slopes(run, dtype=torch.float32):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs()]
        outputs = [run(*leaves)[i] for i in roots]
        given = [torch.linspace(-1, 1, t.numel(), dtype=dtype).view(t.shape) for t in outputs]
        return torch.autograd.grad(outputs, leaves, given, allow_unused=True, materialize_grads=True)

    original, exact = slopes(reference), slopes(reference, torch.float64)
    for op in (torch.ops.flashfuse.attention, torch.ops.flashfuse.attention_and_max):
        for ours, *rest in zip(slopes(functools.partial(run, op)), original, exact, strict=True):
            assert_equal_under_rule(ours, *rest)
    out, lse, highest = run(op, *inputs())
    assert out.requires_grad and lse.requires_grad and not highest.requires_grad
    assert torch.equal(lse, run(torch.ops.flashfuse.attention, *inputs())[1])
    with torch.no_grad():
        assert torch.equal(highest, run(op, *inputs())[2])


@pytest.mark.parametrize("wanted", [True, False])
def test_the_maximum_is_an_operator_like_others(wanted):
    q, k, v, bias = inputs(wanted)
    args = (q, k, v, [bias, PAD], [1], [], SEED, TABLE, 0.25, "cpu")
    torch.library.opcheck(torch.ops.flashfuse.attention_and_max, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse, highest = torch.ops.flashfuse.attention_and_max(*args)
    assert (out.dtype, lse.dtype, highest.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_gradients_that_nobody_asks_for():
    q, k, v, bias = inputs(requires_grad=False)
    for wanted in ((v, bias), (q,), (bias,)):
        for t in (q, k, v, bias):
            t.requires_grad_(any(t is w for w in wanted))
        found = torch.autograd.grad(attention(q, k, v, bias).sum(), wanted)
        assert [g.shape for g in found] == [w.shape for w in wanted]
    limit = torch.randn(B, SKV, requires_grad=True)
    out, _ = torch.ops.flashfuse.attention(
        q, k, v, [limit], [], [], None, "s where limit[b, kv] < 0.5", 0.0, "cpu"
    )
    assert torch.autograd.grad(out.sum(), limit, allow_unused=True) == (None,)


def test_views_and_one_tensor_three_times():
    whole = torch.randn(B, H, 3, SKV, D, requires_grad=True)
    text = "s*0.3 where kv <= q"

    def run(q, k, v):
        return torch.ops.flashfuse.attention(q, k, v, [], [], [], None, text, 0.0, "cpu")[0]

    (found,) = torch.autograd.grad(run(*whole.unbind(2)).sum(), whole)
    parts = [t.detach().requires_grad_() for t in whole.unbind(2)]
    assert torch.equal(found, torch.stack(torch.autograd.grad(run(*parts).sum(), parts), 2))
    x = parts[0]
    (found,) = torch.autograd.grad(run(x, x, x).sum(), x)

    def summed(dtype):
        copies = [x.detach().to(dtype).clone().requires_grad_() for _ in range(3)]
        return sum(torch.autograd.grad(run(*copies).sum(), copies))

    assert_equal_under_rule(found, summed(x.dtype), summed(torch.float64))


class Seen(TorchDispatchMode):
    """A mode that notes the operators it sees."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@both
def test_modes_see_the_operator_and_its_backward(run):
    with Seen() as mode:
        found = gradients(run)
    assert_same_bits(found, gradients(run))
    name = f"flashfuse.attention{'_weights' * (run is weights)}"
    assert {f"{name}.default", f"{name}_backward.default"} <= mode.names


@both
def test_tensors_without_data(run):
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = torch.autograd.grad(run(*(leaves := inputs())).sum(), leaves)
        assert [g.shape for g in found] == [t.shape for t in leaves]
    args = inputs(requires_grad=False)
    assert torch.equal(torch.func.functionalize(run)(*args), run(*args))


def test_lazy_negation_is_resolved():
    q, *rest = inputs(requires_grad=False)
    negated = torch.complex(q, q).conj().imag
    assert negated.is_neg()
    assert torch.equal(attention(negated, *rest), attention(-q, *rest))


def test_a_mode_of_the_backward_alone_sees_it():
    leaves = inputs()
    out = attention(*leaves)
    with Seen() as mode:
        found = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))
    assert "flashfuse.attention_backward.default" in mode.names
    assert_same_bits(found, gradients(attention))


def test_a_gradient_that_is_lazily_negated():
    leaves = inputs()
    out = attention(*leaves)
    do = torch.linspace(-1, 1, out.numel()).view(out.shape)
    lazy = torch.complex(do, -do).conj().imag
    assert lazy.is_neg()
    assert_same_bits(torch.autograd.grad(out, leaves, lazy), gradients(attention))


def test_hooks_may_give_back_tensors_of_another_type():
    seen = []

    class Watched(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
            )
            made.inner = inner
            return made

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
            return function(*args, **kwargs)

    leaves = inputs()
    with saved_tensors_hooks(lambda t: t, Watched):
        found = gradients(attention, leaves)
    assert "flashfuse.attention_backward.default" in seen
    assert_same_bits(found, gradients(attention))


@both
def test_without_gradients(run):
    out = run(*inputs())
    with torch.inference_mode():
        inferred = run(*inputs())
        assert inferred.is_inference()
    with torch.no_grad():
        assert not run(*inputs()).requires_grad
    assert_same_bits([inferred, run(*inputs(False))], [out, out])


def test_autocast():
    leaves = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*leaves)
        assert torch.is_autocast_enabled("cpu")
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().sum(), leaves)
    assert {g.dtype for g in found} == {torch.float32}
    lower = [t.detach().bfloat16().requires_grad_() for t in leaves[:3]]
    expected = torch.autograd.grad(attention(*lower, leaves[3]).float().sum(), [*lower, leaves[3]])
    assert_same_bits(found, [g.float() for g in expected])


def test_nothing_is_kept_alive_by_a_cycle():
    out = attention(*inputs())
    alive = weakref.ref(out)
    gc.disable()
    try:
        del out
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_with_its_backward(dynamic):
    """Both operators, sizes and integers symbolic, one of them recomputed in the backward."""

    def run(q, k, v, bias):
        n, pad = q.shape[2] - 4, torch.ones(B, k.shape[2], dtype=torch.bool)
        out, _ = torch.ops.flashfuse.attention(q, k, v, [bias, pad], [n], [], SEED, TABLE, 0.25, "cpu")

        def rest(q, k, bias):
            args = ([bias, pad], [n], SEED, TABLE, 0.25, "cpu", torch.float32)
            return torch.ops.flashfuse.attention_weights(q, k, *args)

        return out + checkpoint(rest, q, k, bias, use_reentrant=False) @ v

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for kept in (SKV, SKV - 1):
        leaves = inputs()
        leaves[1:3] = [t.detach()[:, :, :kept].clone().requires_grad_() for t in leaves[1:3]]
        assert_same_bits(gradients(compiled, leaves), gradients(run, leaves))


def test_compiled_autograd():
    leaves = inputs()
    out = attention(*leaves).sum()
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        out.backward()
    found = [t.grad for t in leaves]
    assert_same_bits(found, torch.autograd.grad(attention(*leaves).sum(), leaves))


def test_export_saved_and_loaded():
    class Module(torch.nn.Module):
        def forward(self, *args):
            return attention(*args)

    args = tuple(inputs(requires_grad=False))
    program = torch.export.export(Module(), args).run_decompositions()
    assert [n.target for n in program.graph.nodes].count(torch.ops.flashfuse.attention.default) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(*args), attention(*args))
