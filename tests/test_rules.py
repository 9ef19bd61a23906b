"""Config fields under removal, and the guard that refuses what no rule makes right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import _GROUPED, WINDOW, build, config_of, load, opened, save, saved, shortened
from torch import nn
from transformers import AutoConfig

from shortllm.checkpoint import open_checkpoint
from shortllm.checkpoint.names import find_block_names
from shortllm.checkpoint.rules import refuse_block_names_in_config, shorten_config
from shortllm.checkpoint.signature import block_signature, check_signatures, difference
from shortllm.checkpoint.surgery import check_removal
from shortllm.checkpoint.verify import bypass_logits, verify_shortened
from shortllm.errors import UnsupportedModelError
from shortllm.model.blocks import build_empty, find_blocks
from shortllm.model.decoder import Decoder


def shorten(config: Any, kept: list[int], **raw: Any) -> dict[str, Any]:
    return shorten_config({**config.to_dict(), **raw}, config, kept)


# --- each kind of field ---------------------------------------------------------------------------


def test_one_entry_per_block_is_cut() -> None:
    config = config_of("gemma3_text")
    result = shorten(config, [0, 2, 5, 6])
    assert result["layer_types"] == [config.layer_types[b] for b in (0, 2, 5, 6)]
    assert result["num_hidden_layers"] == 4


def test_a_list_the_file_leaves_to_a_period_is_written_out() -> None:
    config = config_of("smollm3")
    raw = {"model_type": "smollm3", "num_hidden_layers": 6, "no_rope_layer_interval": 3}
    result = shorten_config(raw, config, [1, 2, 5])
    assert config.no_rope_layers == [1, 1, 0, 1, 1, 0]
    assert result["no_rope_layers"] == [1, 0, 0]
    assert result["layer_types"] == [config.layer_types[b] for b in (1, 2, 5)]
    assert raw == {"model_type": "smollm3", "num_hidden_layers": 6, "no_rope_layer_interval": 3}


@pytest.mark.parametrize(
    "kept, expected", [([0, 1, 2, 3, 4], 3), ([1, 2, 4, 5], 2), ([3, 4, 5], 0), ([0, 3], 1)]
)
def test_a_count_of_leading_blocks_is_counted_again(kept: list[int], expected: int) -> None:
    assert shorten(config_of("qwen2"), kept)["max_window_layers"] == expected


@pytest.mark.parametrize(
    "kept, expected",
    [([0, 1, 2, 3, 4], [1, 4]), ([0, 2, 3, 4], [3]), ([1, 4, 5], [0, 1]), ([0], [])],
)
def test_block_numbers_are_renumbered(kept: list[int], expected: list[int]) -> None:
    config = config_of_moe(mlp_only_layers=[1, 4])
    assert shorten(config, kept)["mlp_only_layers"] == expected


def test_block_numbers_as_many_as_blocks_are_still_numbers() -> None:
    """llama4's list of expert blocks has one entry per block where all blocks have experts."""
    config = AutoConfig.for_model(
        "llama4_text", **_GROUPED, head_dim=8, num_local_experts=2, interleave_moe_layer_step=1
    )
    assert config.moe_layers == [0, 1, 2, 3, 4, 5]
    assert shorten(config, [1, 3, 4])["moe_layers"] == [0, 1, 2]


@pytest.mark.parametrize(
    "variant, name",
    [
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("bloom", "n_layer"),
        ("mpt", "n_layers"),
    ],
)
def test_the_count_is_written_under_the_name_of_the_type(variant: str, name: str) -> None:
    result = shorten(config_of(variant), [0, 2])
    assert result[name] == 2
    assert not {"num_hidden_layers", "n_layer", "n_layers"}.intersection(result) - {name}


def test_the_count_is_written_where_the_file_leaves_it_out() -> None:
    config = config_of("gpt2")
    assert shorten_config({"model_type": "gpt2"}, config, [0, 2])["n_layer"] == 2
    raw = {"model_type": "gpt2", "num_hidden_layers": 6}
    assert shorten_config(raw, config, [0, 2])["num_hidden_layers"] == 2


def test_a_list_no_rule_knows_is_refused_by_name() -> None:
    config = config_of("llama")
    config.dropout_by_depth = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    with pytest.raises(
        UnsupportedModelError, match="config field 'dropout_by_depth' has as many entries"
    ):
        shorten(config, [0, 1])
    assert shorten(config, list(range(6)))["dropout_by_depth"] == config.dropout_by_depth
    config.dropout_by_depth.append(0.7)  # of another length: nothing to do with blocks
    assert shorten(config, [0, 1])["dropout_by_depth"] == config.dropout_by_depth


def test_token_lists_as_long_as_the_model_stay() -> None:
    config = config_of("llama")
    config.eos_token_id = [2, 3, 4, 5, 6, 7]
    assert shorten(config, [0, 1])["eos_token_id"] == [2, 3, 4, 5, 6, 7]


def test_a_config_that_names_single_blocks_is_refused() -> None:
    quantized = {
        "quantization_config": {
            "quant_method": "some",
            "ignore": ["lm_head", "model.layers.11.mlp.down_proj"],
        }
    }
    with pytest.raises(
        UnsupportedModelError, match=r"names a single block \('model.layers.11.mlp.down_proj'\)"
    ):
        refuse_block_names_in_config(quantized, "model.layers")
    with pytest.raises(UnsupportedModelError, match=r"\('re:.*model.layers.3.*'\)"):
        refuse_block_names_in_config({"a": {"re:.*model.layers.3.*": [1]}}, "model.layers")
    refuse_block_names_in_config(quantized, "transformer.h")
    refuse_block_names_in_config({"ignore": ["lm_head", "re:model.layers.*.mlp"]}, "model.layers")


def test_surgery_refuses_a_config_that_names_single_blocks(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    raw["note"] = ["model.layers.2.mlp.gate_proj"]
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match="names a single block"):
        shortened(open_checkpoint(source), [0], tmp_path / "short")
    assert list(tmp_path.iterdir()) == [source]


# --- types refused by name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, changes, reason",
    [
        ("minimax", {}, "its attention decay depends on block number and count"),
        ("minicpm3", {}, "its residual scale depends on the block count"),
        ("diffllama", {}, "its lambda depends on the block's number"),
        ("rwkv", {}, "its blocks are rescaled by their number"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx divides",
        ),
    ],
)
def test_types_whose_blocks_know_their_number_are_refused(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    config = AutoConfig.for_model(model_type, **changes)
    with pytest.raises(
        UnsupportedModelError, match=f"'{model_type}' cannot be shortened rightly: {reason}"
    ):
        shorten_config(config.to_dict(), config, [0, 1])


def test_multimodal_wrappers_are_refused() -> None:
    config = AutoConfig.for_model("llava")
    with pytest.raises(
        UnsupportedModelError, match="'llava' wraps a text decoder in a multimodal model"
    ):
        shorten_config(config.to_dict(), config, [0, 1])


# --- the guard ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gpt2", "mixtral", "falcon-new"])
def test_signatures_differ_in_nothing_but_the_block_number(variant: str) -> None:
    config = opened(variant).config
    check_signatures(config, config, range(6))
    short = check_removal(opened(variant), [0, 2, 5])
    assert len(find_blocks(*both(type(config).from_dict(short)))[1]) == 3


def both(config: Any) -> tuple[nn.Module, Any]:
    return build_empty(config), config


def test_a_block_of_another_kind_is_named_with_its_attribute() -> None:
    original, wrong = config_of("gemma2"), config_of("gemma2", num_hidden_layers=5)
    message = (
        r"'gemma2' would turn block 1 into a different block: \S+ is .* instead of .*No rule covers"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        check_signatures(original, wrong, [1, 2, 3, 4, 5])


def test_a_config_that_builds_another_number_of_blocks_is_refused() -> None:
    config = config_of("llama")
    with pytest.raises(
        UnsupportedModelError, match="asked for 5 blocks, the shortened config builds 6"
    ):
        check_signatures(config, config, range(5))


def test_a_changed_tensor_outside_the_blocks_is_refused() -> None:
    wrong = config_of("llama", num_hidden_layers=5, vocab_size=98)
    with pytest.raises(
        UnsupportedModelError, match=r"shape of model.embed_tokens.weight is \(98, 32\)"
    ):
        check_signatures(config_of("llama"), wrong, range(5))


def test_difference_of_signatures() -> None:
    signature = {"layer_idx": 4, "attn.scale": 0.5, "class of mlp": "MLP", "flag": True}
    assert difference(signature, {**signature, "layer_idx": 2}, 4, 2) is None
    assert (
        difference(signature, {**signature, "layer_idx": 3}, 4, 2) == "layer_idx is 3 instead of 4"
    )
    assert (
        difference(signature, {**signature, "attn.scale": 0.25}, 4, 2)
        == "attn.scale is 0.25 instead of 0.5"
    )
    assert (
        difference(signature, {**signature, "extra": 1}, 4, 2) == "extra is 1 instead of 'absent'"
    )
    del signature["flag"]
    assert (
        difference({**signature, "flag": True}, signature, 4, 2)
        == "flag is 'absent' instead of True"
    )
    # block 1 kept as block 0: a flag is no number
    assert difference({"flag": True}, {"flag": False}, 1, 0) == "flag is False instead of True"


def test_a_signature_sees_shapes_classes_and_attributes() -> None:
    block = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.25))
    block.window = 7  # type: ignore[assignment]
    block.register_buffer("table", torch.zeros(4))
    signature = block_signature(block)
    assert signature["class of block"] == "Sequential"
    assert signature["class of 0"] == "Linear"
    assert signature["shape of 0.weight"] == (3, 2)
    assert signature["shape of table"] == (4,)
    assert signature["1.p"] == 0.25
    assert signature["window"] == 7


# --- right by a rule, or refused: never silently wrong --------------------------------------------


def config_of_moe(**changes: Any) -> Any:
    arguments = {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return AutoConfig.for_model(
        "qwen3_moe", **{**arguments, "moe_intermediate_size": 16, **changes}
    )


LLAMA4 = {
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 8,
    "head_dim": 8,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
}
JAMBA = {
    "num_experts": 4,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
}
PER_LAYER = {
    "head_dim": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 97,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}

ODD_TYPES: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "qwen3_moe-listed": ({**EXPERTS, "moe_intermediate_size": 16, "mlp_only_layers": [1, 4]}, []),
    "qwen3_moe-period": (
        {**EXPERTS, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
        [[0], [2], [1, 3]],
    ),
    "llama4_text": ({**LLAMA4, "interleave_moe_layer_step": 2}, []),
    "deepseek_v3": (DEEPSEEK, []),
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5},
        [],
    ),
    "cohere2": ({"sliding_window": WINDOW}, []),
    "lfm2": ({}, []),
    "jamba": (JAMBA, [[0], [2], [1, 3]]),
    "gemma4_text": (PER_LAYER, [[0], [2], [1, 3], [3, 4, 5]]),
    "gpt_neox_japanese": ({"intermediate_multiple_size": 2}, [[3, 4, 5]]),
    "xlstm": ({}, [[0], [2], [1, 3], [3, 4, 5]]),
}
"""Type -> arguments, and which of the removals below are refused."""


@pytest.mark.parametrize("name", ODD_TYPES)
def test_odd_types_are_right_or_refused(name: str, tmp_path: Path) -> None:
    arguments, refused = ODD_TYPES[name]
    config = AutoConfig.for_model(name.split("-")[0], **{**_GROUPED, **arguments})
    checkpoint = open_checkpoint(save(build(config), tmp_path / "source"))
    model = load(tmp_path / "source")
    for removed in ([0], [2], [1, 3], [3, 4, 5]):
        kept = [block for block in range(6) if block not in removed]
        if removed in refused:
            with pytest.raises(
                UnsupportedModelError,
                match=rf"'{config.model_type}' (would|has)|would (turn|change)",
            ):
                check_removal(checkpoint, kept)
        else:
            short = load(shortened(checkpoint, removed, tmp_path / "short"))
            verify_shortened(name, Decoder(short), bypass_logits(Decoder(model), removed))


# --- block numbers in tensor names ----------------------------------------------------------------


def test_block_names() -> None:
    names = find_block_names(opened("mixtral").tensors, 6, "model.layers")
    assert (names.prefix, names.count) == ("model.layers", 6)
    assert names.block_of("model.layers.4.mlp.experts.2.w1.weight") == 4
    assert names.block_of("model.norm.weight") is None
    assert names.block_of("model.layers.scale") is None
    assert (
        names.renumbered("model.layers.4.mlp.experts.4.w1", 1) == "model.layers.1.mlp.experts.4.w1"
    )


def test_among_towers_the_decoder_is_found() -> None:
    names = [
        f"{prefix}.{b}.w" for prefix in ("vision.blocks", "text.model.layers") for b in range(3)
    ]
    assert find_block_names(names, 3, "language.layers").prefix == "text.model.layers"
    with pytest.raises(
        UnsupportedModelError, match="which tensors belong to which block is not certain"
    ):
        find_block_names(names[:3], 3, "model.layers")


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([0, 1, 3], r"config says 4 blocks, but no tensor of block 2 \('m.layers.2'\) is stored"),
        ([0, 1, 2], r"config says 4 blocks, but no tensor of block 3"),
        ([0, 1, 2, 3, 4], "'m.layers.4' lies behind the last of 4 blocks"),
        ([], "no tensor is named like a block of 'm.layers'"),
    ],
)
def test_blocks_that_do_not_fit_the_count_are_explained(numbers: list[int], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_block_names([f"m.layers.{b}.w" for b in numbers] + ["m.norm"], 4, "m.layers")


def test_saved_families_are_not_changed_by_these_tests() -> None:
    assert open_checkpoint(saved("llama")).fingerprint == opened("llama").fingerprint
