"""``torch.compile(model, backend="flashfuse")``: options, failures, dynamic shapes, bad input."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import flashfuse
from flashfuse import pipeline
from flashfuse.numbers import compare

pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    flashfuse.clear_reports()


class Attention(nn.Module):
    """One causal layer over ``[B, S, 32]``; dropout on the weights in training."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.dropout = nn.Dropout(dropout)

    def heads(self, x):
        b, s, _ = x.shape
        return (t.view(b, s, 4, 8).transpose(1, 2) for t in self.project(x).chunk(3, -1))

    def forward(self, x):
        q, k, v = self.heads(x)
        s = x.shape[1]
        scores = q @ k.transpose(-2, -1) / 8**0.5
        mask = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
        weights = self.dropout(scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


def compiled(model, inner="eager", **arguments):
    options = {"inner": inner, **arguments.pop("options", {})}
    return torch.compile(model, backend="flashfuse", options=options, **arguments)


def run(model, x, backward=True):
    """The output, and the gradients of ``x`` and of the parameters."""
    x = x.detach().clone().requires_grad_(backward)
    out = model(x)
    if not backward:
        return [out.detach()]
    leaves = [x, *getattr(model, "_orig_mod", model).parameters()]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def assert_same(ours, original, exact):
    for i, (a, b, x) in enumerate(zip(ours, original, exact, strict=True)):
        item = compare(str(i), a, b, x)
        assert item.ok, item


def in_float64(model, x):
    return copy.deepcopy(model).double(), x.double()


# --- ways in ------------------------------------------------------------------------------------


def test_no_import_needed():
    code = (
        "import torch; f = lambda q: torch.softmax(q @ q.mT, -1) @ q;"
        "q = torch.randn(1, 2, 5, 8);"
        "out = torch.compile(f, backend='flashfuse', options={'inner': 'eager'})(q);"
        "assert torch.allclose(out, f(q)); import flashfuse; assert flashfuse.last_report().num_fused == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inner_compilers(inner):
    model, x = Attention(), torch.randn(2, 9, 32)
    assert_same(run(compiled(model, inner), x), run(model, x), run(*in_float64(model, x)))
    assert flashfuse.last_report().num_fused == 1


def test_inner_may_be_a_callable():
    seen = []

    def inner(gm, example_inputs):
        seen.append(gm)
        return gm

    compiled(Attention(), inner)(torch.randn(2, 9, 32))
    (gm,) = seen
    assert any(n.target is torch.ops.flashfuse.attention.default for n in gm.graph.nodes)


def test_mode_and_inductor_options_are_passed_on(monkeypatch):
    import torch._inductor.compile_fx as inductor

    seen = []

    def compile_fx(gm, example_inputs, config_patches=None):
        seen.append(config_patches)
        return gm

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    x = torch.randn(2, 9, 32)
    torch.compile(Attention(), backend="flashfuse", mode="reduce-overhead")(x)
    torch._dynamo.reset()
    torch.compile(Attention(), backend="flashfuse", options={"epilogue_fusion": False, "verify": "full"})(x)
    torch._dynamo.reset()
    torch.compile(Attention(), backend="flashfuse")(x)
    assert seen == [{"triton.cudagraphs": True}, {"epilogue_fusion": False}, None]


def test_verify_full_checks_every_site():
    compiled(Attention(), options={"verify": "full"})(torch.randn(2, 9, 32))
    (site,) = flashfuse.last_report().sites
    assert site.status == "fused"
    assert site.check is not None and site.check.ok and len(site.check.items) > 4


def test_a_differing_site_is_left(monkeypatch):
    from flashfuse.kernels import cpu

    forward = cpu.forward

    def wrong(*args):
        out, lse = forward(*args)
        return out * 1.01, lse

    monkeypatch.setattr(cpu, "forward", wrong)
    model, x = Attention(), torch.randn(2, 9, 32)
    out = compiled(model, options={"verify": "full"})(x)
    (site,) = flashfuse.last_report().sites
    assert [r.code for r in site.reasons] == ["check_failed"]
    assert torch.equal(out, model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "maybe"}, "expected verify to be one of proof, full, off, got 'maybe'"),
        ({"inner": "inductr"}, "expected inner to be one of .*inductor.*, got 'inductr'"),
        ({"inner": "flashfuse"}, "got 'flashfuse'"),
        ({"inner": 3}, "name of a backend or a callable, got 3"),
        ({"epilogue_fusio": True}, "unknown option 'epilogue_fusio'"),
        ({"inner": "eager", "epilogue_fusion": True}, "unknown option 'epilogue_fusion'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(Attention(), backend="flashfuse", options=options)(torch.randn(2, 9, 32))


# --- graphs -------------------------------------------------------------------------------------


def test_fullgraph():
    model, x = Attention(), torch.randn(2, 9, 32)
    assert_same(run(compiled(model, fullgraph=True), x), run(model, x), run(*in_float64(model, x)))


class Broken(Attention):
    def forward(self, x):
        x = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(x)


def test_graph_breaks():
    model, x = Broken(), torch.randn(2, 9, 32)
    assert_same(run(compiled(model), x), run(model, x), run(*in_float64(model, x)))
    assert [r.num_fused for r in flashfuse.reports()] == [1, 1]


def test_reports():
    assert flashfuse.last_report() is None and flashfuse.reports() == ()
    compiled(Attention())(torch.randn(2, 9, 32))
    compiled(nn.Linear(4, 4))(torch.randn(2, 4))
    first, second = flashfuse.reports()
    assert (first.num_sites, first.num_fused, second.num_sites) == (1, 1, 0)
    assert flashfuse.last_report() is second
    assert (first.sites[0].mask, first.sites[0].shape.head_dim) == ("kv <= q", 8)
    flashfuse.clear_reports()
    assert flashfuse.last_report() is None


@pytest.mark.parametrize("stage", ["find_regions", "rewrite"])
def test_a_failure_inside_leaves_the_graph_alone(monkeypatch, stage):
    def broken(*args):
        raise RuntimeError(f"broken in {stage}")

    monkeypatch.setattr(pipeline, stage, broken)
    model, x = Attention(), torch.randn(2, 9, 32)
    with pytest.warns(flashfuse.FlashFuseWarning, match=f"RuntimeError: broken in {stage}") as caught:
        out = compiled(model)(x)
        torch._dynamo.reset()
        compiled(model)(x)
    assert len([w for w in caught if w.category is flashfuse.FlashFuseWarning]) == 1
    assert torch.equal(out, model(x))
    assert f"broken in {stage}" in flashfuse.last_report().warnings[0]


def test_a_rewritten_graph_that_does_not_compile_falls_back():
    def inner(gm, example_inputs):
        if any(n.target is torch.ops.flashfuse.attention.default for n in gm.graph.nodes):
            raise NotImplementedError("no such operator here")
        return gm

    model, x = Attention(), torch.randn(2, 9, 32)
    with pytest.warns(flashfuse.FlashFuseWarning, match="no such operator here"):
        out = compiled(model, inner)(x)
    assert torch.equal(out, model(x))


def test_an_error_of_the_inner_compiler_is_the_users():
    def inner(gm, example_inputs):
        raise NotImplementedError("nothing compiles")

    with warnings.catch_warnings():
        warnings.simplefilter("error", flashfuse.FlashFuseWarning)
        with pytest.raises(Exception, match="nothing compiles"):
            compiled(Attention(), inner)(torch.randn(2, 9, 32))


# --- dynamic shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [False, True])
def test_a_new_length_compiles_nothing(mark):
    x = torch.randn(2, 9, 32)
    if mark:
        torch._dynamo.mark_dynamic(x, 1)
    rest = [torch.randn(2, n, 32) for n in (16, 33)]
    model = Attention()

    def forward(x):
        return model(x)

    frames = []

    def inner(gm, example_inputs):
        frames.append(gm)
        return gm

    fast = compiled(forward, inner, dynamic=None if mark else True)
    for t in (x, *rest):
        item = compare("out", fast(t), model(t), in_float64(model, t)[0](t.double()))
        assert item.ok, item
    assert len(frames) == 1
    assert flashfuse.last_report().num_fused == 1


def test_a_new_length_through_inductor():
    model = Attention()
    fast = compiled(model, "inductor", dynamic=True)
    for n in (9, 17):
        x = torch.randn(2, n, 32)
        assert_same(run(fast, x), run(model, x), run(*in_float64(model, x)))
    assert [r.num_fused for r in flashfuse.reports()] == [1]


# --- autograd, autocast, modes ------------------------------------------------------------------


class Checkpointed(Attention):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_activation_checkpointing(inner):
    model, x = Checkpointed(), torch.randn(2, 9, 32)
    assert_same(run(compiled(model, inner), x), run(model, x), run(*in_float64(model, x)))
    assert flashfuse.last_report().num_fused == 1


def test_activation_checkpointing_replays_dropout():
    """With dropout the gradient must be that of the mask which the forward drew."""
    model, x = Checkpointed(dropout=0.4), torch.randn(1, 9, 32, dtype=torch.float64)
    model.double()
    fast = compiled(model, "aot_eager")
    torch.manual_seed(1)
    ours = run(fast, x)[1]
    direction = torch.randn_like(x)
    step = 1e-6
    values = []
    for sign in (1, -1):
        torch.manual_seed(1)
        values.append(fast(x + sign * step * direction).square().sum().detach())
    numeric = (values[0] - values[1]) / (2 * step)
    # Central differences in float64 are good to about step² and eps/step of the value.
    assert abs(numeric - (ours * direction).sum()) <= 1e-8 * abs(values[0])
    assert flashfuse.last_report().sites[0].dropout_p == 0.4


@pytest.mark.parametrize("around", [True, False])
def test_autocast(around):
    model, x = Attention(), torch.randn(2, 9, 32)

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def outside(x):
        return model(x)

    fast = compiled(outside if around else inside)
    with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
        ours, original = fast(x), (outside if around else inside)(x)
    exact = in_float64(model, x)[0](x.double())
    assert ours.dtype == original.dtype == torch.bfloat16
    item = compare("out", ours, original, exact)
    assert item.ok, item
    (site,) = flashfuse.last_report().sites
    assert site.status == "fused" and site.shape.dtype == torch.bfloat16


def test_inference_mode():
    model, x = Attention().eval(), torch.randn(2, 9, 32)
    with torch.inference_mode():
        out = compiled(model)(x)
        assert compare("out", out, model(x), in_float64(model, x)[0](x.double())).ok
    assert flashfuse.last_report().num_fused == 1


def test_two_threads():
    models = [Attention(), Attention()]
    results, x = {}, torch.randn(2, 9, 32)

    def work(i):
        results[i] = compiled(models[i])(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, model in enumerate(models):
        assert compare("out", results[i], model(x), in_float64(model, x)[0](x.double())).ok
    assert [r.num_fused for r in flashfuse.reports()] == [1, 1]


def test_export_of_the_rewritten_graph():
    model, x = Attention(), torch.randn(2, 9, 32)
    gm = torch.export.export(model, (x,)).module()
    new, report = flashfuse.rewrite(gm, (x,))
    assert report.num_fused == 1
    program = torch.export.export(new, (x,))
    assert any(n.target is torch.ops.flashfuse.attention.default for n in program.graph.nodes)
    assert torch.equal(program.module()(x), new(x))


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = Attention(), torch.randn(2, 9, 32)
        parallel = nn.parallel.DistributedDataParallel(model)
        fast = compiled(parallel)
        fast(x).square().sum().backward()
        ours = [p.grad.clone() for p in model.parameters()]
        exact, x64 = in_float64(model, x)
        assert_same(ours, run(model, x)[2:], run(exact, x64)[2:])
        assert sum(r.num_fused for r in flashfuse.reports()) == 1
    finally:
        dist.destroy_process_group()


# --- bad input ----------------------------------------------------------------------------------


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


def outcome(f, args):
    try:
        return f(*args)
    except Exception as error:
        return error


def same_outcome(f, args, fused):
    """The result, or an error, as without us."""
    ours, original = outcome(compiled(f), args), outcome(torch.compile(f, backend="eager"), args)
    if isinstance(original, Exception):
        assert type(ours) is type(original)
    elif fused:
        # Nothing here is checked for accuracy: NaN, shape and dtype are.
        assert ours.shape == original.shape and ours.dtype == original.dtype
        assert torch.equal(ours.isnan(), original.isnan())
    else:
        assert ours.dtype == original.dtype and ours.shape == original.shape
        assert ours.is_meta or torch.equal(*(t.to_dense() if t.is_sparse else t for t in (ours, original)))
    report = flashfuse.last_report()
    assert (report.num_fused if report else 0) == fused


def tensors(*sizes, **kwargs):
    return [torch.randn(*sizes, **kwargs) for _ in range(3)]


def test_no_attention():
    same_outcome(lambda x: torch.relu(x) @ x.mT, [torch.randn(4, 5)], 0)


def test_nan_inputs():
    q, k, v = tensors(2, 3, 5, 8)
    q[0, 0, 1, 0] = float("nan")
    v[1, 2, 3, 0] = float("nan")
    same_outcome(attention, [q, k, v], 1)


def test_integers():
    same_outcome(lambda q, k, v: (q @ k.mT) @ v, [torch.ones(2, 5, 8, dtype=torch.int64)] * 3, 0)
    same_outcome(attention, [torch.ones(2, 5, 8, dtype=torch.int64)] * 3, 0)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(q_len, kv_len):
    same_outcome(
        attention,
        [torch.randn(2, 3, q_len, 8), torch.randn(2, 3, kv_len, 8), torch.randn(2, 3, kv_len, 8)],
        0,
    )


@pytest.mark.parametrize("head_dim", [1, 5, 100])
def test_any_head_dimension(head_dim):
    q, k, v = tensors(2, 3, 5, head_dim)
    assert compare(
        "out", compiled(attention)(q, k, v), attention(q, k, v), attention(q.double(), k.double(), v.double())
    ).ok
    assert flashfuse.last_report().num_fused == 1


def test_complex():
    same_outcome(
        lambda q, k, v: (q @ k.mT).abs().softmax(-1).to(v.dtype) @ v,
        tensors(2, 5, 8, dtype=torch.complex64),
        0,
    )


def test_meta():
    same_outcome(attention, tensors(2, 3, 5, 8, device="meta"), 0)
    reasons = [r.code for site in flashfuse.last_report().sites for r in site.reasons]
    assert reasons == ["device"]


def test_sparse():
    mask = torch.eye(5).to_sparse()
    same_outcome(lambda q, k, v, m: torch.sparse.mm(m, attention(q, k, v)), [*tensors(5, 8), mask], 1)


def test_nested():
    q = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged)

    def f(q):
        return F.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)

    ours, original = outcome(compiled(f), [q]), outcome(torch.compile(f, backend="eager"), [q])
    if isinstance(original, Exception):
        assert type(ours) is type(original)
    else:
        assert torch.equal(ours.values(), original.values())
    assert all(r.num_fused == 0 for r in flashfuse.reports())


def test_mask_mutated_between_layers():
    def two_layers(q, k, v, mask):
        mask = mask.clone()
        first = (q @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v
        mask[..., 0] = False
        return (first @ k.mT).masked_fill(~mask, -1e9).softmax(-1) @ v

    args = [*tensors(2, 3, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril() | torch.eye(5, dtype=torch.bool)]
    exact = two_layers(*(t.double() if t.is_floating_point() else t for t in args))
    assert compare("out", compiled(two_layers)(*args), two_layers(*args), exact).ok


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(train, need_weights):
    module, x = nn.MultiheadAttention(32, 4, batch_first=True).train(train), torch.randn(2, 9, 32)
    check = flashfuse.verify(module, x, x, x, need_weights=need_weights)
    assert check.ok, [i for i in check.items if not i.ok]


def test_encoder_layer():
    module, x = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), torch.randn(2, 9, 32)
    report = flashfuse.explain(module, x)
    assert report.check.ok and report.num_fused == report.num_sites == 1
    exported = torch.export.export(module, (x,)).module()
    new, report = flashfuse.rewrite(exported, (x,))
    assert report.num_fused == 1
    assert_same([new(x)], [module(x)], [in_float64(module, x)[0](x.double())])


def test_captured_arguments_without_a_name_get_one():
    """Dynamo calls positional arguments ``L_args_1_``; a capture named ``1`` was no expression."""

    class Biased(torch.nn.Module):
        def forward(self, *args):
            q, k, v, bias = args
            return ((q @ k.mT) * 0.3 + bias).softmax(-1) @ v

    inputs = [*tensors(2, 3, 20, 8), torch.randn(20, 20)]
    report = flashfuse.explain(Biased(), *inputs)
    assert report.num_fused == 1 and report.ok
    assert report.sites[0].program == "s*0.3 + arg_3[q, kv] else nan"
