"""Models with learned sinks, end to end: every site fused, in inference and in training."""

import pytest
import torch

import flashfuse

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**fields):
    config = transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=50, num_local_experts=2,
        num_experts_per_tok=1, sliding_window=5, max_position_embeddings=64,
        attn_implementation="eager", use_cache=False, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def padded():
    ids = torch.randint(1, 50, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("train", [False, True])
def test_all_sites_of_a_model_are_fused_and_equal(train):
    model = tiny().train(train)
    check = flashfuse.verify(model, backward=train, **padded())
    assert check.ok, str(check)
    report = flashfuse.explain(model, **padded())
    assert [site.status for site in report.sites] == ["fused", "fused"]
    assert all(" sink " in site.program for site in report.sites)
    assert any("kv > q - 5" in site.program for site in report.sites)


def test_the_gradient_of_the_sinks():
    check = flashfuse.verify(tiny().eval(), backward=True, **padded())
    gradients = [item for item in check.items if item.name.startswith("d") and item.name.endswith("sinks")]
    assert len(gradients) == 2
    # One without any rounding would be zeros.
    assert all(item.ok and item.error_original > 0 for item in gradients), gradients
