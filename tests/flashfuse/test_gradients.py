"""What a model has learned about positions: its own parameters get the gradients that float64 says.

Tables of distances, products with positions, sinks, temperatures and biases made of the input, in
unmodified models.  Every site is fused and proved, and no tensor of [.., Sq, Skv] is left in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from flashfuse import pipeline
from flashfuse.api import _each_graph
from flashfuse.numbers import check_graph
from flashfuse.options import Options
from flashfuse.passes import nodes
from flashfuse.report import CheckItem, SiteReport

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("error::flashfuse.FlashFuseWarning"),
    pytest.mark.usefixtures("one_thread"),
]

BATCH, SEQ, DECODER_SEQ = 2, 19, 11
"""Lengths that are no other size of the models, so that a [.., Sq, Skv] tensor is seen by its shape."""

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT = {"vocab_size": 100, "attn_implementation": "eager", **SMALL}
SPEECH = {
    "conv_dim": (8,), "conv_kernel": (8,), "conv_stride": (8,), "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    "layerdrop": 0.0, "vocab_size": 32, "attn_implementation": "eager", **SMALL,
}  # fmt: skip


OF_KEYS = ("key.bias", "k_proj.bias", "linear_k.bias")
"""Adds the same to every score of a row, so its gradient is 0, and any two roundings of that differ."""


def text(seq: int = SEQ) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (BATCH, seq), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(BATCH, seq, dtype=torch.long)
    mask[0, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text_to_text() -> dict[str, Tensor]:
    return text() | {"decoder_input_ids": text(DECODER_SEQ)["input_ids"]}


def image(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "pixel_values": torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    }


def speech() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 8 * SEQ, generator=torch.Generator().manual_seed(0))}


def document() -> dict[str, Tensor]:
    boxes = torch.randint(0, 500, (BATCH, SEQ, 4), generator=torch.Generator().manual_seed(0))
    boxes[..., 2:] += boxes[..., :2]
    return text() | {"bbox": boxes}


def t5() -> nn.Module:
    config = transformers.T5Config(
        num_layers=1, d_model=32, d_kv=8, num_heads=4, d_ff=32, vocab_size=100, attn_implementation="eager"
    )
    return transformers.T5Model(config)


def mpnet() -> nn.Module:
    return transformers.MPNetModel(transformers.MPNetConfig(**TEXT))


def deberta_v2() -> nn.Module:
    config = transformers.DebertaV2Config(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=False,
        norm_rel_ebd="layer_norm", max_position_embeddings=64, position_biased_input=False, **TEXT,
    )  # fmt: skip
    return transformers.DebertaV2Model(config)


def xlnet() -> nn.Module:
    config = transformers.XLNetConfig(
        d_model=32, n_head=4, d_inner=32, n_layer=1, vocab_size=100, attn_implementation="eager"
    )
    return transformers.XLNetModel(config)


def bloom() -> nn.Module:
    config = transformers.BloomConfig(
        hidden_size=32, n_head=4, n_layer=1, vocab_size=100, attn_implementation="eager"
    )
    return transformers.BloomModel(config)


def falcon() -> nn.Module:
    return transformers.FalconModel(transformers.FalconConfig(alibi=True, **TEXT))


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=5, **TEXT)
    return transformers.Gemma2Model(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5,
        max_position_embeddings=64, use_cache=False, **TEXT,
    )  # fmt: skip
    return transformers.GptOssModel(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=12, patch_size=1, embed_dim=16, depths=[2], num_heads=[2], window_size=6,
        drop_path_rate=0.0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.SwinModel(config)


def swinv2() -> nn.Module:
    config = transformers.Swinv2Config(
        image_size=12, patch_size=1, embed_dim=16, depths=[2], num_heads=[2], window_size=6,
        drop_path_rate=0.0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Swinv2Model(config)


def beit() -> nn.Module:
    config = transformers.BeitConfig(
        image_size=12, patch_size=3, use_relative_position_bias=True, drop_path_rate=0.0,
        attn_implementation="eager", **SMALL,
    )  # fmt: skip
    return transformers.BeitModel(config)


def sam() -> nn.Module:
    config = transformers.SamVisionConfig(
        image_size=12, patch_size=2, output_channels=8, window_size=0, global_attn_indexes=[0],
        mlp_dim=32, attn_implementation="eager", **SMALL,
    )  # fmt: skip
    return transformers.SamVisionModel(config)


def conformer() -> nn.Module:
    config = transformers.Wav2Vec2ConformerConfig(
        position_embeddings_type="relative", conv_depthwise_kernel_size=3, **SPEECH
    )
    return transformers.Wav2Vec2ConformerModel(config)


def layoutlmv3() -> nn.Module:
    config = transformers.LayoutLMv3Config(
        visual_embed=False, coordinate_size=4, shape_size=8, max_2d_position_embeddings=1024, **TEXT
    )
    return transformers.LayoutLMv3Model(config)


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        learned: parameters that a fused score reads, by the ends of their names.
        sites: attention sites of one forward pass.
        of_pairs: captures that hold something for every query and key, for it depends on the input or is
            no closed form of the positions.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    learned: tuple[str, ...] = ()
    sites: int = 1
    of_pairs: tuple[str, ...] = ()


MODELS = [
    Model(t5, text_to_text, ("relative_attention_bias.weight",), 3),
    Model(swin, image(12), ("relative_position_bias_table",), 2),
    Model(deberta_v2, text, ("pos_key_proj.weight", "pos_query_proj.weight", "rel_embeddings.weight")),
    Model(gpt_oss, text, ("sinks",)),
    Model(beit, image(12), ("relative_position_bias_table",), of_pairs=("relative_position_index",)),
    Model(swinv2, image(12), ("logit_scale", "continuous_position_bias_mlp.0.weight"), 2),
    Model(sam, image(12), ("rel_pos_h", "rel_pos_w")),
    Model(conformer, speech, ("pos_bias_u", "pos_bias_v", "linear_pos.weight")),
    # Its biases are computed without a gradient, from the boxes and the words of the input.
    Model(layoutlmv3, document, of_pairs=("rel_pos", "rel_pos_x", "rel_pos_y")),
    Model(xlnet, text, ("r_w_bias", "r_r_bias", "rel_attn.r")),
    Model(mpnet, text, ("relative_attention_bias.weight",)),
    Model(bloom, text),
    Model(falcon, text),
    Model(gemma2, text),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.build.__name__)
def test_what_a_model_learned_about_positions(model: Model):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = model.build().train()
    for name, parameter in module.named_parameters():
        if name.endswith(model.learned):
            # Many start as zeros, beside which a wrong place would not be seen.
            nn.init.normal_(parameter, std=0.5)
    sites, items, rewritten = examined(module, model.inputs())
    assert len(sites) == model.sites
    assert not [reason for site in sites for reason in site.reasons]
    assert all(site.check is not None and site.check.proof is not None for site in sites)
    assert not [item for item in items if not item.ok and not item.name.endswith(OF_KEYS)]
    for name in model.learned:
        gradients = [item for item in items if item.name.startswith("d") and item.name.endswith(name)]
        assert gradients, name
        # A gradient without any rounding would be zeros.
        assert all(item.error_original > 0 for item in gradients), name
    assert {name for site in sites for name in site.loads_full} == set(model.of_pairs)
    assert model.of_pairs or not [matrix for gm in rewritten for matrix in matrices(gm, sites)]


def examined(
    model: nn.Module, inputs: dict[str, Any]
) -> tuple[list[SiteReport], list[CheckItem], list[fx.GraphModule]]:
    """The sites of ``model(**inputs)``, what ``flashfuse.verify`` compares, and the rewritten graphs."""
    sites: list[SiteReport] = []
    items: list[CheckItem] = []
    rewritten: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, given: Any) -> None:
        new, report = pipeline.run(gm, Options())
        sites.extend(report.sites)
        items.extend(check_graph(gm, new, given, True).items)
        rewritten.append(new)

    _each_graph(model, (), inputs, look)
    return sites, items, rewritten


def matrices(gm: fx.GraphModule, sites: list[SiteReport]) -> list[tuple[str, torch.Size]]:
    """Tensors that hold a number or a condition for every pair of a query and a key; stored positions may."""
    lengths = {(site.shape.q_len, site.shape.kv_len) for site in sites}
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    needed, pending = set(), [output]
    while pending:
        # A mask that no layer of this model reads is the user's own dead code.
        node = pending.pop()
        pending += [n for n in node.all_input_nodes if n not in needed]
        needed.update(node.all_input_nodes)
    examples = [(n.name, t) for n in needed if (t := nodes.tensor(n)) is not None and t.ndim >= 2]
    return [
        (name, t.shape)
        for name, t in examples
        if (t.is_floating_point() or t.dtype == torch.bool)
        and {tuple(t.shape[-2:]), tuple(t.shape[-3:-1])} & lengths
    ]
