"""Config fields under removal, and the guard that refuses what no rule makes right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import _GROUPED, build, config_of, opened, save, saved
from torch import nn
from transformers import AutoConfig

from shortllm.checkpoint.config import read_config
from shortllm.checkpoint.shorten_config import refuse_type, shorten_config
from shortllm.checkpoint.source import find_block_names, open_checkpoint
from shortllm.checkpoint.structure import block_signature, block_structure, build_empty, find_blocks
from shortllm.errors import UnsupportedModelError
from shortllm.surgery.apply import Renumbering, check_removal, check_signatures, difference


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


@pytest.mark.parametrize("kept, expected", [([0, 1, 2], "LLG"), ([1, 2, 5], None)])
def test_letters_next_to_a_list(kept: list[int], expected: str | None) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    given = {"sliding_window_pattern": "LLG", "layer_types": kinds}
    config = AutoConfig.for_model("exaone4", num_hidden_layers=6, **given)
    assert shorten(config, kept).get("sliding_window_pattern") == expected


def test_a_period_that_the_list_no_longer_follows_goes() -> None:
    config = config_of("smollm3")  # without positions in every third block
    raw = {**config.to_dict(), "no_rope_layer_interval": 3}
    whole = shorten_config(raw, config, [0, 1, 2])  # a whole period is left
    assert (whole["no_rope_layers"], whole["no_rope_layer_interval"]) == ([1, 1, 0], 3)
    other = shorten_config(raw, config, [0, 2, 3, 5])
    assert (other["no_rope_layers"], other["no_rope_layer_interval"]) == ([1, 0, 1, 0], 2)
    none = shorten_config(raw, config, [0, 2, 5])
    assert none["no_rope_layers"] == [1, 0, 0]
    assert "no_rope_layer_interval" not in none


@pytest.mark.parametrize(
    "variant, field, given, kept, expected",
    [
        ("gemma3_text", "sliding_window_pattern", 3, [0, 1, 2, 3, 4, 5], 3),
        ("gemma3_text", "sliding_window_pattern", 3, [0, 2, 3, 5, 6], 2),
        ("gemma3_text", "sliding_window_pattern", 3, [0, 2, 5], None),
        ("qwen3_next", "full_attention_interval", 2, [0, 1, 2], 2),
        ("qwen3_next", "full_attention_interval", 2, [0, 2, 3], 3),
        ("qwen3_next", "full_attention_interval", 2, [1, 2, 3], None),
        ("afmoe", "global_attn_every_n_layers", 2, [0, 2, 3], 3),
        ("cohere2", "sliding_window_pattern", 2, [1, 2, 3], None),
    ],
)
def test_periods_next_to_lists(
    variant: str, field: str, given: Any, kept: list[int], expected: Any
) -> None:
    config = AutoConfig.for_model(variant, num_hidden_layers=7, **{field: given})
    result = shorten_config({**config.to_dict(), field: given}, config, kept)
    assert result.get(field) == expected
    # the list is what the class reads
    assert type(config).from_dict(result).layer_types == [config.layer_types[b] for b in kept]


# --- types refused by name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, changes, reason",
    [
        ("minimax", {}, "its attention decay depends on block number and count"),
        ("diffllama", {}, "its lambda depends on the block's number"),
        ("hrm_text", {}, "its two stacks of blocks run several times per token"),
        ("xlm", {}, "its sublayers are in four lists"),
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
        UnsupportedModelError, match=f"'{model_type}' cannot be shortened correctly: {reason}"
    ):
        refuse_type(config)


# --- rules for single fields ----------------------------------------------------------------------


def test_only_the_text_part_of_a_multimodal_config_changes() -> None:
    config = AutoConfig.for_model("llava")
    raw = {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 32}}
    result = shorten_config(raw, config, [0, 2, 5])
    assert result == {**raw, "text_config": {"model_type": "llama", "num_hidden_layers": 3}}
    bare = shorten_config({"model_type": "llava"}, config, [0, 2])
    assert bare["text_config"] == {"model_type": "llama", "num_hidden_layers": 2}


def test_older_multimodal_configs_hold_the_text_fields_at_the_top() -> None:
    raw = {"model_type": "qwen2_vl", "num_hidden_layers": 4, "vision_config": {}}
    result = shorten_config(raw, AutoConfig.for_model("qwen2_vl", num_hidden_layers=4), [0, 3])
    assert result["num_hidden_layers"] == 2
    assert len(result["layer_types"]) == 2
    assert "text_config" not in result


def test_every_how_manieth_block_becomes_a_list() -> None:
    config = config_of_moe(decoder_sparse_step=2, mlp_only_layers=[1])
    result = shorten(config, [0, 1, 3, 5])
    # of the original only blocks 3 and 5 have experts
    assert (result["decoder_sparse_step"], result["mlp_only_layers"]) == (1, [0, 1])


def test_a_pattern_that_repeats_is_written_out() -> None:
    config = AutoConfig.for_model("recurrent_gemma", num_hidden_layers=6)
    assert shorten(config, [0, 2, 3, 5])["block_types"] == [
        "recurrent",
        "attention",
        "recurrent",
        "attention",
    ]


def test_block_numbers_from_one_stay_so() -> None:
    config = config_of("llama")
    config.ple_layer_ids = [1, 3, 6]
    assert shorten(config, [0, 2, 4])["ple_layer_ids"] == [1, 2]


def test_the_last_block_of_a_kind_is_told_by_number() -> None:
    config = AutoConfig.for_model("ernie4_5_moe", num_hidden_layers=6, moe_layer_end_index=4)
    result = shorten(config, [0, 2, 3, 5])
    assert (result["moe_layer_start_index"], result["moe_layer_end_index"]) == (1, 2)


def test_trailing_blocks_that_share_keys_are_counted_again() -> None:
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=12, num_kv_shared_layers=4)
    assert shorten(config, [0, 1, 5, 7, 9, 11])["num_kv_shared_layers"] == 2


def test_tables_by_block_keep_the_width_of_their_keys() -> None:
    config = config_of("llama", num_hidden_layers=12)
    table = {"05": {"head_dim": 4}, "11": {"head_dim": 8}}
    result = shorten(config, [0, 5, 11], per_layer_config=table)
    assert result["per_layer_config"] == {"01": {"head_dim": 4}, "02": {"head_dim": 8}}


def test_a_letter_per_block_is_cut_too() -> None:
    result = shorten(config_of("llama"), [0, 2, 5], hybrid_override_pattern="M-M*-E")
    assert result["hybrid_override_pattern"] == "MME"


@pytest.mark.parametrize(("pattern", "said"), [("M-M|*-E", "'|' betw"), ("M-M*-E/M", "'/' before")])
def test_a_pattern_with_signs_between_its_letters_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match="signs between the letters") as caught:
        shorten(config_of("llama"), [0, 2, 5], hybrid_override_pattern=pattern)
    assert said in str(caught.value) and f"'{pattern}'" in str(caught.value)
    with pytest.raises(UnsupportedModelError, match="hybrid_override_pattern 'M-M' has 3 letters"):
        shorten(config_of("llama"), [0, 2, 5], hybrid_override_pattern="M-M")


def test_a_pattern_that_transformers_cannot_read_is_explained(tmp_path: Path) -> None:
    raw = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M|*-E"}
    with pytest.raises(UnsupportedModelError, match="Write one letter for each block"):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        read_config(tmp_path, raw)


def test_a_list_that_only_the_file_holds_is_looked_at() -> None:
    with pytest.raises(UnsupportedModelError, match="config field 'of_old' has as many entries"):
        shorten(config_of("llama"), [0, 1], of_old=[1, 2, 3, 4, 5, 6])


def test_a_scale_that_goes_with_the_depth_follows() -> None:
    config = AutoConfig.for_model("minicpm3", num_hidden_layers=9, scale_depth=1.5)
    assert shorten(config, [0, 1, 2, 5])["scale_depth"] == pytest.approx(1.0)


def test_a_pattern_that_no_list_can_say_is_refused_with_its_period(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "jamba", **_GROUPED, num_experts=4, mamba_d_state=4, mamba_dt_rank=4,
        attn_layer_period=3, attn_layer_offset=1,
    )  # fmt: skip
    checkpoint = open_checkpoint(save(build(config), tmp_path / "source"))
    message = "attn_layer_period 3 and expert_layer_period 2.*remove whole periods of 6 blocks"
    with pytest.raises(UnsupportedModelError, match=message):
        check_removal(checkpoint, [1, 2, 3, 4, 5])


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
        UnsupportedModelError, match="5 blocks requested, but the shortened config builds 6"
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
    numbers = Renumbering([1, 3, 4], 6)

    def found(**changes: Any) -> str | None:
        return difference(signature, {**signature, **changes}, 4, numbers)

    assert found(layer_idx=2) is None
    assert found(layer_idx=3) == "layer_idx is 3 instead of 4"
    assert found(layer_idx=2.0) == "layer_idx is 2.0 instead of 4"
    assert found(**{"attn.scale": 0.25}) == "attn.scale is 0.25 instead of 0.5"
    assert found(**{"attn.scale": 0.5 + 1e-12}) is None
    assert found(extra=1) == "extra is 1 instead of 'absent'"
    assert found(flag=False) == "flag is False instead of True"
    # block 1 kept as block 0: a flag is no number
    flag = {"flag": True}
    assert difference(flag, {"flag": False}, 1, numbers) == "flag is False instead of True"


@pytest.mark.parametrize(
    "before, after, fits",
    [
        (list("abcdef"), ["b", "d", "e"], True),  # one entry per block
        (list("abcdef"), ["a", "b", "c"], False),
        ([0, 3, 4], [1, 2], True),  # block numbers
        ([0, 3, 4], [0, 1], False),
        ([True, False], [0], False),  # flags are no numbers
        ({1: 0, 4: 1}, {0: 0, 2: 1}, True),
        ({1: 0, 4: 1}, {1: 0, 4: 1}, False),
        (9, 5, True),  # the second of two places of block 4
        (8, 5, False),
    ],
)
def test_attributes_that_speak_of_several_blocks(before: Any, after: Any, fits: bool) -> None:
    numbers = Renumbering([1, 3, 4], 6, places=2)
    same = before == after
    assert (difference({"x": before}, {"x": after}, 4, numbers) is None) == (fits or same)


def test_attributes_that_refer_to_another_block() -> None:
    def found(after: int) -> str | None:
        reference = "attn.kv_shared_layer_index"
        return difference({reference: 3}, {reference: after}, 4, Renumbering([1, 3, 4], 6))

    assert found(1) is None
    assert found(0) == "attn.kv_shared_layer_index is 0 instead of 3"


@pytest.mark.parametrize(
    "variant, period", [("llama", 1), ("gemma2", 2), ("gemma3_text", 3), ("qwen2", 6)]
)
def test_the_period_of_the_blocks(variant: str, period: int) -> None:
    assert block_structure(opened(variant).config).period == period


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


def config_of_moe(**changes: Any) -> Any:
    arguments = {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return AutoConfig.for_model(
        "qwen3_moe", **{**arguments, "moe_intermediate_size": 16, **changes}
    )


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


def test_blocks_that_transformers_renames_are_known_by_their_size() -> None:
    names = [f"transformer.h.{b}.w" for b in range(3)]
    found = find_block_names(names, 3, "model.layers", fits=lambda prefix: True)
    assert found.prefix == "transformer.h"
    towers = [*names, *(f"vision.{b}.w" for b in range(3))]
    with pytest.raises(UnsupportedModelError, match="is not certain"):
        find_block_names(towers, 3, "model.layers", fits=lambda prefix: True)


def test_prediction_heads_are_no_blocks() -> None:
    stored = [*(f"m.layers.{b}.w" for b in range(5)), "mtp.layers.0.w"]
    names = find_block_names(stored, 4, "m.layers", is_head=lambda prefix, number: number < 6)
    assert (names.count, names.heads) == (4, 1)
    assert names.is_head("mtp.layers.0.w") and not names.is_head("m.norm")
    assert names.new_numbers([0, 3]) == {0: 0, 3: 1, 4: 2}
    assert names.new_numbers([0, 3], drop_heads=True) == {0: 0, 3: 1}
    assert names.block_of("m.layers.4.w") is None
    assert names.is_head("m.layers.4.w") and not names.is_head("m.layers.3.w")


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([0, 1, 3], r"config says 4 blocks, but no tensor of block 2 \('m.layers.2'\) is stored"),
        ([0, 1, 2], r"config says 4 blocks, but no tensor of block 3"),
        ([0, 1, 2, 3, 4], "'m.layers.4' lies behind the last of 4 blocks.*not a prediction head"),
        ([], "no tensor is named like a block of 'm.layers'"),
    ],
)
def test_blocks_that_do_not_fit_the_count_are_explained(numbers: list[int], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_block_names([f"m.layers.{b}.w" for b in numbers] + ["m.norm"], 4, "m.layers")


def test_saved_families_are_not_changed_by_these_tests() -> None:
    assert open_checkpoint(saved("llama")).fingerprint == opened("llama").fingerprint
