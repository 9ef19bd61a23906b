"""A tiny model of every causal-language-model type of the installed transformers."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BLOCKS = 6

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "n_embd": 32, "d_model": 32, "emb_dim": 32, "embedding_size": 32,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "context_length": 64,
    "max_target_positions": 64, "max_source_positions": 64, "model_max_length": 64,
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "dff": 48, "dim_ff": 48,
    "d_inner": 48, "feed_forward_size": 48, "ffn_hidden_size": 48, "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48, "shared_intermediate_size": 48, "n_inner": 48,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "attention_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "kv_n_heads": 2,
    "head_dim": 8, "global_head_dim": 8, "dim_head": 8, "d_head": 8, "kv_channels": 8, "query_pre_attn_scalar": 8,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "rotary_dim": 4,
    "sliding_window": 5, "attention_chunk_size": 5, "window_size": 5, "local_attention": 10,
    "attention_window_size": 5, "sliding_window_size": 5,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16, "zero_expert_num": 2,
    "mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8,
    "mamba_dt_rank": 4, "state_size": 4, "time_step_rank": 4, "ssm_state_size": 4, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "n_groups": 1, "mamba_headdim": 8, "mamba_ngroups": 1, "n_mamba_heads": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16,
    "type_vocab_size": 2, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 4,
    "original_max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip

PER_BLOCK_KINDS = {"layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers"}

OVERRIDES: dict[str, dict[str, Any]] = {}


def kinds_in_turn(values: list[Any], count: int) -> list[Any]:
    kinds = list(dict.fromkeys(values))
    if len(kinds) == 1:
        return kinds * count
    order = [0, 1, 0, 0, 1, 1, 0, 1]
    if len(kinds) > 2:
        order = [0, 1, 2, 0, 2, 1, 0, 2]
    return [kinds[order[b % 8] % len(kinds)] for b in range(count)]


def sizes(default: Any, count: int) -> dict[str, Any]:
    own = default.to_dict()
    result: dict[str, Any] = {}
    count_name = type(default).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for name, value in own.items():
        sub = getattr(default, name, None)
        if hasattr(sub, "to_dict"):
            result[name] = sizes(sub, count if name in ("text_config", "decoder") else 2)
        elif name in SIZES and (value is not None or name in ("sliding_window", "head_dim")):
            result[name] = SIZES[name]
        elif name in PER_BLOCK_KINDS and isinstance(value, list):
            result[name] = kinds_in_turn(value, count)
        elif name.endswith("_token_id") and isinstance(value, int) and value > 2:
            result[name] = 3
    if count_name in own:
        result[count_name] = count
    for name in ("decoder_layers", "num_decoder_layers"):
        if name in own:
            result[name] = count
    for name in ("encoder_layers", "num_encoder_layers"):
        if name in own and name != count_name:
            result[name] = 2
    if "model_type" in own and hasattr(default, "model_type"):
        result["model_type"] = default.model_type
    for name in ("is_decoder", "use_sliding_window"):
        if name in own:
            result[name] = True
    if own.get("is_encoder_decoder"):
        result["is_encoder_decoder"] = False
        result["is_decoder"] = True
    return result


def tiny_config(model_type: str) -> Any:
    cls = CONFIG_MAPPING[model_type]
    override = OVERRIDES.get(model_type, {})
    kwargs = {**sizes(cls(), BLOCKS), **override}
    kwargs = {k: v for k, v in kwargs.items() if v is not ...}
    kwargs.pop("model_type", None)
    return cls(**kwargs)


def model_types() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
