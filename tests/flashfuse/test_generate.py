"""``model.generate()`` with a compiled forward: every site of every step fused, and the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import flashfuse

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, **TOKENS,
}  # fmt: skip
WINDOW = 6
"""Shorter than the prompt: one-token steps shift the cache."""


def llama(layers=1):
    return transformers.LlamaConfig(num_hidden_layers=layers, **DECODER)


def mistral():
    return transformers.MistralConfig(num_hidden_layers=1, sliding_window=WINDOW, **DECODER)


def gemma2():
    """A layer with a window and one without."""
    return transformers.Gemma2Config(
        num_hidden_layers=2, sliding_window=WINDOW, head_dim=8, query_pre_attn_scalar=8, **DECODER
    )


def gpt2():
    return transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, **TOKENS)


def t5():
    return transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, **TOKENS
    )


def bart():
    return transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
        decoder_start_token_id=2, forced_eos_token_id=None, **TOKENS,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model and one way to generate.

    Attributes:
        sites: of each graph: the prompt, a step of known length and one of any length for a cache that
            grows; the prompt and a step for a static one.
        mask: text that is in the mask of every site of the last graph.
        recompiles: count the graphs without the passes as well, which takes its time.
        tokens: 2 for no step of any length.
        inner: the lowering.
    """

    config: Any
    sites: tuple[int, ...]
    attention: str = "sdpa"
    padded: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mask: str = ""
    recompiles: bool = False
    tokens: int = 4
    inner: str = "eager"

    def __str__(self) -> str:
        pad = "padded" if self.padded else "whole"
        return "-".join((self.config.__name__, self.attention, pad, *map(str, self.arguments.values())))


STATIC = {"cache_implementation": "static"}
CASES = [
    Case(llama, (1, 1, 1), mask="attention_mask[b, kv]", recompiles=True),
    Case(llama, (1, 1, 1), "eager", padded=False),
    # A static cache is written to inside the graph, which AOTAutograd has to see.
    Case(llama, (1, 1), arguments=STATIC, inner="aot_eager"),
    Case(llama, (1, 1), arguments={"num_beams": 2}, tokens=2),
    Case(mistral, (1, 1, 1)),
    Case(mistral, (1, 1), arguments=STATIC),
    Case(gemma2, (2, 2), "eager", arguments=STATIC),
    Case(gpt2, (1, 1, 1)),
    Case(t5, (2, 2, 2)),
    Case(bart, (2, 2), arguments=STATIC),
]


def model_of(case: Case):
    torch.manual_seed(0)
    config = case.config()
    seq2seq = config.is_encoder_decoder
    cls = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return cls.from_config(config, attn_implementation=case.attention).eval()


def prompts(padded: bool) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, :3] = mask[0, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generated(model, case: Case, compiler=None) -> tuple[torch.Tensor, int]:
    """Tokens and the number of graphs that were compiled."""
    torch._dynamo.reset()
    model, graphs = copy.deepcopy(model), []

    def backend(gm, inputs):
        graphs.append(gm)
        return compiler(gm, inputs)

    if compiler is not None:
        model.forward = torch.compile(model.forward, backend=backend)
    with torch.no_grad():
        # disable_compile: generate() would compile the steps of a static cache itself.
        tokens = model.generate(
            **prompts(case.padded), **case.arguments, max_new_tokens=case.tokens, do_sample=False,
            disable_compile=True,
        )  # fmt: skip
    return tokens, len(graphs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_sites_and_recompiles(case):
    model = model_of(case)
    tokens, _ = generated(model, case)
    flashfuse.clear_reports()
    backend = torch._dynamo.lookup_backend("flashfuse")
    options = {"inner": case.inner}
    ours, graphs = generated(model, case, lambda gm, inputs: backend(gm, inputs, options=options))
    assert torch.equal(ours, tokens)
    assert graphs == len(case.sites)
    if case.recompiles:
        assert graphs <= generated(model, case, lambda gm, inputs: gm)[1]
    reports = flashfuse.reports()
    reasons = [r for report in reports for site in report.sites for r in site.reasons]
    assert not reasons
    assert tuple(r.num_fused for r in reports) == case.sites
    assert all(site.check.proof is not None for r in reports for site in r.sites)
    assert all(site.shape.q_len == 1 and case.mask in site.mask for site in reports[-1].sites)
