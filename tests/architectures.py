"""A tiny model of every causal-language-model type that the installed transformers has."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BLOCKS = 6

_BY_SIZE: dict[Any, str] = {
    97: "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size "
    "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "position_embedding_size max_target_positions max_source_positions model_max_length "
    "num_position_embeddings original_max_position_embeddings mamba_d_ssm attention_hidden_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner "
    "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
    "shared_intermediate_size n_inner mlp_dim prefix_dense_intermediate_size",
    32: "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim embedding_dim "
    "out_hidden_size output_proj_dims vision_output_dim projector_input_dim projector_output_dim "
    "lru_width input_embedding_size output_embedding_size hidden_size_global input_size "
    "pronunciation_embed_dim shape_embed_dim ple_embed_dim backbone_hidden_size image_size "
    "output_channels codebook_size vector_quantization_hidden_dimension base_channels "
    "nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel crop_size "
    "num_centroids prompt_mid_dim input_feat_size",
    16: "qk_head_dim moe_intermediate_size shared_expert_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size index_head_dim "
    "router_hidden_size patch_size attention_head_dim swa_head_dim ngram_vocab_size_base",
    8: "head_dim global_head_dim dim_head d_head kv_channels query_pre_attn_scalar q_lora_rank "
    "kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_n_heads mamba_d_head "
    "mamba_chunk_size mamba_num_heads mamba_head_dim mamba_headdim n_mamba_heads "
    "linear_key_head_dim linear_value_head_dim linear_head_dim position_bias_num_buckets "
    "chunk_size o_lora_rank laurel_rank adapter_rank attention_head_size rel_extent hc_lowrank",
    5: "sliding_window attention_chunk_size window_size attention_window_size sliding_window_size",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads attention_heads num_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim mamba_d_state "
    "mamba_dt_rank state_size time_step_rank ssm_state_size linear_num_value_heads "
    "linear_num_heads index_topk hidden_size_per_layer_input swa_num_attention_heads "
    "prompt_length split_ngram_parts num_query_groups",
    2: "num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k moe_top_k top_k_experts zero_expert_num linear_num_key_heads index_n_heads "
    "o_groups hc_mult hc_count first_k_dense_replace num_dense_layers num_kv_shared_layers "
    "decoder_sparse_step interleave_moe_layer_step rescale_every swa_num_key_value_heads "
    "depth type_vocab_size attn_layer_period expert_layer_period heads_per_ngram "
    "num_quantizers num_codebooks",
    1: "n_group topk_group num_expert_group n_groups mamba_ngroups mamba_n_groups "
    "attn_layer_offset",
    3: "max_window_layers",
    10: "local_attention",
    0: "expert_layer_offset",
}
SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
"""Config field -> what it is in a tiny model, whatever the type."""

SIZES |= {"is_decoder": True, "use_sliding_window": True}

KINDS = {"layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types"}
"""Fields with one kind per block, in which a tiny model has every kind of the default."""

UNSIZED = {"num_experts", "top_k_experts", "indexer_types"}

_ORDERS = {2: [0, 1, 0, 0, 1, 1], 3: [0, 1, 2, 0, 2, 1], 4: [0, 1, 2, 3, 2, 1]}
_SLIDING = ["sliding_attention", "full_attention"]


def in_turn(kinds: list[Any], count: int = BLOCKS) -> list[Any]:
    """Every kind, in an order that no period describes."""
    kinds = list(dict.fromkeys(kinds))
    if len(kinds) == 1:
        return kinds * count
    order = _ORDERS[len(kinds)]
    return [kinds[order[block % len(order)]] for block in range(count)]


CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "granitemoehybrid": {"layer_types": in_turn(["linear_attention", "full_attention"])},
    "lfm2_moe": {"layer_types": in_turn(["conv", "full_attention"])},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": in_turn(["hybrid", "hybrid_sliding"]),
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local"] * 6,
        "local_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "intermediate_size": [48, 40, 48, 32, 48, 40],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.5, 0.5, 0.0],
    },
    "gemma4_text": {"layer_types": in_turn(_SLIDING), "global_head_dim": 16},
    "gemma4_unified_text": {"layer_types": in_turn(_SLIDING), "global_head_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "cohere_compass_text": {
        "layer_types": in_turn(_SLIDING),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "gemma4_assistant": {"text_config": {"hidden_size": 32, "num_kv_shared_layers": 6}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1, 3],
        "eos_token_id": 2,
        "split_ngram_parts": 1,
    },
}
"""Type -> arguments that the size table does not give, and `...` for those it gives wrongly."""

NOT_BUILDABLE: dict[str, str] = {}


def _small(default: Any) -> dict[str, Any]:
    """Arguments of a config class for a tiny model, from its default."""
    own = default.to_dict()
    result: dict[str, Any] = {}
    for name, value in own.items():
        if name in type(default).sub_configs and hasattr(getattr(default, name, None), "to_dict"):
            result[name] = _small(getattr(default, name))
        elif name in KINDS and isinstance(value, list):
            result[name] = in_turn(value)
        elif name in SIZES and name != "model_type":
            if value is not None or name not in UNSIZED:
                result[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            result[name] = min(value, 3)
    if "kv_lora_rank" in own:
        result["num_key_value_heads"] = SIZES["num_attention_heads"]
    if own.get("is_encoder_decoder"):
        result["is_encoder_decoder"] = False
    changes = CHANGES.get(default.model_type, {})
    return {
        name: value
        for name, value in (result | _counts(default, own) | changes).items()
        if value is not ...
    }


def _counts(default: Any, own: dict[str, Any]) -> dict[str, int]:
    """Block counts, of the decoder and of whatever else has blocks."""
    names = (
        type(default).attribute_map.get("num_hidden_layers", "num_hidden_layers"),
        "num_hidden_layers", "num_layers", "num_blocks", "decoder_layers", "num_decoder_layers",
        "encoder_layers", "num_encoder_layers", "num_layers_per_stack",
    )  # fmt: skip
    counts = {name: BLOCKS for name in names if name in own}
    return counts | {name: 2 for name in counts if "encoder" in name and "decoder" not in name}


def tiny_config(model_type: str) -> Any:
    """The config of a type's tiny model."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_small(cls()))


def model_types() -> list[str]:
    """Every causal-language-model type, by name."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
