"""``flashfuse.attention``: scores and masks of the user's own, against the formula in float64."""

import functools
import math

import pytest
import torch
import torch._dynamo
from tolerance import assert_equal_under_rule

import flashfuse
from flashfuse.functional import formula

pytestmark = pytest.mark.usefixtures("one_thread")


def qkv(heads=4, kv_heads=2, length=70, dims=(16, 24), dtype=torch.float32):
    torch.manual_seed(0)
    sizes = ((heads, length, dims[0]), (kv_heads, length, dims[0]), (kv_heads, length, dims[1]))
    return [torch.randn(2, *size, dtype=dtype, requires_grad=True) for size in sizes]


def table(*sizes):
    return torch.randn(*sizes, requires_grad=True)


DOCUMENT = (torch.arange(70) // 30).expand(2, -1)
START = torch.tensor([0, 40])


def softcapped(make):
    return lambda s, b, h, q, kv: torch.tanh(s / 5) * 5


def alibi(make):
    slopes = make(4)
    return lambda s, b, h, q, kv: s + slopes[h] * (kv - q)


def relative(make):
    biases = make(139, 4)
    return lambda s, b, h, q, kv: s + biases[kv - q + 69, h]


def gated(make):
    gate, bias = make(2, 70), make(70, 70)
    return lambda s, b, h, q, kv: s * torch.sigmoid(gate[b, q]) + bias[q, kv]


MODS = {
    "plain": (None, None),
    "softcap, causal": (softcapped, lambda b, h, q, kv: kv <= q),
    "alibi, left padding": (alibi, lambda b, h, q, kv: (kv <= q) & (kv >= START[b])),
    "table, documents": (relative, lambda b, h, q, kv: DOCUMENT[b, q] == DOCUMENT[b, kv]),
    "gate and bias, window": (gated, lambda b, h, q, kv: (q - kv).abs() < 20),
}


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("name", MODS)
def test_equal_with_gradients(name, more):
    """Also of lse, and the maximum, which has none."""
    score, mask = MODS[name]
    inputs, made = qkv(), []

    def learnt(*sizes):
        made.append(table(*sizes))
        return made[-1]

    def results(run, dtype):
        """The output and the gradients of the inputs and of all that the score reads."""
        taken = iter(made)
        own = [t.to(dtype) for t in inputs]
        score_mod = score and score(learnt if not made else lambda *sizes: next(taken).to(dtype))
        found = run(*own, score_mod, mask)
        outputs = list(found) if more else [found]
        assert [t.requires_grad for t in outputs] == [True, True, False][: len(outputs)]
        slopes = [torch.linspace(-1, 1, t.numel(), dtype=dtype).view(t.shape) for t in outputs[:2]]
        return [*outputs, *torch.autograd.grad(outputs[:2], [*inputs, *made], slopes)]

    def fused(*args):
        return flashfuse.attention(*args, return_lse=more, return_max_scores=more)

    ours = results(fused, torch.float32)
    original, exact = (
        results(lambda *args: formula(*args, None, 0.0, more, more), dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for i, found in enumerate(zip(ours, original, exact, strict=True)):
        assert_equal_under_rule(*found, f"{name}: {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    q, k, v = (t.detach() for t in qkv(dtype=dtype))
    causal = MODS["softcap, causal"][1]
    ours = flashfuse.attention(q, k, v, mask_mod=causal, scale=0.3)
    assert ours.dtype == dtype
    rows = [formula(*(t.to(d) for t in (q, k, v)), None, causal, 0.3, 0.0) for d in (dtype, torch.float64)]
    assert_equal_under_rule(ours, *rows)


def test_a_row_without_keys_is_zero():
    q, k, v = qkv()
    out = flashfuse.attention(q, k, v, mask_mod=lambda b, h, q, kv: (kv < 30) & (q != 3))
    assert (out[:, :, 3] == 0).all() and out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_row_without_keys_has_no_part_in_lse():
    def run(attend, dtype):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in qkv())
        made = attend(q, k, v, mask_mod=lambda b, h, q, kv: (kv < 30) & (q != 3))
        assert (made.lse[:, :, 3] == -math.inf).all() and (made.max_scores[:, :, 3] == -math.inf).all()
        return [*made, *torch.autograd.grad(made.lse[:, :, 3].sum() + made.lse[:, :, 4].sum(), (q, k))]

    def plain(q, k, v, mask_mod):
        return formula(q, k, v, None, mask_mod, None, 0.0, True, True)

    ours = run(functools.partial(flashfuse.attention, return_lse=True, return_max_scores=True), torch.float32)
    for found in zip(ours, run(plain, torch.float32), run(plain, torch.float64), strict=True):
        assert_equal_under_rule(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_more_is_returned(dtype):
    q, k, v = (t.detach() for t in qkv(dtype=dtype))
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    for lse, maximum in ((True, False), (False, True)):
        made = flashfuse.attention(q, k, v, return_lse=lse, return_max_scores=maximum)
        assert isinstance(made, flashfuse.AttentionOutput)
        assert torch.equal(made.out, flashfuse.attention(q, k, v)) or maximum
        assert (made.lse is not None, made.max_scores is not None) == (lse, maximum)
        found = made.lse if lse else made.max_scores
        assert found.shape == (2, 4, 70) and found.dtype == rows
    half = flashfuse.attention(q, k, v, lambda s, b, h, q, kv: s.to(dtype), return_lse=True)
    assert half.lse.dtype == rows


def test_parts_of_the_keys_merge():
    """As in attention over several devices, each of which has some of the keys."""
    q, k, v = qkv(kv_heads=4)

    def merged(q, k, v):
        halves = [slice(0, 30), slice(30, None)]
        parts = [flashfuse.attention(q, k[:, :, h], v[:, :, h], return_lse=True) for h in halves]
        total = torch.logaddexp(parts[0].lse, parts[1].lse)
        return sum(p.out * (p.lse - total).exp()[..., None] for p in parts)

    def results(run, dtype):
        own = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = run(*own)
        return [out, *torch.autograd.grad(out.square().sum(), own)]

    def whole(q, k, v):
        return formula(q, k, v, None, None, None, 0.0)

    rows = [results(merged, torch.float32), results(whole, torch.float32), results(whole, torch.float64)]
    for found in zip(*rows, strict=True):
        assert_equal_under_rule(*found)


def test_lse_is_that_before_dropout():
    q, k, v = (t.detach() for t in qkv())
    both = functools.partial(flashfuse.attention, return_lse=True, return_max_scores=True)
    for dropped, plain in zip(both(q, k, v, dropout_p=0.4)[1:], both(q, k, v)[1:], strict=True):
        torch.testing.assert_close(dropped, plain)


def test_lse_of_finite_minima_is_not_minus_infinity():
    least = torch.finfo(torch.float32).min
    masked = lambda s, b, h, q, kv: torch.where(kv < q, s, least)  # noqa: E731
    assert flashfuse.attention(*qkv(), masked).shape == (2, 4, 70, 24)
    with pytest.raises(flashfuse.NotFusible, match=r"finite minima.*mask_mod"):
        flashfuse.attention(*qkv(), masked, return_lse=True)


def test_dropout_follows_the_seed():
    q, k, v = qkv()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(flashfuse.attention(q, k, v, dropout_p=0.4))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    ones = flashfuse.attention(q, k, torch.ones_like(v), dropout_p=0.4)
    assert abs(ones.mean() - 1) < 0.05 and ones.std() > 0.01


@pytest.mark.parametrize("more", [{}, {"return_lse": True, "return_max_scores": True}])
def test_nothing_of_the_size_of_the_scores_is_made(more):
    q, k, v = (t.detach() for t in qkv(length=4096, heads=2))
    with torch.profiler.profile(profile_memory=True) as profile:
        flashfuse.attention(q, k, v, mask_mod=lambda b, h, q, kv: (kv <= q) & (kv > q - 100), **more)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 4096 * 4096


def test_closures_and_lengths_are_not_traced_again():
    def scaled(factor):
        return lambda s, b, h, q, kv: s * factor[h]

    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]
    before = None
    for i, length in enumerate((70, 60, 50, 40, 30)):
        factor = torch.rand(4)
        q, k, v = qkv(length=length)
        out = flashfuse.attention(q, k, v, scaled(factor))
        torch.testing.assert_close(out, formula(q, k, v, scaled(factor), None, None, 0.0))
        if i == 1:
            before = compilations["unique_graphs"]
    assert compilations["unique_graphs"] == before


def test_numbers_of_heads_may_change():
    for heads, kv_heads in ((4, 4), (4, 2), (6, 2), (2, 1)):
        q, k, v = qkv(heads, kv_heads)
        torch.testing.assert_close(flashfuse.attention(q, k, v), formula(q, k, v, None, None, None, 0.0))


def test_many_functions_do_not_end_fusion():
    q, k, v = qkv()
    for i in range(2 * torch._dynamo.config.recompile_limit):
        scope = {}
        exec(f"mod = lambda s, b, h, q, kv: s * {i + 1}", scope)
        out = flashfuse.attention(q, k, v, scope["mod"])
        torch.testing.assert_close(out, formula(q, k, v, scope["mod"], None, None, 0.0))


def test_in_a_compiled_function_it_is_a_site():
    def layer(x, w):
        q, k, v = (x @ w).view(2, 50, 3, 2, 8).permute(2, 0, 3, 1, 4)
        made = flashfuse.attention(
            q, k, v, mask_mod=lambda b, h, q, kv: kv <= q, return_lse=True, return_max_scores=True
        )
        return made.out * 2, made.lse + 1, made.max_scores.amax()

    x, w = torch.randn(2, 50, 16), torch.randn(16, 48) / 4
    flashfuse.clear_reports()
    out, lse, highest = torch.compile(layer, backend="flashfuse", options={"inner": "eager"})(x, w)
    (site,) = flashfuse.last_report().sites
    assert {"out", "lse", "max"} <= set(site.check.proof.compared)
    q, k, v = (x @ w).view(2, 50, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = formula(q, k, v, None, lambda b, h, q, kv: kv <= q, None, 0.0, True, True)
    torch.testing.assert_close((out / 2, lse - 1, highest), (*expected[:2], expected[2].amax()))


@pytest.mark.parametrize(
    ("score_mod", "said"),
    [
        (lambda s, b, h, q, kv: s.sort(-1).values, "elementwise"),
        (lambda s, b, h, q, kv: torch.zeros_like(s), "not a function of one product"),
        (lambda s, b, h, q, kv: s if s.sum() > 0 else -s, "could not be traced"),
    ],
)
def test_what_cannot_be_fused_is_said(score_mod, said):
    with pytest.raises(flashfuse.NotFusible, match=said):
        flashfuse.attention(*qkv(), score_mod)


@pytest.mark.parametrize(
    ("mods", "said"),
    [
        ({"score_mod": lambda s, b, h, q, kv: s + torch.zeros(3)}, "score_mod: expected one element"),
        ({"score_mod": lambda s, b, h, q, kv: 1.0}, "score_mod: expected a tensor of .*, got float"),
        ({"mask_mod": lambda b, h, q, kv: q - kv}, "mask_mod: expected a tensor of torch.bool, got"),
    ],
)
def test_mistakes_in_a_function_are_said(mods, said):
    with pytest.raises(ValueError, match=said):
        flashfuse.attention(*qkv(), **mods)


def test_errors_of_a_function_are_its_own():
    def forgets(score):
        return score

    with pytest.raises(TypeError, match="forgets"):
        flashfuse.attention(*qkv(), forgets)


@pytest.mark.parametrize("empty", [0, 2])
def test_nothing_to_attend_with_or_to(empty):
    sizes = [t.shape for t in qkv()]
    q, k, v = (
        torch.randn(*s[:2], 0 if (i == 0) == (empty == 0) else s[2], s[3]) for i, s in enumerate(sizes)
    )
    out, *rows = flashfuse.attention(q, k, v, return_lse=True, return_max_scores=True)
    assert out.shape == (2, 4, q.shape[2], 24) and (out == 0).all()
    assert all(t.shape == (2, 4, q.shape[2]) and (t == -math.inf).all() for t in rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q[0], k, v), "query: expected \\[batch, heads"),
        (lambda q, k, v: (q, k[..., :8], v), "key: expected head_dim 16"),
        (lambda q, k, v: (q, k, v[:, :, :5]), "value: expected \\[2, 2, 70\\]"),
        (lambda q, k, v: (q[:, :3], k, v), "divides 3"),
        (lambda q, k, v: (q, k.double(), v), "one dtype and device"),
    ],
)
def test_sizes_that_do_not_fit(change, said):
    with pytest.raises(ValueError, match=said):
        flashfuse.attention(*change(*qkv()))


def test_the_rate_of_dropout_is_a_rate():
    with pytest.raises(ValueError, match="0 ≤ p < 1"):
        flashfuse.attention(*qkv(), dropout_p=math.inf)
