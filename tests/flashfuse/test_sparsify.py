"""Approximate attention: only when asked for, what the pattern says and nothing else, and reported."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tolerance import assert_equal_under_rule
from torch import nn

import flashfuse
from flashfuse import BlockMask, Butterfly, LocalGlobal
from flashfuse.kernels.reference import evaluate
from flashfuse.passes import patterns

pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SMALL = 16


def kept(pattern, q_len, kv_len, heads=1):
    """[B or 1, H, Sq, Skv]: the pattern by its words, for queries that stand at the end."""
    q = (torch.arange(q_len) + kv_len - q_len)[:, None]
    kv = torch.arange(kv_len)[None]
    if isinstance(pattern, str):
        return eval(f"({pattern})".replace(" or ", ")|("), {"q": q, "kv": kv, "abs": abs})[None, None]
    i, j = q // pattern.block, kv // pattern.block
    if isinstance(pattern, BlockMask):
        keep = pattern.keep
        return keep.view((1,) * (4 - keep.ndim) + keep.shape)[:, :, i, j]
    if isinstance(pattern, Butterfly):
        found = torch.tensor([[(a ^ b).bit_count() <= 1 for b in j[0].tolist()] for a in i[:, 0].tolist()])
    else:
        found = ((i - j).abs() <= pattern.local) | (i < pattern.global_) | (j < pattern.global_)
        if pattern.stride:
            found = found | ((i - j) % pattern.stride == 0)
    return found[None, None]


def attended(q, k, v, allowed):
    """Softmax attention with 0 in rows without a key."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return torch.where(allowed.any(-1, keepdim=True), scores, 0).softmax(-1).masked_fill(~allowed, 0) @ v


def causal(q, k, v):
    last = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.arange(k.shape[2]) > last, -math.inf).softmax(-1) @ v


def plain(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v)


def random(q_len=100, kv_len=100, heads=4, kv_heads=4):
    g = torch.Generator().manual_seed(0)
    sizes = ((2, heads, q_len, 8), (2, kv_heads, kv_len, 8), (2, kv_heads, kv_len, 8))
    return [torch.randn(s, generator=g, requires_grad=True) for s in sizes]


def compiled(run, pattern, **options):
    torch._dynamo.reset()
    flashfuse.clear_reports()
    options = {"inner": "aot_eager", **options}
    return flashfuse.sparsify(run, pattern, dynamic=options.pop("dynamic", False), **options)


def site():
    (found,) = [s for report in flashfuse.reports() for s in report.sites]
    return found


def with_grads(run, inputs):
    out = run(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def assert_masked(run, inputs, allowed):
    """Outputs and gradients of ``run`` are those of attention under ``allowed``."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    results = zip(
        with_grads(run, inputs),
        with_grads(lambda *x: attended(*x, allowed), inputs),
        with_grads(lambda *x: attended(*x, allowed), doubles),
        strict=True,
    )
    for name, (ours, original, exact) in zip(("out", "dq", "dk", "dv"), results, strict=True):
        assert_equal_under_rule(ours, original, exact, name)


def random_mask(*lead, blocks=7, share=0.5, seed=0):
    return torch.rand(*lead, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < share


PATTERNS = [
    Butterfly(SMALL),
    LocalGlobal(1, 1, block=SMALL),
    LocalGlobal(0, 0, stride=3, block=SMALL),
    "abs(q//16 - kv//16) <= 1 or kv < 20",
    BlockMask(random_mask(), SMALL),
    BlockMask(random_mask(4), SMALL),
    BlockMask(random_mask(2, 4), SMALL),
    BlockMask(random_mask(2, 1, blocks=9), SMALL),
]


@pytest.mark.parametrize(
    ("pattern", "model"),
    [*((p, causal) for p in PATTERNS), (PATTERNS[0], plain), (PATTERNS[-2], plain)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_out_and_gradients_are_those_under_the_pattern(pattern, model):
    allowed = kept(pattern, 100, 100)
    if model is causal:
        allowed = allowed & torch.ones(100, 100, dtype=torch.bool).tril()
    assert_masked(compiled(model, pattern, verify="full"), random(), allowed)
    report = site()
    assert report.status == "fused" and report.check.ok and report.check.proof is not None
    assert any(item.name.endswith("under the pattern") for item in report.check.items)
    assert abs(report.approximation.density - allowed.double().mean()) < 1e-6
    assert abs(report.approximation.exact_density - (0.505 if model is causal else 1)) < 1e-6


def test_nothing_is_approximate_unless_asked_for():
    torch._dynamo.reset()
    flashfuse.clear_reports()
    torch.compile(causal, backend="flashfuse", options={"inner": "aot_eager"})(*random())
    assert site().approximation is None and site().mask == "kv <= q"
    assert flashfuse.last_report().num_approximate == 0 and "APPROX" not in str(flashfuse.last_report())


def test_the_report_says_what_is_approximate():
    compiled(causal, Butterfly(SMALL))(*random())
    report = flashfuse.last_report()
    assert report.num_approximate == report.num_fused == report.num_proved == 1
    text = str(report)
    assert "1 site is APPROXIMATE, as asked for" in text and "butterfly of blocks of 16" in text
    assert "where the exact mask keeps 50.5%" in text and "exact site" in text
    (found,) = json.loads(report.to_json())["sites"]
    assert found["approximation"]["pattern"] == "butterfly of blocks of 16"
    assert found["mask"].startswith("kv <= q and ")


def test_grouped_heads_have_masks_of_their_own():
    inputs, pattern = random(heads=6, kv_heads=2), BlockMask(random_mask(6), SMALL)
    allowed = kept(pattern, 100, 100) & torch.ones(100, 100, dtype=torch.bool).tril()
    assert_masked(compiled(causal, pattern), inputs, allowed)


def test_masks_change_between_calls_without_a_compilation():
    inputs, pattern = random(), BlockMask(random_mask(4), SMALL)
    run = compiled(causal, pattern)
    tril = torch.ones(100, 100, dtype=torch.bool).tril()
    for seed in range(3):
        pattern.update(random_mask(4, seed=seed))
        assert_masked(run, inputs, kept(pattern, 100, 100) & tril)
    assert len(flashfuse.reports()) == 1


def test_inductor_reads_the_mask_at_each_call():
    inputs, pattern = [x.detach() for x in random()], BlockMask(random_mask(4), SMALL)
    run = compiled(plain, pattern, inner="inductor")
    for seed in range(2):
        pattern.update(random_mask(4, seed=seed))
        ours, allowed = run(*inputs), kept(pattern, 100, 100)
        exact = attended(*(x.double() for x in inputs), allowed)
        assert_equal_under_rule(ours, attended(*inputs, allowed), exact)
    assert len(flashfuse.reports()) == 1


def test_a_mask_that_changed_before_the_backward_is_an_error():
    inputs, pattern = random(), BlockMask(random_mask(), SMALL)
    out = compiled(plain, pattern)(*inputs)
    pattern.update(random_mask(seed=5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- where queries stand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [Butterfly(SMALL), LocalGlobal(block=SMALL), BlockMask(random_mask(), SMALL)], ids=str
)
@pytest.mark.parametrize("q_len", [1, 9])
def test_queries_with_a_cache_stand_at_the_end(q_len, pattern):
    q, k, v = random(q_len=q_len)

    def step(q, old_k, new_k, old_v, new_v):
        return causal(q, torch.cat((old_k, new_k), 2), torch.cat((old_v, new_v), 2))

    def run(q, k, v):
        past = 100 - q_len
        return compiled_step(q, k[:, :, :past], k[:, :, past:], v[:, :, :past], v[:, :, past:])

    compiled_step = compiled(step, pattern)
    last = torch.arange(100 - q_len, 100)[:, None]
    assert_masked(run, [q, k, v], kept(pattern, q_len, 100) & (torch.arange(100) <= last))
    assert site().approximation is not None


def test_a_static_cache_says_where_queries_stand():
    q, k, v = random(q_len=3)

    def step(q, k, v, place):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return scores.masked_fill(torch.arange(k.shape[2]) > place[:, None], -math.inf).softmax(-1) @ v

    for pattern in (LocalGlobal(0, 1, block=SMALL), BlockMask(random_mask(4), SMALL)):
        run = compiled(step, pattern)
        place = torch.tensor([40, 41, 42])
        whole = kept(pattern, 100, 100)[:, :, place]
        assert_masked(
            lambda *x, run=run, place=place: run(*x, place),
            [q, k, v],
            whole & (torch.arange(100) <= place[:, None]),
        )
        assert site().approximation is not None


def test_cross_attention_stays_exact_unless_chosen():
    q, k, v = random(q_len=40)
    torch.testing.assert_close(compiled(plain, LocalGlobal(block=SMALL))(q, k, v), plain(q, k, v))
    assert site().approximation is None and "not approximated" in " ".join(site().notes)
    pattern = "kv < 50 or kv > q"
    assert_masked(
        compiled(plain, lambda shape: pattern if shape.kv_len == 100 else None),
        [q, k, v],
        kept(pattern, 40, 100),
    )
    assert site().approximation is not None


def test_a_choice_for_each_site():
    def two(q, k, v):
        return causal(causal(q, k, v), k[:, :, :, :4].repeat(1, 1, 1, 2), v)

    seen = []

    def choose(shape):
        seen.append(shape)
        return Butterfly(SMALL) if len(seen) == 1 else None

    compiled(two, choose)(*random())
    first, second = flashfuse.last_report().sites
    assert first.approximation is not None and second.approximation is None
    assert "not approximated: as chosen" in second.notes and seen[0].q_len == 100


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (BlockMask(random_mask(blocks=6), SMALL), "covers 96 positions, the site has 100"),
        (BlockMask(random_mask(3), SMALL), "for 3 heads, the site has 4"),
        (BlockMask(random_mask(3, 4), SMALL), "for 3 batch entries, the site has 2"),
        ("kv >= 0 or q == 3 or True", "keeps every key"),
        ("kv > q", "keeps no key that the mask allows"),
    ],
    ids=str,
)
def test_what_does_not_fit_stays_exact(pattern, why):
    inputs = random()
    torch.testing.assert_close(compiled(causal, pattern)(*inputs), causal(*inputs))
    assert site().approximation is None and why in site().notes[-1]
    assert "APPROX" not in str(flashfuse.last_report())


def test_symbolic_lengths():
    inputs = [x.detach() for x in random()]
    run = compiled(causal, Butterfly(SMALL), dynamic=True)
    for n in (100, 90, 33):
        cut = [x[:, :, :n].contiguous() for x in inputs]
        allowed = kept(Butterfly(SMALL), n, n) & torch.ones(n, n, dtype=torch.bool).tril()
        torch.testing.assert_close(run(*cut), attended(*cut, allowed))
    sites = [s for report in flashfuse.reports() for s in report.sites]
    assert len(sites) < 3 and all(s.approximation.density is None for s in sites)
    torch.testing.assert_close(
        compiled(causal, BlockMask(random_mask(), SMALL), dynamic=True)(*inputs), causal(*inputs)
    )
    assert "symbolic" in site().notes[-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Butterfly(48), "16, 32, 64 or a multiple of 128, got 48"),
        (lambda: LocalGlobal(local=-1), "expected local to be"),
        (lambda: BlockMask(torch.ones(3, 3)), "torch.bool, got torch.float32"),
        (lambda: BlockMask(torch.ones(3, dtype=torch.bool)), r"expected keep of shape .* got \[3\]"),
        (lambda: BlockMask(random_mask()).update(random_mask(4)), r"expected keep of shape \[7, 7\]"),
        (lambda: BlockMask(random_mask()) | BlockMask(random_mask()), "at most one BlockMask"),
        (lambda: flashfuse.sparsify(causal, "kv <"), "expected a score expression"),
        (lambda: flashfuse.sparsify(causal, "kv - q"), "true where a key is kept"),
        (lambda: flashfuse.sparsify(causal, "kv < n"), "got 'n'"),
        (lambda: flashfuse.sparsify(causal, "pad[b, kv]"), "got 'pad'"),
        (lambda: flashfuse.sparsify(causal, "s > 0"), "got 's'"),
        (lambda: flashfuse.sparsify(causal, "kv < 3 and kv > 4 and False"), "keeps a key"),
        (lambda: flashfuse.sparsify(causal, random_mask()), "goes into flashfuse.BlockMask"),
        (lambda: flashfuse.sparsify(causal, 0.5), "got float"),
        (lambda: flashfuse.sparsify(causal, None), "got None"),
        (lambda: flashfuse.sparsify(causal, "kv < 3", sparse=1), "unknown option 'sparse'"),
    ],
)  # fmt: skip
def test_mistakes_are_raised_at_once(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_butterfly_is_a_step_of_a_power_of_two(count):
    position = torch.arange(count) * SMALL + 3
    env = {"q": position[:, None], "kv": position[None]}
    made = torch.as_tensor(evaluate(patterns.Butterfly(SMALL).condition(), env))
    wanted = torch.tensor([[(i ^ j).bit_count() <= 1 for j in range(count)] for i in range(count)])
    assert torch.equal(made, wanted)


def test_joined_patterns_keep_what_one_of_them_keeps():
    mask = BlockMask(random_mask(), SMALL)
    joined = Butterfly(SMALL) | LocalGlobal(0, 1, block=SMALL) | mask
    allowed = (
        kept(Butterfly(SMALL), 100, 100)
        | kept(LocalGlobal(0, 1, block=SMALL), 100, 100)
        | kept(mask, 100, 100)
    )
    assert_masked(compiled(plain, joined), random(), allowed)


# --- models -------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")


def gpt2(**config):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=128, use_cache=False, bos_token_id=0,
        eos_token_id=0, attn_implementation="eager", **config,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertModel(config).train()


def tokens(padded=False):
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (gpt2, Butterfly(SMALL)),
        (llama, BlockMask(random_mask(4, blocks=5), SMALL)),
        (bert, LocalGlobal(0, 1, stride=3, block=SMALL)),
    ],
)  # fmt: skip
def test_models_are_verified_against_the_masked_reference(make, pattern):
    torch._dynamo.reset()
    padded = make is not gpt2
    verify = "proof" if make is llama else "full"
    check = flashfuse.verify(make(), options={"sparsity": pattern, "verify": verify}, **tokens(padded))
    assert check.ok and check.sites and all(s.approximation is not None for s in check.sites), str(check)
    assert any("by definition under the same pattern" in note for note in check.notes)
    assert "APPROXIMATE" in str(check)


def test_weights_that_a_model_returns_are_those_under_the_pattern():
    torch._dynamo.reset()
    pattern = LocalGlobal(0, 1, block=SMALL)
    model, given = bert().eval(), {**tokens(padded=True), "output_attentions": True}
    assert flashfuse.verify(model, backward=False, options={"sparsity": pattern}, **given).ok
    weights = compiled(model, pattern)(**given).attentions[0]
    assert not (weights[1] * ~kept(pattern, 70, 70)[0]).any() and site().approximation is not None


def test_verify_sees_kernels_that_ignore_the_pattern(monkeypatch):
    from flashfuse.kernels import cpu

    run = cpu.forward

    def exact(q, k, v, captures, ints, maps, seed, program, dropout_p):
        return run(q, k, v, (), (), maps, seed, type(program).parse("s*0.35 where kv <= q"), dropout_p)

    torch._dynamo.reset()
    monkeypatch.setattr(cpu, "forward", exact)
    assert not flashfuse.verify(gpt2(), backward=False, options={"sparsity": Butterfly(SMALL)}, **tokens()).ok


def step(model, run):
    torch.manual_seed(3)
    out = run(**tokens()).logits
    return [out.detach(), *torch.autograd.grad(out.square().mean(), list(model.parameters()))]


def test_training_with_dropout_and_checkpointing_gives_the_gradients_of_the_same_step():
    """A layer run again draws the same dropout and reads the same mask."""
    pattern = BlockMask(random_mask(2, blocks=5) | torch.eye(5, dtype=torch.bool), SMALL)
    model = gpt2(attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0)
    straight = step(model, compiled(model, pattern))
    model.gradient_checkpointing_enable()
    again = step(model, compiled(model, pattern))
    assert flashfuse.last_report().num_approximate == 1
    for a, b in zip(straight, again, strict=True):
        torch.testing.assert_close(a, b)


def test_training_lowers_the_loss_while_masks_change():
    model, pattern = gpt2(attn_pdrop=0.1), BlockMask(torch.ones(2, 5, 5, dtype=torch.bool), SMALL)
    run, optimizer = compiled(model, pattern), torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for seed in range(5):
        loss = run(**tokens(), labels=tokens()["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        pattern.update(random_mask(2, blocks=5, seed=seed) | torch.eye(5, dtype=torch.bool))
    assert losses[-1] < losses[0] and sum(r.num_approximate for r in flashfuse.reports()) == 1
