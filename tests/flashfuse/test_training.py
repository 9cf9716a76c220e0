"""A training step of an unmodified model: activation checkpointing and autocast, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch

import flashfuse
from flashfuse.numbers import compare

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def model(attention="sdpa"):
    """Its rotated queries and keys are float32 under autocast, its values bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def inputs():
    tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def step(run, owner):
    """The logits, and the gradient of every parameter."""
    logits = run(**inputs()).logits
    return [logits.detach(), *torch.autograd.grad(logits.float().square().mean(), list(owner.parameters()))]


def in_float64(owner):
    exact = copy.deepcopy(owner).double()
    return step(exact, exact)


def compiled(run):
    torch._dynamo.reset()
    flashfuse.clear_reports()
    return torch.compile(run, backend="flashfuse", options={"inner": "aot_eager"})


def assert_same(ours, original, exact):
    for i, (a, b, x) in enumerate(zip(ours, original, exact, strict=True)):
        item = compare(str(i), a, b, x)
        assert item.ok, item


def the_site():
    (site,) = [site for report in flashfuse.reports() for site in report.sites]
    assert not site.reasons and site.check.proof is not None
    return site


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradient_checkpointing(attention):
    """The mask is made outside the part that is run again, and lifted nevertheless."""
    owner = model(attention)
    owner.gradient_checkpointing_enable()
    assert_same(step(compiled(owner), owner), step(owner, owner), in_float64(owner))
    assert the_site().status == "fused" and the_site().mask == "kv <= q and attention_mask[b, kv]"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("around", [True, False], ids=["outside", "inside"])
def test_autocast(around, attention):
    owner = model(attention)

    def inside(**given):
        with torch.autocast("cpu", torch.bfloat16):
            return owner(**given)

    def outside(run):
        def call(**given):
            with torch.autocast("cpu", torch.bfloat16):
                return run(**given)

        return call

    fast = outside(compiled(owner)) if around else compiled(inside)
    assert_same(step(fast, owner), step(inside, owner), in_float64(owner))
    # Eager attention mixes float32 weights and bfloat16 values, and may be computed in the wider dtype.
    assert the_site().shape.dtype == torch.bfloat16 or attention == "eager"
