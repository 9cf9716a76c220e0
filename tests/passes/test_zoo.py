"""What attention is written like: for each kind a specimen that is fused, and a near miss that is left."""

import pytest
import zoo
import zoo_families  # noqa: F401  (registers its specimens)
import zoo_layouts  # noqa: F401
import zoo_masks  # noqa: F401
import zoo_papers  # noqa: F401
import zoo_scores  # noqa: F401
import zoo_sinks  # noqa: F401
import zoo_tables  # noqa: F401
import zoo_weights  # noqa: F401

KINDS = {
    "differential attention with grouped heads": (
        "differential_attention_of_grouped_heads", "differential_weights_of_grouped_heads"),
    "differential attention": ("difference_of_outputs", "difference_of_weights"),
    "Evoformer: pair bias, mask, gate": ("evoformer_rows", "triangle_normalised_over_the_other_edge"),
    "Evoformer by einsum": ("evoformer_rows_by_einsum", "triangle_normalised_over_the_other_edge"),
    "invariant point attention": ("invariant_point_attention", "squared_distances_of_pairs"),
    "MPT": ("mosaic_alibi", "bias_from_the_scores"),
    "nanoGPT, a buffer as the mask": ("nano_gpt", "causal_after_the_softmax"),
    "x-transformers": ("einsum_with_cosines", "einsum_with_talking_heads"),
    "memory keys": ("memory_keys_and_values", "values_of_pairs"),
    "UNet of diffusion": ("unet_cross_attention", "unet_attention_normalised_over_the_image"),
    "AttnProcessor of diffusion": ("diffusers_processor", "slots"),
    "prefix": ("prefix", "mask_of_the_scores"),
    "prefix of each sequence": ("prefix_per_sequence", "mask_of_the_top_scores"),
    "chunks": ("chunked", "block_diagonal_after_the_softmax"),
    "dilated window": ("dilated_window", "windows_unfolded"),
    "block diagonal": ("block_diagonal", "block_diagonal_after_the_softmax"),
    "documents": ("documents", "padding_of_queries_and_keys_times_the_weights"),
    "padding on the right": ("padding_bool", "padding_of_queries_and_keys_times_the_weights"),
    "padding on the left": ("padding_on_the_left", "padding_on_the_left_after_the_softmax"),
    "cross-attention": ("cross_attention_with_padding", "weights_sliced"),
    "shifted windows": ("shifted_windows", "windows_normalised_together"),
    "causal": ("causal_tril_of_ones", "causal_after_the_softmax"),
    "scores permuted": ("scores_transposed", "softmax_over_queries"),
    "baddbmm": ("baddbmm_with_a_mask", "query_from_another_row"),
    "five dimensions": ("five_dimensions", "triangle_normalised_over_the_other_edge"),
    "grouped heads": ("expand_and_reshape", "weights_averaged_over_the_group"),
    "latent attention, D other than Dv": ("latent_attention_absorbed", "keys_also_depend_on_the_query"),
    "wider values": ("wider_values", "weights_transposed"),
    "learned temperature": ("cosines_with_a_temperature", "maximum_taken_off_and_scaled_by_the_key"),
    "softmax plus one": ("softmax_plus_one", "a_term_that_is_not_shifted"),
    "sinks": ("sink_last", "another_column_than_the_sink_cut_off"),
    "softcap": ("softcap", "maximum_taken_off_before_a_softcap"),
    "clamp": ("scores_clamped", "rounded_scores"),
    "talking heads": (None, "talking_heads_before_the_softmax"),
    "T5": ("t5", "bucketed_scores"),
    "DeBERTa": ("gathered", "sorted_scores"),
    "Swin": ("window_bias", "sorted_scores"),
    "Transformer-XL": ("transformer_xl", "content_shifted"),
}  # fmt: skip
"""By kind: the names of a specimen, and of a twin that looks like it."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_a_specimen_and_a_twin(kind):
    found = {specimen.name: specimen for specimen in zoo.SPECIMENS}
    fused, twin = KINDS[kind]
    assert fused is None or found[fused].code is None
    assert found[twin].code is not None
