"""A lowering that is wrong on purpose, in an unmodified Llama: caught by the default settings.

The lowering is broken from outside, by the ``broken`` fixture; the package has no switch for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import flashfuse
from flashfuse.numbers import compare
from flashfuse.passes.rewrite import Emitter

pytestmark = pytest.mark.usefixtures("one_thread")

OPERATOR = torch.ops.flashfuse.attention.default


def strictly_before(call: Any) -> None:
    """A causal mask without its diagonal."""
    assert "kv <= q" in call.args[7]
    call.args = (*call.args[:7], call.args[7].replace("kv <= q", "kv < q"), *call.args[8:])


def wrong_key_head(call: Any) -> None:
    """The key heads of a group in another order."""
    call.args = (call.args[0], call.args[1].graph.call_method("flip", (call.args[1], 1)), *call.args[2:])


def unscaled(call: Any) -> None:
    call.args = (*call.args[:7], "s" + call.args[7][call.args[7].index(" where") :], *call.args[8:])


@pytest.fixture(params=[strictly_before, wrong_key_head, unscaled])
def broken(request, monkeypatch):
    """Every emitted operator is changed by ``request.param``."""
    right = Emitter.site

    def wrong(self, *args):
        out = right(self, *args)
        call = next(n for n in reversed(self.graph.nodes) if n.target is OPERATOR)
        with self.graph.inserting_before(call):
            request.param(call)
        return out

    monkeypatch.setattr(Emitter, "site", wrong)


def llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, :5] = 0
    return transformers.LlamaForCausalLM(config).eval(), {
        "input_ids": torch.randint(0, 99, (2, 33)),
        "attention_mask": mask,
    }


def compiled_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    flashfuse.clear_reports()
    compiled = torch.compile(model, backend="flashfuse", options={"inner": "eager", **options})
    with torch.no_grad():
        return compiled(**inputs).logits


def test_the_default_settings_leave_what_is_wrong(broken):
    model, inputs = llama()
    expected = model(**inputs).logits
    found = compiled_logits(model, inputs)
    assert torch.equal(found, expected)
    report = flashfuse.last_report()
    assert [site.status for site in report.sites] == ["left"] * 3
    assert {r.code for site in report.sites for r in site.reasons} == {"proof_failed"}
    assert "differs, as do" in str(report) and "0 fused" in str(report)


def test_without_a_check_the_answer_is_wrong(broken):
    """Else the test above would prove nothing."""
    model, inputs = llama()
    found = compiled_logits(model, inputs, verify="off")
    assert flashfuse.last_report().num_fused == 3
    with torch.no_grad():
        original, exact = model(**inputs).logits, model.double()(**inputs).logits
    # Rows of padding are masked with another minimum in float64; the second sequence has none.
    assert not compare("logits", found[1], original[1], exact[1]).ok


def test_a_right_lowering_is_proved():
    model, inputs = llama()
    compiled_logits(model, inputs)
    report = flashfuse.last_report()
    assert [site.status for site in report.sites] == ["fused"] * 3
    assert all(site.check is not None and site.check.proof is not None for site in report.sites)
    assert all(site.check.proof.ok for site in report.sites)
    assert "3 fused, 3 proved" in str(report)
