"""What llama.cpp, vLLM, MLX, SGLang and ExecuTorch assume about blocks: one entry for each rule.

Each entry names the line it rests on: project, file, commit and place. Where a program's own code
was not read, there is no entry, and the verdict is "unknown".
"""

from __future__ import annotations

from typing import Literal

from shortllm.checkpoint.config import SHAPES
from shortllm.surgery.export_rules import (
    Rule,
    Source,
    experts_by_step,
    full_blocks_listed,
    full_every,
    has,
    head_at,
    heads_behind,
    heads_counted,
    named,
    no_positions_at_intervals,
    no_positions_every,
    one_shape,
    one_window,
    params_file,
    plain_queries_at,
    reaches,
    scale_by_count,
    shared_keys_from,
    shares_with_last_two,
    without_heads,
)

Target = Literal["gguf", "vllm", "mlx", "sglang", "executorch"]

NAMES: dict[Target, str] = {
    "gguf": "llama.cpp (GGUF)",
    "vllm": "vLLM",
    "mlx": "MLX (mlx-lm)",
    "sglang": "SGLang",
    "executorch": "ExecuTorch",
}
"""Target -> its name in messages."""


def _llama_cpp(file: str, commit: str, place: str) -> Source:
    return Source(project="ggml-org/llama.cpp", file=file, commit=commit, place=place)


def _vllm(name: str, commit: str, place: str) -> Source:
    file = f"vllm/model_executor/models/{name}.py"
    return Source(project="vllm-project/vllm", file=file, commit=commit, place=place)


def _mlx(name: str, commit: str, place: str) -> Source:
    file = f"mlx_lm/models/{name}.py"
    return Source(project="ml-explore/mlx-lm", file=file, commit=commit, place=place)


def _sglang(name: str, commit: str, place: str) -> Source:
    file = f"python/sglang/srt/{name}.py"
    return Source(project="sgl-project/sglang", file=file, commit=commit, place=place)


def _executorch(name: str, commit: str, place: str) -> Source:
    file = f"examples/models/{name}"
    return Source(project="pytorch/executorch", file=file, commit=commit, place=place)


INTERVAL = "full_attention_interval"
WINDOWS = "sliding_window_pattern"
KINDS = "layer_types"


# ---- llama.cpp

_COUNT = _llama_cpp(
    "src/llama-model.cpp",
    "a5410f046c01d01330c8a42f13b64a211fedf2c3",
    "llama_model::load_hparams, LLM_KV_BLOCK_COUNT",
)
_QWEN35 = _llama_cpp(
    "src/models/qwen35.cpp",
    "06e514f61476a45c38b36ac37ca5133114b90ab3",
    "load_arch_hparams, full_attn_interval",
)
_QWEN35_MOE = _llama_cpp(
    "src/models/qwen35moe.cpp",
    "02ebd8f7f24f55935c91a903d211e2ccd2b11582",
    "load_arch_hparams, full_attn_interval",
)
_QWEN3_NEXT = _llama_cpp(
    "src/models/qwen3next.cpp",
    "02ebd8f7f24f55935c91a903d211e2ccd2b11582",
    "load_arch_hparams, full_attn_interval",
)
_LFM2 = _llama_cpp(
    "conversion/lfm2.py",
    "051139f511300aaf6159294433fab91c73ef7455",
    "set_gguf_parameters, num_key_value_heads by layer_types",
)
_OLMO3 = _llama_cpp(
    "conversion/olmo.py",
    "051139f511300aaf6159294433fab91c73ef7455",
    "Olmo2Model.set_gguf_parameters, sliding_window_pattern by layer_types",
)
_GEMMA2 = _llama_cpp(
    "src/models/gemma2.cpp",
    "82234e08ad119dbefb31fcc9c304a531016bd502",
    "load_arch_hparams, swa_period and f_attention_scale",
)
_GEMMA3 = _llama_cpp(
    "src/llama-model.cpp",
    "a5410f046c01d01330c8a42f13b64a211fedf2c3",
    "LLM_ARCH_GEMMA3, n_swa_pattern and f_attention_scale",
)
_GEMMA3N = _llama_cpp(
    "src/models/gemma3n.cpp",
    "3688fa865df06807e343b48ebd51d66985eb2a1e",
    "load_arch_hparams, swa_period and n_layer_kv_from_start",
)
_LLAMA4 = _llama_cpp(
    "src/models/llama4.cpp",
    "8a5c4e03d11bbcb157cbf05b9cd2968f34a55969",
    "load_arch_hparams, swa_period and n_moe_layer_step",
)
_COHERE2 = _llama_cpp(
    "src/models/cohere2.cpp",
    "82234e08ad119dbefb31fcc9c304a531016bd502",
    "load_arch_hparams, swa_period",
)
_AFMOE = _llama_cpp(
    "src/models/afmoe.cpp", "34dc2a377d85ae0668d816b4e902d3abf476dc37", "graph, is_sliding"
)
_GPT_OSS = _llama_cpp(
    "src/models/openai-moe.cpp",
    "069be0ae22f391c64e26e8da4c7da0143ede8cf3",
    "load_arch_hparams, swa_period",
)
_SMOLLM3 = _llama_cpp(
    "src/models/smollm3.cpp",
    "a0b8c172c7113ff5275be4de7f6f68d214a527c6",
    "graph, use_rope by n_no_rope_layer_step",
)
_DEEPSEEK2 = _llama_cpp(
    "src/models/deepseek2.cpp", "59b9e36f872df37454c1a01a5dd4ea69ede65832", "graph, is_lite"
)
_DEEPSEEK_HEADS = _llama_cpp(
    "conversion/deepseek.py",
    "01a723dc630d075780ac7081fd63fbd87780f665",
    "DeepseekV2Model.modify_tensors, skip_mtp",
)
_GLM4_MOE = _llama_cpp(
    "conversion/glm.py",
    "051139f511300aaf6159294433fab91c73ef7455",
    "Glm4MoeModel.__init__, block_count and num_nextn_predict_layers",
)

GGUF: dict[str, list[Rule]] = {
    "afmoe": [Rule(_AFMOE, full_every(4))],
    "cohere2": [Rule(_COHERE2, full_every(4))],
    "deepseek_v2": [Rule(_DEEPSEEK2, plain_queries_at([26, 27])), Rule(_DEEPSEEK_HEADS)],
    "deepseek_v3": [Rule(_DEEPSEEK2, plain_queries_at([26, 27])), Rule(_DEEPSEEK_HEADS)],
    "gemma2": [Rule(_GEMMA2, full_every(2)), Rule(_GEMMA2, scale_by_count(46))],
    "gemma3_text": [Rule(_GEMMA3, full_every(6)), Rule(_GEMMA3, scale_by_count(62))],
    "gemma3n_text": [Rule(_GEMMA3N, full_every(5)), Rule(_GEMMA3N, shared_keys_from(20))],
    "glm4_moe": [Rule(_GLM4_MOE, heads_behind)],
    "gpt_oss": [Rule(_GPT_OSS, full_every(2))],
    "lfm2": [Rule(_LFM2, reads=KINDS)],
    "lfm2_moe": [Rule(_LFM2, reads=KINDS)],
    "llama4_text": [Rule(_LLAMA4, no_positions_every(4)), Rule(_LLAMA4, experts_by_step)],
    "olmo3": [Rule(_OLMO3, reads=KINDS)],
    "qwen3_5_moe_text": [
        Rule(_QWEN35_MOE, full_every(4, stated=INTERVAL), advice=without_heads),
    ],
    "qwen3_5_text": [
        Rule(_QWEN35, full_every(4, stated=INTERVAL), advice=without_heads),
    ],
    "qwen3_next": [
        Rule(_QWEN3_NEXT, full_every(4, stated=INTERVAL), advice=without_heads),
    ],
    "smollm3": [Rule(_SMOLLM3, no_positions_every(4))],
}


# ---- vLLM

_VLLM_QWEN35 = _vllm(
    "qwen3_5", "00def4f8421153e037ff6270c0a8c31912a00206", "Qwen3_5Model, layer_types"
)
_VLLM_QWEN3_NEXT = _vllm(
    "qwen3_next", "6365b387890f7aa74b0fe65b81705d4730fcc763", "Qwen3NextModel, layer_types"
)
_VLLM_LFM2 = _vllm("lfm2", "055e47c28003156421365af985d676fc921cb075", "Lfm2Model, layer_types")
_VLLM_GPT_OSS = _vllm(
    "gpt_oss", "0025d69bcf08bb1b135103167f0bbc82b9af6e69", "OAIAttention, layer_idx % 2"
)
_VLLM_DEEPSEEK = _vllm(
    "deepseek_v2",
    "002d6073aa034d4f5545d45021b0e56d1f3c3593",
    "DeepseekV2Model.load_weights, spec_layer",
)
_VLLM_GLM4_MOE = _vllm(
    "glm4_moe",
    "002d6073aa034d4f5545d45021b0e56d1f3c3593",
    "Glm4MoeModel.load_weights, skip_spec_layers",
)
_VLLM_COUNT = _vllm(
    "utils", "003466351df9ac6e2045321e0e065570bc2b61c6", "make_layers, num_hidden_layers"
)
_VLLM_WINDOW = _vllm(
    "qwen2", "013a2792517057519158cd232fad1b4bd39c129e", "Qwen2Model, max_window_layers"
)

VLLM: dict[str, list[Rule]] = {
    "deepseek_v2": [Rule(_VLLM_DEEPSEEK, heads_behind)],
    "deepseek_v3": [Rule(_VLLM_DEEPSEEK, heads_behind)],
    "glm4_moe": [Rule(_VLLM_GLM4_MOE, heads_behind)],
    "gpt_oss": [Rule(_VLLM_GPT_OSS, full_every(2))],
    "lfm2": [Rule(_VLLM_LFM2, reads=KINDS)],
    "qwen3_5_moe_text": [Rule(_VLLM_QWEN35, reads=KINDS)],
    "qwen3_5_text": [Rule(_VLLM_QWEN35, reads=KINDS)],
    "qwen3_next": [Rule(_VLLM_QWEN3_NEXT, reads=KINDS)],
}


# ---- MLX

_MLX_LLAMA = _mlx(
    "llama", "17772c052c3d9b9bc16e052fcd75c2845dda4568", "LlamaModel.__init__, TransformerBlock"
)
_MLX_QWEN35 = _mlx(
    "qwen3_5", "012facae6f52ac6792eae6ff1edff0d4d34cb1a0", "DecoderLayer.__init__, is_linear"
)
_MLX_QWEN3_NEXT = _mlx(
    "qwen3_next",
    "02de46c59f18f7cbae5089d2e4cccdf37bbdae00",
    "Qwen3NextDecoderLayer.__init__, is_linear",
)
_MLX_GEMMA3 = _mlx(
    "gemma3_text", "22441bf00e5778856ad59d85a4b707731ae87a4a", "Attention.__init__, is_sliding"
)
_MLX_GEMMA3N = _mlx(
    "gemma3n",
    "401e67802cbad1bfba9e8e9f9983bcfb586c6197",
    "Gemma3nAttention.__init__, kv_shared_layer_index",
)
_MLX_COHERE2 = _mlx(
    "cohere2",
    "1245c2ec70e32b7865e3c724a95379a6b86afca8",
    "Attention.__init__, use_sliding_window",
)
_MLX_GPT_OSS = _mlx(
    "gpt_oss", "1245c2ec70e32b7865e3c724a95379a6b86afca8", "GptOssMoeModel.__init__, swa_idx"
)
_MLX_LLAMA4 = _mlx(
    "llama4", "04e6af1f26a2ca54306b34608a09ae08eeecc8a3", "Attention, use_rope; is_moe_layer"
)
_MLX_SMOLLM3 = _mlx(
    "smollm3", "1429a0174448483de48272435ddb6be4409c166d", "Model.__init__, no_rope_layers"
)
_MLX_LFM2 = _mlx("lfm2", "1245c2ec70e32b7865e3c724a95379a6b86afca8", "ModelArgs, full_attn_idxs")
_MLX_LFM2_MOE = _mlx(
    "lfm2_moe", "0c5550a344532bdb60ae617f9c2d2ae0e0adf7ec", "ModelArgs, full_attn_idxs"
)
_MLX_DEEPSEEK_V3 = _mlx(
    "deepseek_v3", "04e6af1f26a2ca54306b34608a09ae08eeecc8a3", "sanitize, model.layers.61"
)
_MLX_GLM4_MOE = _mlx("glm4_moe", "04e6af1f26a2ca54306b34608a09ae08eeecc8a3", "sanitize, mpt_layer")

MLX: dict[str, list[Rule]] = {
    "cohere2": [
        Rule(_MLX_COHERE2, full_every(4, stated=WINDOWS)),
        Rule(_MLX_COHERE2, reaches(4, WINDOWS)),
    ],
    "deepseek_v3": [Rule(_MLX_DEEPSEEK_V3, head_at(61))],
    "gemma3_text": [
        Rule(_MLX_GEMMA3, full_every(6, stated=WINDOWS)),
        Rule(_MLX_GEMMA3, reaches(6, WINDOWS)),
    ],
    "gemma3n_text": [Rule(_MLX_GEMMA3N, shares_with_last_two)],
    "glm4_moe": [Rule(_MLX_GLM4_MOE, head_at())],
    "gpt_oss": [Rule(_MLX_GPT_OSS, has("full_attention", "sliding_attention"), reads=KINDS)],
    "lfm2": [Rule(_MLX_LFM2, full_blocks_listed, reads=KINDS)],
    "lfm2_moe": [Rule(_MLX_LFM2_MOE, full_blocks_listed, reads=KINDS)],
    "llama4_text": [
        Rule(_MLX_LLAMA4, no_positions_every(4)),
        Rule(_MLX_LLAMA4, experts_by_step),
        Rule(_MLX_LLAMA4, reaches(4)),
    ],
    "qwen3_5_moe_text": [
        Rule(_MLX_QWEN35, full_every(4, stated=INTERVAL)),
        Rule(_MLX_QWEN35, reaches(4, INTERVAL)),
    ],
    "qwen3_5_text": [
        Rule(_MLX_QWEN35, full_every(4, stated=INTERVAL)),
        Rule(_MLX_QWEN35, reaches(4, INTERVAL)),
    ],
    "qwen3_next": [
        Rule(_MLX_QWEN3_NEXT, full_every(4, stated=INTERVAL)),
        Rule(_MLX_QWEN3_NEXT, reaches(4, INTERVAL)),
    ],
    "smollm3": [Rule(_MLX_SMOLLM3, reads="no_rope_layers")],
}


# ---- SGLang

_SGLANG_LLAMA = _sglang(
    "models/llama", "00239548f1cd1a06ca145a5447a86738090a48f1", "LlamaModel.__init__, make_layers"
)
_SGLANG_QWEN3_NEXT = _sglang(
    "configs/qwen3_next",
    "041bacd339d73f09b23e1f5d916017cc21c55640",
    "Qwen3NextConfig.layers_block_type",
)
_SGLANG_QWEN35 = _sglang(
    "configs/qwen3_5",
    "0f6f0002e7c307205aa661654ee3e47d01398838",
    "Qwen3_5TextConfig, a Qwen3NextConfig",
)
_SGLANG_GEMMA2 = _sglang(
    "models/gemma2", "00b08c497f0735678e084ae5e3dd88ca06b46627", "Gemma2Attention, layer_id % 2"
)
_SGLANG_GEMMA3 = _sglang(
    "models/gemma3_causal",
    "038c87d490581565bd08d24a46cf6333bfc5462d",
    "Gemma3Attention, layer_types",
)
_SGLANG_GPT_OSS = _sglang(
    "models/gpt_oss", "009c68085e684e0cf2829d129ad026180c1f8c32", "GptOssDecoderLayer, layer_types"
)
_SGLANG_LLAMA4 = _sglang(
    "models/llama4",
    "003cb210149dabe1daf32be9c38ed7fe56093190",
    "Llama4Attention, use_rope; _is_moe_layer",
)
_SGLANG_LFM2 = _sglang(
    "models/lfm2", "01897f3fe471859ef1cc357b7b550a4eb7f7b149", "Lfm2DecoderLayer, layer_types"
)
_SGLANG_DEEPSEEK = _sglang(
    "models/deepseek_common/deepseek_weight_loader",
    "0201c04e983820f371aedd97154d07453badd814",
    "do_load_weights, layer_id >= end_layer",
)
_SGLANG_GLM4_MOE = _sglang(
    "models/glm4_moe", "005ffc65dc0f72d42a1436c31ef129ed98cccc58", "load_weights, num_nextn_layers"
)

SGLANG: dict[str, list[Rule]] = {
    "deepseek_v2": [Rule(_SGLANG_DEEPSEEK)],
    "deepseek_v3": [Rule(_SGLANG_DEEPSEEK)],
    "gemma2": [Rule(_SGLANG_GEMMA2, full_every(2))],
    "gemma3_text": [Rule(_SGLANG_GEMMA3, reads=KINDS)],
    "glm4_moe": [Rule(_SGLANG_GLM4_MOE, heads_counted)],
    "gpt_oss": [Rule(_SGLANG_GPT_OSS, reads=KINDS)],
    "lfm2": [Rule(_SGLANG_LFM2, reads=KINDS)],
    "llama4_text": [
        Rule(_SGLANG_LLAMA4, no_positions_every(4)),
        Rule(_SGLANG_LLAMA4, experts_by_step),
    ],
    "qwen3_5_moe_text": [Rule(_SGLANG_QWEN35, full_every(4, stated=INTERVAL, default=False))],
    "qwen3_5_text": [Rule(_SGLANG_QWEN35, full_every(4, stated=INTERVAL, default=False))],
    "qwen3_next": [Rule(_SGLANG_QWEN3_NEXT, full_every(4, stated=INTERVAL, default=False))],
}


# ---- ExecuTorch

_ET_PARAMS = Source(
    project="pytorch/executorch",
    file="extension/llm/modeling/text_decoder/model.py",
    commit="04b91d6063e164d1effe429ddc66c790bc0d5e5d",
    place="Llama2Model.__init__, params_path",
)
_ET_LLAMA = _executorch(
    "smollm2/convert_weights.py",
    "2d486fb3a3014bd4be8d0ee763cb02ae1d7841f2",
    "_SMOLLM_HF_FROM_META, model.layers",
)
_ET_QWEN3 = _executorch(
    "qwen3/convert_weights.py",
    "024b0da461f657d6abe596891b754adf0d48fc17",
    "_QWEN_3_FROM_META, model.layers",
)
_ET_QWEN35 = _executorch(
    "qwen3_5/convert_weights.py",
    "0a12cfcdffc70c515e0f31d58c59f2d12a945a56",
    "qwen_3_5_to_meta, model.layers",
)
_ET_QWEN35_KINDS = _executorch(
    "qwen3_5/config/0_8b_config.json",
    "30edb257c8b5ee8992c8f4c0411e597b0fa34a74",
    "n_layers, layer_types",
)
_ET_LFM2 = _executorch(
    "lfm2/convert_weights.py", "16600d9d76a02c5f3556e8831c6d130a41e92661", "_LFM_2_TO_META"
)
_ET_KINDS = _executorch(
    "llama/llama_transformer.py",
    "e008d6ccf7051061cd7de349303d808323fe54fa",
    "construct_transformer, n_layers and layer_types",
)
_ET_SMOLLM3 = _executorch(
    "smollm3/convert_weights.py",
    "6d05cff9b3448068d5db514ec6f99c580d944e09",
    "_SMOLLM_TO_META, model.layers",
)
_ET_INTERVAL = _executorch(
    "llama/model_args.py",
    "00f160747f2af1a945725fc564552f891e6a4099",
    "ModelArgs, no_rope_layer_interval",
)

EXECUTORCH: dict[str, list[Rule]] = {
    "lfm2": [
        Rule(_ET_LFM2, named("model.layers")),
        Rule(_ET_KINDS, advice=params_file(KINDS)),
    ],
    "llama": [
        Rule(_ET_LLAMA, named("model.layers")),
        Rule(_ET_PARAMS, advice=params_file()),
    ],
    "qwen3": [
        Rule(_ET_QWEN3, named("model.layers")),
        Rule(_ET_PARAMS, advice=params_file()),
    ],
    "qwen3_5_text": [
        Rule(_ET_QWEN35, named("model.layers", "model.language_model.layers")),
        Rule(_ET_QWEN35_KINDS, advice=params_file(KINDS)),
    ],
    "smollm3": [
        Rule(_ET_SMOLLM3, named("model.layers")),
        Rule(_ET_INTERVAL, no_positions_at_intervals, advice=params_file()),
    ],
}


# ---- all

BY_TYPE: dict[Target, dict[str, list[Rule]]] = {
    "gguf": GGUF,
    "vllm": VLLM,
    "mlx": MLX,
    "sglang": SGLANG,
    "executorch": EXECUTORCH,
}
"""Target -> model type -> everything that the program assumes about this type's blocks."""

BY_FIELD: dict[Target, dict[str, Rule]] = {
    "gguf": {SHAPES: Rule(_COUNT, one_shape)},
    "vllm": {
        SHAPES: Rule(_VLLM_COUNT, one_shape),
        "max_window_layers": Rule(_VLLM_WINDOW, one_window),
    },
    "mlx": {SHAPES: Rule(_MLX_LLAMA, one_shape)},
    "sglang": {SHAPES: Rule(_SGLANG_LLAMA, one_shape)},
    "executorch": {SHAPES: Rule(_ET_PARAMS, one_shape)},
}
"""Target -> config field -> what the program requires of every type that has the field."""

PLAIN = {
    "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3",
    "qwen2", "qwen3", "stablelm", "starcoder2",
}  # fmt: skip

ALIKE: dict[Target, dict[str, Source]] = {
    "gguf": dict.fromkeys(PLAIN, _COUNT),
    "vllm": dict.fromkeys(PLAIN, _VLLM_COUNT),
    "mlx": {
        "gemma": _mlx("gemma", "05beddece39652a842c104bb8fa090447025df62", "GemmaModel.__init__"),
        "llama": _MLX_LLAMA,
        "mistral": _MLX_LLAMA,
        "qwen2": _mlx("qwen2", "0cf236d57afbd7a0b93b34b353e8b121a2ba5df5", "Qwen2Model.__init__"),
        "qwen3": _mlx("qwen3", "144d58ced2d7392fe5acc7fb4daeb39a3fcf5a1f", "Qwen3Model.__init__"),
    },
    "sglang": {
        "llama": _SGLANG_LLAMA,
        "mistral": _sglang(
            "models/mistral",
            "00b08c497f0735678e084ae5e3dd88ca06b46627",
            "MistralForCausalLM, a LlamaForCausalLM",
        ),
        "qwen2": _sglang(
            "models/qwen2", "0005b7e1e2523e7ed40a5f6a43a62e2306e95c55", "Qwen2Model.__init__"
        ),
        "qwen3": _sglang(
            "models/qwen3", "01b5f572b7b678e2fa5a727881f1ff3ab4dd3c6d", "Qwen3Model, a Qwen2Model"
        ),
    },
    "executorch": {},
}
"""Target -> types that the program builds from the block count if all blocks have one structure."""
