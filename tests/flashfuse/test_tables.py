"""Models with biases of positions and bias tables: fused, no bias matrix left, gradients as exact."""

from __future__ import annotations

import pytest
import torch
from tolerance import holds
from torch import nn

import flashfuse
from flashfuse import pipeline
from flashfuse.options import Options
from flashfuse.passes import nodes

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SEQ = 2, 19
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "num_hidden_layers": 1,
}


def text() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def mpnet() -> nn.Module:
    return transformers.MPNetModel(transformers.MPNetConfig(**SMALL))


def deberta() -> nn.Module:
    config = transformers.DebertaV2Config(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", max_position_embeddings=64, position_biased_input=False, **SMALL,
    )  # fmt: skip
    return transformers.DebertaV2Model(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.SwinModel(config)


def program_of(build, inputs) -> tuple[list[torch.Tensor], list[str]]:
    """Tensors of the rewritten graphs, and the programs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    found: list[torch.Tensor] = []
    programs: list[str] = []

    def collect(gm, example_inputs):
        new, report = pipeline.run(gm, Options(verify="off"))
        assert report.num_fused == report.num_sites
        found.extend(t for t in map(nodes.tensor, new.graph.nodes) if t is not None and t.ndim >= 2)
        programs.extend(site.program for site in report.sites)
        return gm

    torch.compile(build().eval(), backend=collect)(**inputs())
    return found, programs


@pytest.mark.parametrize(("build", "inputs"), [(mpnet, text), (deberta, text), (swin, image)])
def test_equal_with_gradients(build, inputs):
    def check(seed):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        check = flashfuse.verify(build().eval(), **inputs(), backward=True)
        assert check.ok, str(check)

    holds(check)


def test_a_bias_of_distances_is_a_table():
    tensors, (program,) = program_of(mpnet, text)
    assert "kv + 18 - q" in program
    assert not [t for t in tensors if set(t.shape[-2:]) == {SEQ} or tuple(t.shape[:2]) == (SEQ, SEQ)]


def test_products_with_positions_are_read_where_the_distance_says():
    tensors, (program,) = program_of(deberta, text)
    assert program.count("kv + 18 - q") == 2
    assert not [t for t in tensors if t.dtype.is_floating_point and set(t.shape[-2:]) == {SEQ}]


def test_a_table_is_read_by_the_stored_index():
    tensors, programs = program_of(swin, image)
    assert all("relative_position_bias_table[" in program for program in programs)
    assert not [t for t in tensors if t.shape[-3:] in ((2, 16, 16), (4, 16, 16), (16, 16, 2), (16, 16, 4))]


def test_the_report_names_matrices():
    def attend(q, k, v, bias, mask):
        built = (bias @ bias.mT).tanh()
        return torch.softmax(q @ k.mT + built + mask[None, None], -1) @ v

    q, k, v = torch.randn(3, 2, 4, SEQ, 16).unbind(0)
    report = flashfuse.explain(attend, q, k, v, torch.randn(4, SEQ, 8), torch.randn(SEQ, SEQ))
    (site,) = report.sites
    assert len(site.loads_full) == 1
    assert len(site.given_full) == 1
    assert "loaded for every query and key" in str(report)
