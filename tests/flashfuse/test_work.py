"""What the passes do once for many layers: counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import flashfuse
from flashfuse import hf
from flashfuse.kernels import expr as E
from flashfuse.passes import condense
from flashfuse.proof import prove

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


def t5(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.T5Config(
        num_layers=layers, d_model=32, d_kv=8, num_heads=4, d_ff=32, vocab_size=100, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return transformers.T5Model(config).eval(), inputs


def gpt2(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=32, n_head=4, vocab_size=100, use_cache=False, attn_implementation="eager"
    )
    return transformers.GPT2Model(config).eval(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def counted(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> Counter[str]:
    """Counts the calls of these functions from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in functions:
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    return calls


@pytest.mark.parametrize(
    ("make", "sites_of_a_layer", "proofs", "searches"),
    # T5's encoder, decoder and cross attention differ, and the first layer of its encoder from the others.
    [(t5, 3, 4, True), (gpt2, 1, 1, False)],
    ids=["t5", "gpt2"],
)
def test_layers_share_proofs_and_tables(
    monkeypatch: pytest.MonkeyPatch, make: Any, sites_of_a_layer: int, proofs: int, searches: bool
) -> None:
    found = []
    for layers in (3, 6):
        with monkeypatch.context() as patched:
            calls = counted(patched, (prove, "prove_site"), (condense, "searched"))
            model, inputs = make(layers)
            with torch.no_grad():
                report = flashfuse.explain(model, **inputs)
        assert report.num_fused == report.num_sites == layers * sites_of_a_layer
        found.append((calls["prove_site"], calls["searched"]))
    assert found[0] == found[1], "as many proofs and searches for 6 layers as for 3"
    assert found[0][0] == proofs
    assert bool(found[0][1]) == searches


def test_equal_expressions_are_one_object_and_zeros_differ_by_sign() -> None:
    assert E.add(E.Q, E.KV, E.const(2)) is E.add(E.KV, E.const(2), E.Q)
    distinct = [E.const(c) for c in (True, 1, 1.0, 0, 0.0, -0.0, False)]
    assert len(set(distinct)) == len(distinct)
    assert str(E.const(-0.0)) == "-0.0"


def test_expressions_outlive_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    before = E.compare("<=", E.KV, E.add(E.Q, E.const(12345)))
    E._KNOWN.clear()
    again = E.parse("kv <= q + 12345")
    assert again == before and hash(again) == hash(before)
    assert E.contains(again, E.Q) and E.variables(again) == {"q", "kv"}


@pytest.mark.parametrize("kind", ["swin", "cvt", "pvt_v2"])
def test_stages_of_a_tiny_model_have_few_layers(kind: str) -> None:
    config, _, _ = hf._find(kind)
    hf._set_layers(config, 2)
    assert max(config.depth if kind == "cvt" else config.depths) == 2
