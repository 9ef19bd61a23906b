"""Surgery on every causal-language-model type that the installed transformers has.

For each type a tiny model is built whose blocks differ as much as the type allows. The first, an
inner, the last and some scattered blocks are removed on disk; what is reloaded must compute what
the original computes with these blocks bypassed, with a cache as without, or the removal must be
refused for a reason that is named. A type without an entry in the tables below is tried with the
sizes that its fields' names suggest, so that no type is passed over.

    python tests/architectures.py --write docs/architectures.md
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import build, load, save, score, shortened
from packaging import version
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shortllm.checkpoint.config import count_field, model_classes, text_config
from shortllm.checkpoint.shorten_config import (
    period_hint,
    refuse_type,
    sliced_axis,
    structurally_protected,
)
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import UnsupportedModelError
from shortllm.model.backward import block_weights, walk_back
from shortllm.model.decoder import Decoder
from shortllm.model.metrics import next_token_nll
from shortllm.model.streamed import open_streamed
from shortllm.model.walk import walk
from shortllm.runtime import ALONE
from shortllm.surgery.apply import check_removal
from shortllm.surgery.verify import bypass_logits, kv_cache_matches, probe_ids, verify_shortened

BLOCKS = 6
REMOVED = ([0], [2], [5], [1, 3, 4])
PERIOD = [2, 3]
"""A whole period of the tiny models whose type gives its pattern by periods alone."""

_BY_SIZE: dict[Any, str] = {
    97: "vocab_size unpadded_vocab_size vocab_size_per_layer_input audio_vocab_size "
    "decoder_vocab_size pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "position_embedding_size max_target_positions max_source_positions model_max_length "
    "num_position_embeddings original_max_position_embeddings mamba_d_ssm "
    "attention_hidden_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner "
    "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
    "shared_intermediate_size n_inner mlp_dim prefix_dense_intermediate_size",
    32: "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim embedding_dim "
    "out_hidden_size output_proj_dims vision_output_dim projector_input_dim projector_output_dim "
    "lru_width input_embedding_size output_embedding_size hidden_size_global input_size "
    "pronunciation_embed_dim shape_embed_dim ple_embed_dim backbone_hidden_size image_size "
    "output_channels codebook_size vector_quantization_hidden_dimension base_channels "
    "nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel crop_size "
    "adapter_in_dim adapter_out_dim adapter_input_size downsample_hidden_size "
    "num_centroids prompt_mid_dim input_feat_size",
    16: "qk_head_dim moe_intermediate_size shared_expert_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size index_head_dim "
    "router_hidden_size patch_size attention_head_dim swa_head_dim ngram_vocab_size_base",
    8: "head_dim global_head_dim dim_head d_head kv_channels query_pre_attn_scalar q_lora_rank "
    "kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_n_heads mamba_d_head "
    "mamba_chunk_size mamba_num_heads mamba_head_dim mamba_headdim n_mamba_heads "
    "index_n_heads linear_key_head_dim linear_value_head_dim linear_head_dim "
    "position_bias_num_buckets chunk_size o_lora_rank laurel_rank adapter_rank "
    "attention_head_size rel_extent hc_lowrank",
    5: "sliding_window attention_chunk_size window_size attention_window_size sliding_window_size",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads attention_heads num_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim mamba_d_state "
    "mamba_dt_rank state_size time_step_rank ssm_state_size linear_num_value_heads "
    "linear_num_heads index_topk hidden_size_per_layer_input swa_num_attention_heads "
    "prompt_length split_ngram_parts num_query_groups",
    2: "num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k moe_top_k top_k_experts zero_expert_num linear_num_key_heads "
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


_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 1, 1],
    }
}

CHANGES: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    # its cache slides with this window, its mask does not
    "bamba": {"attn_layer_indices": [1, 4], "sliding_window": ...},
    "granitemoehybrid": {"layer_types": in_turn(["linear_attention", "full_attention"])},
    "lfm2_moe": {"layer_types": in_turn(["conv", "full_attention"])},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": in_turn(["hybrid", "hybrid_sliding"]),
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local"] * 6,
        "local_attn_chunk_length": 8,
    },
    "emu3": {
        "vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5},
    },
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8},
    "zamba2": {"num_mem_blocks": 2, "mamba_d_state": 2, "rms_norm_eps": 1.0},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "intermediate_size": [48, 40, 48, 32, 48, 40],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.5, 0.5, 0.0],
    },
    "glm_moe_dsa": {"indexer_types": in_turn(["full", "shared"])},
    "granite_swa": {"layer_rope_theta": in_turn([10_000.0, 500_000.0])},
    "granitemoe_swa": {"layer_rope_theta": in_turn([10_000.0, 500_000.0])},
    "inkling_text": {"mlp_layer_types": in_turn(["dense", "sparse"])},
    "laguna": {"num_attention_heads_per_layer": in_turn([4, 2])},
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "gemma4_text": {"layer_types": in_turn(_SLIDING), "global_head_dim": 16},
    "gemma4_unified_text": {"layer_types": in_turn(_SLIDING), "global_head_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "layer_types": in_turn(_SLIDING),
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
            "full_attention": None,
        },
    },
    "moshi": {"sliding_window": 64},  # as bamba
    "rwkv": {"attention_hidden_size": 32, "rescale_every": 6},
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

_DRAFTER = {
    "num_kv_shared_layers": BLOCKS,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
PARTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": ("gemma4_text", _DRAFTER)},
    "gemma4_unified_assistant": {"text_config": ("gemma4_unified_text", _DRAFTER)},
}
"""Type -> parts of its config that it has no default for: their type and arguments."""

_CODES = "its decoder reads codes of sound, and its config has no default for the encoders"
NOT_BUILDABLE = {
    "gemma3n": "its vision tower is a model of timm, which is not a dependency",
    "musicgen": _CODES,
    "musicgen_melody": _CODES,
}
if version.parse(transformers.__version__) >= version.parse("5.24"):
    NOT_BUILDABLE["llama4"] = "its class with towers cannot read text alone; see `llama4_text`"


@dataclass(frozen=True)
class Outcome:
    """What became of one type."""

    model_type: str
    status: str
    """`right`, `whole periods`, `refused` or `not buildable`."""
    scoring: str
    """How removals are scored; `-` where none are."""
    note: str

    def row(self) -> str:
        """The type's line of the page."""
        return f"| `{self.model_type}` | {self.status} | {self.scoring} | {self.note or '-'} |"


def model_types() -> list[str]:
    """Every causal-language-model type, by name."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> Any:
    """The config of a type's tiny model, for the class with all towers if there are any."""
    cls = CONFIG_MAPPING[model_type]
    parts = {
        name: CONFIG_MAPPING[kind](**_small(CONFIG_MAPPING[kind]()) | arguments)
        for name, (kind, arguments) in PARTS.get(model_type, {}).items()
    }
    config = cls(**_small(cls(**parts)) | parts)
    wrapped = model_classes(model_type)[1]
    if wrapped and text_config(config) is not config:
        config.architectures = sorted(wrapped)[:1]
    return config


def _small(default: Any, blocks: int = BLOCKS) -> dict[str, Any]:
    """Arguments of a config class for a tiny model, from its default."""
    own = default.to_dict()
    result: dict[str, Any] = {}
    for name, value in own.items():
        part = getattr(default, name) if name in type(default).sub_configs else None
        if hasattr(part, "to_dict"):
            result[name] = _small(part, BLOCKS if part is text_config(default) else 2)
        elif name in KINDS and isinstance(value, list):
            result[name] = in_turn(value)
        elif name in SIZES and (value is not None or name not in UNSIZED):
            result[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            result[name] = min(value, 3)
    if "kv_lora_rank" in own:
        result["num_key_value_heads"] = SIZES["num_attention_heads"]
    if own.get("is_encoder_decoder"):
        result["is_encoder_decoder"] = False
    result |= _counts(default, own, blocks) | CHANGES.get(default.model_type, {})
    return {name: value for name, value in result.items() if value is not ...}


def _counts(default: Any, own: dict[str, Any], blocks: int) -> dict[str, int]:
    """Block counts under every name."""
    names = (
        type(default).attribute_map.get("num_hidden_layers", "num_hidden_layers"),
        "num_hidden_layers", "num_layers", "num_blocks", "decoder_layers", "num_decoder_layers",
        "encoder_layers", "num_encoder_layers", "num_layers_per_stack", "depth",
    )  # fmt: skip
    return {name: blocks for name in names if name in own}


def examine(model_type: str) -> Outcome:
    """Build, shorten, reload and compare a type.

    Raises:
        AssertionError, CheckpointError: it is silently wrong, or refused without a named reason.
    """
    if model_type in NOT_BUILDABLE:
        return Outcome(model_type, "not buildable", "-", NOT_BUILDABLE[model_type])
    with tempfile.TemporaryDirectory(prefix="shortllm-type-") as directory:
        source = save(build(tiny_config(model_type)), Path(directory) / "source")
        try:
            checkpoint = open_checkpoint(source)
            refuse_type(checkpoint.config)
            return _examine_removals(model_type, checkpoint, Path(directory) / "short")
        except UnsupportedModelError as error:
            return Outcome(model_type, "refused", "-", _reason(error))


def _examine_removals(model_type: str, checkpoint: Checkpoint, target: Path) -> Outcome:
    """Every removal right, or refused for a reason that fits."""
    protected = structurally_protected(checkpoint.config)
    _check_protected(checkpoint, protected)
    decoder = Decoder(load(checkpoint.directory))
    cached = kv_cache_matches(decoder)
    intact = bypass_logits(decoder)
    free = [block for block in (1, 3, 4, 2, 0, 5) if block not in protected]
    refusals: dict[int, UnsupportedModelError] = {}
    changed: set[str] = set()
    losses = {frozenset[int](): plain_loss(intact, decoder)}
    for removed in (*REMOVED, sorted(free[:3])):
        try:
            shortened(checkpoint, removed, target)
        except UnsupportedModelError as error:
            if not protected.keys() & set(removed):
                refusals[len(refusals)] = error
            continue
        short, expected = Decoder(load(target)), bypass_logits(decoder, removed)
        assert not torch.allclose(intact, expected, rtol=1e-2), "the removed blocks do nothing"
        verify_shortened(model_type, short, expected, cached=cached)
        losses[frozenset(removed)] = plain_loss(bypass_logits(short), decoder)
        changed |= _changes(checkpoint, target)
    if len(refusals) == len(REMOVED) + 1:
        raise refusals[0]
    if refusals:
        hint = period_hint(checkpoint.config)
        assert hint, [str(error) for error in refusals.values()]
        short = Decoder(load(shortened(checkpoint, PERIOD, target)))
        verify_shortened(model_type, short, bypass_logits(decoder, PERIOD), cached=cached)
        losses[frozenset(PERIOD)] = plain_loss(bypass_logits(short), decoder)
        return Outcome(
            model_type, "whole periods", examine_scoring(checkpoint, decoder, losses), hint.strip()
        )
    notes = [", ".join(f"`{name}`" for name in sorted(changed))] if changed else []
    notes += [f"block {b} of 6 stays: {reason}" for b, reason in sorted(protected.items())]
    if not cached:
        notes.append("no cache compared, as the original itself differs with one")
    scoring = examine_scoring(checkpoint, decoder, losses)
    return Outcome(model_type, "right", scoring, "; ".join(notes))


def plain_loss(logits_BTV: torch.Tensor, decoder: Decoder) -> float:
    """Mean next-token NLL of the probe."""
    target_N = probe_ids(decoder.model.config)[:, 1:].flatten()
    return next_token_nll(logits_BTV[:, :-1].flatten(0, 1), target_N).double().mean().item()


def examine_scoring(
    checkpoint: Checkpoint, decoder: Decoder, losses: dict[frozenset[int], float]
) -> str:
    """How the type is scored: every way must give the loss of the reloaded shortened models.

    Args:
        losses: removed blocks -> loss of the checkpoint without them.
    """
    _check_walk(decoder, losses)
    if decoder.obstacle() is not None:
        return "each model run whole"
    ids = probe_ids(decoder.model.config)
    _check_gradients(decoder, load(checkpoint.directory), ids)
    try:
        streamed = open_streamed(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    except UnsupportedModelError as error:
        assert "is a weight that several blocks share" in str(error)
        return "one walk, in memory"
    assert streamed.obstacle() is None, streamed.obstacle()
    _check_walk(streamed, losses)
    names = ("taylor", "influence", "angular")
    found, expected = score(streamed, ids, *names), score(decoder, ids, *names)
    for name in names:
        assert found[name].importance == pytest.approx(expected[name].importance, rel=1e-5), name
    return "one walk, streamed too"


def _check_walk(decoder: Decoder, losses: dict[frozenset[int], float]) -> None:
    ids, removals = probe_ids(decoder.model.config), list(losses)
    totals = [0.0] * len(removals)

    def consume(m: int, logits_NV: Any, first_NV: Any, target_N: Any) -> None:
        totals[m] += next_token_nll(logits_NV, target_N).double().sum().item()

    walk(decoder, ids, removals, consume=consume)
    means = [total / ids[:, 1:].numel() for total in totals]
    assert means == pytest.approx([losses[removed] for removed in removals], rel=1e-5)


def _check_gradients(decoder: Decoder, model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Weight times gradient of each block, against autograd that holds everything.

    Args:
        model: the same again.
    """
    found: dict[int, dict[str, torch.Tensor]] = {}
    walk_back(decoder, ids, range(BLOCKS), found.__setitem__, ranks=ALONE)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    next_token_nll(logits, ids[:, 1:].flatten()).mean().backward()
    weights = [block_weights(block) for block in Decoder(model).blocks]
    uses = Counter(id(weight) for own in weights for weight in own.values())
    for b, own in enumerate(weights):
        # of weights that several blocks use, autograd adds up what the blocks have each for itself
        single = {name: weight for name, weight in own.items() if uses[id(weight)] == 1}
        products = [w.detach() * w.grad for w in single.values() if w.grad is not None]
        expected = sum(product.abs().sum().item() for product in products)
        total = sum(found[b][name].abs().sum().item() for name in single)
        assert total == pytest.approx(expected, rel=1e-3), b


def _check_protected(checkpoint: Checkpoint, protected: dict[int, str]) -> None:
    """The blocks said to be protected, and no others, are refused when they go alone."""
    for block in range(BLOCKS) if protected else ():
        kept = [b for b in range(BLOCKS) if b != block]
        try:
            check_removal(checkpoint, kept)
        except UnsupportedModelError as error:
            assert protected.get(block, "not protected") in str(error)
        else:
            assert block not in protected


def _changes(checkpoint: Checkpoint, target: Path) -> set[str]:
    """What surgery changed besides block numbers and count; everything else must be the same."""
    before, after = _tensors(checkpoint.directory), _tensors(target)
    outside = {name for name in before if checkpoint.block_names.block_of(name) is None}
    sliced = {name for name in outside if sliced_axis(name) is not None}
    assert outside <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in outside - sliced)
    raw, config = copy.deepcopy(checkpoint.raw_config), json.loads(_config(target))
    fields = {field for field in config if config[field] != raw.get(field)} - {"shortllm"}
    text = text_config(checkpoint.config)
    if text is not checkpoint.config:
        (part,) = fields - {"num_hidden_layers"}  # which some types state twice
        fields = {f for f in config[part] if config[part][f] != raw[part].get(f)}
    changed = fields - {count_field(text), "num_hidden_layers"}
    return changed | {name.rpartition(".weight")[0].rpartition(".")[2] for name in sliced}


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def _config(directory: Path) -> str:
    return (directory / "config.json").read_text(encoding="utf-8")


def _reason(error: UnsupportedModelError) -> str:
    """The part of a message behind what every refusal says."""
    return str(error).partition("cannot be shortened correctly: ")[2] or str(error)


def page(outcomes: list[Outcome], made_with: str = transformers.__version__) -> str:
    """docs/architectures.md."""
    counts = {status: 0 for status in ("right", "whole periods", "refused", "not buildable")}
    for outcome in outcomes:
        counts[outcome.status] += 1
    return f"""# Which architectures

`python tests/architectures.py --write docs/architectures.md` writes this page; it ran with
transformers {made_with}, and the same sweep is part of the tests. For every causal LM type it
builds a tiny model whose blocks differ as much as the type allows, and removes its first, an
inner, its last and some scattered blocks on disk. *Right*: the kept blocks are built as before, and
the reloaded model computes what the original computes with these blocks bypassed, with a cache and
without. Everything else is refused, with the reason. A multimodal model keeps its other towers as
they are.

{len(outcomes)} types: {", ".join(f"{n} {status}" for status, n in counts.items())}.

How scores are computed. *One walk*: all removals in a single pass over the blocks; the losses are
those of the reloaded checkpoints, Taylor scores those of plain autograd. *Streamed too*: the same
with blocks read one at a time (not if blocks share weights). *Each model run whole*: the blocks of
the type pass more to each other than one hidden state. `ppl` and `kl` run each shortened model by
its own forward, in memory; criteria of hidden states and gradients are refused.

| type | surgery | scoring | config fields and tensors changed besides the count, or the reason |
|---|---|---|---|
{chr(10).join(outcome.row() for outcome in outcomes)}
"""


def main() -> None:
    """Examine every type, or some, and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("types", nargs="*", default=model_types())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = [examine(model_type) for model_type in arguments.types]
    if arguments.write:
        arguments.write.write_text(page(outcomes), encoding="utf-8")
    else:
        print("\n".join(outcome.row() for outcome in outcomes))


if __name__ == "__main__":
    main()
