"""References to blocks in a checkpoint's files: found, rewritten, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from architectures import NOT_BUILDABLE, model_types, tiny_config
from families import config_of, saved

import shortllm
from shortllm.checkpoint.config import block_count
from shortllm.checkpoint.names import BlockTexts
from shortllm.checkpoint.references import Reference, Survey
from shortllm.checkpoint.shorten_config import refuse_type, shorten_config
from shortllm.checkpoint.structure import block_structure
from shortllm.errors import UnsupportedModelError

PLANTED: dict[str, Any] = {
    "quantization_config": {
        "ignore": ["lm_head", r"re:.*layers\.(0|1|4)\.mlp.*", "model.layers.3.self_attn.q_proj"],
        "layer_bits": {"00": 4, "03": 8, "04": 2},
    },
    "draft_config": {"model_type": "llama", "num_hidden_layers": 1, "target_layer_ids": [1, 4]},
}
FOLLOWED = {
    "ignore": ["lm_head", r"re:.*layers\.(0|3)\.mlp.*", "model.layers.2.self_attn.q_proj"],
    "layer_bits": {"00": 4, "02": 8, "03": 2},
}
"""What becomes of the quantizer's part without block 1."""


def texts(count: int, removed: set[int], *prefixes: str) -> BlockTexts:
    kept = [block for block in range(count) if block not in removed]
    parts = ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.0.w1", "mlp.experts.3.w1")
    return BlockTexts(
        prefixes=prefixes or ("model.layers",),
        tensors=[
            *(f"{(prefixes or ('model.layers',))[0]}.{b}.{one}.weight" for b in range(count)
              for one in parts),
            "lm_head.weight", "visual.blocks.0.attn.qkv.weight", "visual.blocks.3.attn.qkv.weight",
        ],
        new_number={old: new for new, old in enumerate(kept)},
        total=count,
    )  # fmt: skip


def surveyed(config: Any, kept: list[int], raw: dict[str, Any], **files: Any) -> Any:
    """The config and files after the removal, and what was found without a rule."""
    count = block_count(config)
    survey = Survey(
        texts=texts(count, set(range(count)) - set(kept)), kept=kept, count=count, config=config
    )
    new = survey.of_config(raw, skip=("shortllm",))
    others = {name: survey.of_file(f"{name}.json", content) for name, content in files.items()}
    return new, others, [one for one in survey.found.values() if one.rule is None]


# ---- names and patterns


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model.layers.7.mlp.down_proj", "model.layers.5.mlp.down_proj"),
        ("model.layers.4.mlp.up_proj", None),
        ("layers.5", "layers.3"),
        ("base_model.model.model.layers.5.mlp", "base_model.model.model.layers.3.mlp"),
        ("language_model.model.layers.7", "language_model.model.layers.5"),
        ("model/layers/5/mlp", "model/layers/3/mlp"),
        ("model.layers[5].mlp", "model.layers[3].mlp"),
        ("blk.5.attn_q.weight", "blk.3.attn_q.weight"),
        ("layer_5", "layer_3"),
        ("layer_3", None),
        ("model.layers.5.mlp,model.layers.3.mlp", "model.layers.3.mlp"),
        ("model.layers.5.mlp;model.layers.3.mlp", "model.layers.3.mlp"),
        ("lora_model_layers_5_mlp", "lora_model_layers_3_mlp"),
        ("block 5", "block 3"),
        # regular expressions
        (r"re:.*layers\.(0|3|7)\..*", r"re:.*layers\.(0|5)\..*"),
        (r"re:model\.layers\.[0-3]\.mlp.*", r"re:model\.layers\.(?:0|1|2)\.mlp.*"),
        (r"re:.*layers\.[567]", r"re:.*layers\.(?:3|4|5)"),
        ("re:model.layers.5.mlp.*", "re:model.layers.3.mlp.*"),
        (r"+:.*\.5\..*mlp.*", r"+:.*\.3\..*mlp.*"),
        (r"-:model\.layers\.3\..*", None),
        (r"re:.*layers\.7\.mlp\.experts\.\d+\..*", r"re:.*layers\.5\.mlp\.experts\.\d+\..*"),
        (r"^(?!.*layers\.5\.).*$", r"^(?!.*layers\.3\.).*$"),
        (r"re:(model\.layers\.5\.mlp|lm_head)", r"re:(model\.layers\.3\.mlp|lm_head)"),
        (r"re:.*layers\.(3|4)\..*|.*lm_head.*", r"re:.*layers\.(?!)\..*|.*lm_head.*"),
        ("model.layers.5.*_proj", "model.layers.3.*_proj"),
        # a fused module, whose name no tensor has
        (r"re:.*layers\.6\.self_attn\.qkv_proj$", r"re:.*layers\.4\.self_attn\.qkv_proj$"),
        # wildcards
        ("model.layers.5*", "model.layers.3*"),
        ("model.layers.7.*", "model.layers.5.*"),
        ("*.layers.4.*", None),
    ],
)
def test_what_becomes_of_a_name_or_pattern(text: str, expected: str | None) -> None:
    found = texts(8, {3, 4}).renamed(text)
    assert found is not None and not found.problem
    assert found.texts == (() if expected is None else (expected,))


@pytest.mark.parametrize(
    "text",
    [
        "lm_head", "re:.*mlp.*", r"re:.*layers\.\d+\.mlp", "re:model.layers.*.mlp",
        r"re:.*experts\.(0|3)\..*", "visual.blocks.3.attn", r"re:visual\.blocks\.3\..*",
        "vision_tower.layers.5.mlp", "mtp.layers.0.mlp", "4.57.1", "model.layers.99.mlp",
    ],
)  # fmt: skip
def test_what_names_no_single_block_stays(text: str) -> None:
    assert texts(8, {3, 4}).renamed(text) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        # as a regular expression this is blocks 1, 10 and 11
        ("re:model.layers.1.*", "re:model.layers.(?:1|8|9).*"),
        (r"re:.*layers\.\d\..*", r"re:.*layers\.(?:0|1|2|3|4|5|6|7)\..*"),
        (r"re:.*layers\.1[01]\..*", r"re:.*layers\.(?:8|9)\..*"),
        ("re:.*layers.11.mlp.*", "re:.*layers.9.mlp.*"),
    ],
)
def test_numbers_of_two_digits(text: str, expected: str) -> None:
    found = texts(12, {3, 4}).renamed(text)
    assert found is not None and found.texts == (expected,)


def test_a_whole_block_does_not_become_the_start_of_other_names() -> None:
    """`model.layers.1` is taken for the start of `model.layers.10` too by transformers."""
    found = texts(14, {0, 1}).renamed("model.layers.3")
    assert found is not None
    assert found.texts == ("model.layers.1.mlp", "model.layers.1.self_attn")


@pytest.mark.parametrize("text", [
    "model.layers.1*", "model.layers.1.*", "foo.layers.5", "model.layers.3,4,5", "layers.5-7",
    "model.layers[3:7]", "model.layers.{0,3}.mlp", "*5.mlp*",
])  # fmt: skip
def test_what_cannot_be_said_safely_is_a_problem(text: str) -> None:
    found = texts(12, {3, 4}).renamed(text)
    assert found is not None and found.problem


# ---- fields


def test_each_kind_of_reference() -> None:
    files = {
        "generation_config": {
            "alignment_heads": [[1, 0], [3, 2], [5, 1, 0.5]],
            "assistant_early_exit": 4,
            "forced_decoder_ids": [[1, 5]],
        },
        "quantize_config": {"model.layers.5.mlp": {"bits": 2}, "model.layers.3.mlp": {"bits": 8},
                            "modules": [{"name": "model.layers.3.mlp"}, {"name": "layers.4"}]},
        "params": {"n_layers": 6, "dim": 32},
    }  # fmt: skip
    _, new, unknown = surveyed(config_of("llama"), [0, 1, 2, 5], {}, **files)
    assert not unknown
    assert new["generation_config"] == {
        "alignment_heads": [[1, 0], [3, 1, 0.5]],
        "assistant_early_exit": 3,
        "forced_decoder_ids": [[1, 5]],
    }
    assert new["quantize_config"] == {"model.layers.3.mlp": {"bits": 2}, "modules": []}
    assert new["params"] == {"n_layers": 4, "dim": 32}


@pytest.mark.parametrize(
    "field, value, kind",
    [
        ("retrieval_heads", [[1, 0], [3, 2]], "pairs"),
        ("skip_layers", [1, 3], "block numbers"),
        ("exit_layer", 4, "block number"),
        ("skip_layers", "0,3,5", "block numbers"),
        ("layer_windows", [8, 16, 8, 16, 8, 16], "entry per block"),
        ("layer_pattern", "M-M*-M", "entry per block"),
        ("scaling_factor", {str(b): 0.5 for b in range(6)}, "table of blocks"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "block numbers"),
        ("draft", {"num_hidden_layers": 1, "feature_layers": [1, 3, 5]}, "block numbers"),
        ("note", "not model.layers.3 alone", "name"),
        ("kv_cache_dtype_skip_layers", ["0", "3", "sliding"], "block numbers"),
        ("heads_to_prune", {"0": [1], "3": [2]}, "table of blocks"),
        ("attn_layers", [0, 2], "block numbers"),
        ("frozen_layers", ["lm_head", 5], "block number"),
        ("layer_sizes", "48,48,48,48,48,48", "block numbers"),
        ("layer_config", {"attention": {"0": "full", "5": "none"}}, "table of blocks"),
        ("cache", {"layer_scales": [0.5] * 6}, "entry per block"),
        ("alignment_heads", [[30, 0], [5, 1]], "pairs"),
        ("layer_bits", {"0-2": {"bits": 4}, "3-5": {"bits": 2}}, "table of blocks"),
        ("layer_bits", {"L0": {"bits": 4}, "L3": {"bits": 2}}, "table of blocks"),
    ],
)
def test_a_field_without_a_rule_is_named(field: str, value: Any, kind: str) -> None:
    for raw, files in (({field: value}, {}), ({}, {"generation_config": {field: value}})):
        new, others, [found] = surveyed(config_of("llama"), [0, 1, 2, 5], raw, **files)
        assert (found.kind, found.rule) == (kind, None)
        assert found.field.split(".")[0] == field
        assert {**new, **others.get("generation_config", {})} == {field: value}


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers_per_stage", 2),
        ("lora_rank_per_layer", 4),
        ("num_frozen_layers", 0),
        ("trainable_token_indices", [1, 2, 3]),
        ("frame_indices", [0, 1, 2]),
        ("num_gpu_blocks", 5),
        ("device_map", {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}),
        ("shapes", {"model.layers.0.mlp.scales": 5, "talker.layers.1.mlp.scales": 5}),
        ("draft_config", {"num_hidden_layers": 1, "max_window_layers": 1}),
        ("adapter_config", {"vit_layers": [-3, -5]}),
    ],
)
def test_what_refers_to_no_block_is_no_alarm(field: str, value: Any) -> None:
    for raw, files in (({field: value}, {}), ({}, {"other": {field: value}})):
        new, others, unknown = surveyed(config_of("llama"), [0, 1, 2, 5], raw, **files)
        assert not unknown, [str(one) for one in unknown]
        assert {**new, **others.get("other", {})} == {field: value}


def test_fields_of_published_configs_that_no_class_reads_have_rules() -> None:
    raw = {
        "num_hidden_layers": 6,
        "attn_type_list": [1, 0, 1, 1, 1, 0],
        "num_shared_expert": [1] * 6,
        "moe_layer_num_skipped": 3,
    }
    _, _, unknown = surveyed(config_of("llama"), [0, 1, 2, 5], raw)
    assert not unknown
    assert (
        shorten_config(raw, config_of("llama"), [0, 2, 5]).items()
        >= {
            "attn_type_list": [1, 1, 0],
            "num_shared_expert": [1] * 3,
            "moe_layer_num_skipped": 2,
        }.items()
    )


def test_a_table_of_blocks_may_have_other_entries() -> None:
    bits = {
        "layer_bits": {"default": 4, "3": 8, "5": 2},
        "layer_heads": {"block 3": 1, "block 5": 2},
    }
    new, _, unknown = surveyed(config_of("llama"), [0, 1, 2, 5], bits)
    assert not unknown
    assert new == {"layer_bits": {"default": 4, "3": 2}, "layer_heads": {"block 3": 2}}


def test_blocks_that_a_table_maps_to_blocks_have_no_rule() -> None:
    shared = {"kv_share_layers": {"3": 2, "5": 4}}
    new, _, unknown = surveyed(config_of("llama"), [0, 1, 2, 5], shared)
    assert new == shared
    assert unknown[0].kind == "table of blocks"


@pytest.mark.parametrize("file", ["trainer_state.json", "args.json", "vocab_bpe.json"])
def test_reports_of_a_training_and_tokens_are_not_read(model: Path, file: str) -> None:
    before = shortllm.info(model, probe=False).companions
    change(model / file, layers=[1, 3], blocks=6, layer_3=5)
    assert shortllm.info(model, probe=False).companions == before


@pytest.mark.parametrize(
    "field, value", [("alignment_heads", [[3, 0]]), ("layers_to_transform", [3, 4])]
)
def test_lists_of_removed_blocks_alone_are_an_error(field: str, value: list[Any]) -> None:
    """For peft an empty list means all blocks."""
    message = f"`{field}` names only removed blocks.* Choose other blocks, or delete"
    with pytest.raises(UnsupportedModelError, match=message):
        surveyed(config_of("llama"), [0, 1], {}, generation_config={field: value})


@pytest.mark.parametrize("model_type", [one for one in model_types() if one not in NOT_BUILDABLE])
def test_no_type_has_a_false_alarm_and_none_goes_silently_wrong(model_type: str) -> None:
    config = tiny_config(model_type)
    try:
        count = block_count(config)
        refuse_type(config)
    except UnsupportedModelError:
        return  # every removal is refused
    kept = [block for block in range(count) if block != 1]
    raw = json.loads(config.to_json_string(use_diff=False))
    plain, _, unknown = surveyed(config, kept, raw)
    assert not unknown, [str(one) for one in unknown]
    counts = {name for name in raw if plain[name] != raw[name]}  # also stated beside the text part
    assert counts <= {"num_hidden_layers"}
    heads = {"alignment_heads": [[0, 3], [1, 0], [4, 1]]}
    new, others, [draft] = surveyed(config, kept, {**raw, **PLANTED}, generation_config=heads)
    assert {name: new["quantization_config"][name] for name in FOLLOWED} == FOLLOWED
    assert others["generation_config"] == {"alignment_heads": [[0, 3], [3, 1]]}
    assert (draft.field, draft.rule) == ("draft_config.target_layer_ids", None)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [one for one in model_types() if one not in NOT_BUILDABLE])
def test_names_of_every_type_are_followed(model_type: str) -> None:
    """Under the name of the type's own list of blocks, literally and as a pattern."""
    config = tiny_config(model_type)
    try:
        count, place = block_count(config), block_structure(config).name
        refuse_type(config)
    except UnsupportedModelError:
        return  # every removal is refused
    names = texts(count, {1}, place)
    escaped = place.replace(".", r"\.")
    for text, expected in (
        (f"{place}.4.mlp.up_proj", (f"{place}.3.mlp.up_proj",)),
        (rf"re:^{escaped}\.(1|4)\..*", (rf"re:^{escaped}\.(3)\..*",)),
        (f"{place}.1.mlp", ()),
    ):
        found = names.renamed(text)
        assert found is not None and not found.problem
        assert [one.replace("(3)", "3") for one in found.texts] == [
            one.replace("(3)", "3") for one in expected
        ]


# ---- whole checkpoints


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Llama with planted references that have rules."""
    source = tmp_path / "model"
    shutil.copytree(saved("llama"), source)
    change(source / "config.json", quantization_config=PLANTED["quantization_config"])
    change(source / "generation_config.json", alignment_heads=[[0, 3], [1, 0], [4, 1]])
    return source


def change(file: Path, **fields: Any) -> None:
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**held, **fields}))


def test_pruning_rewrites_what_it_carries(model: Path, tmp_path: Path) -> None:
    short = shortllm.prune(model, [1], tmp_path / "short", verify=False)
    written = json.loads((short / "generation_config.json").read_text())
    assert written["alignment_heads"] == [[0, 3], [3, 1]]
    config = json.loads((short / "config.json").read_text())
    assert config["quantization_config"] == FOLLOWED
    assert config["shortllm"]["draft_reads"] == {"original": [2, 3], "now": [1, 2]}
    record = json.loads((short / "prune.json").read_text())
    assert (
        "generation_config.json: `alignment_heads` refers to blocks; renumbered" in record["notes"]
    )


def test_an_unknown_reference_stops_surgery_unless_accepted(model: Path, tmp_path: Path) -> None:
    change(model / "generation_config.json", retrieval_heads=[[1, 0], [4, 1]])
    message = "generation_config.json: `retrieval_heads` refers to blocks; no rule for it"
    with pytest.raises(UnsupportedModelError, match=f"{message}.*--accept-unknown-references"):
        shortllm.prune(model, [1], tmp_path / "short", verify=False)
    assert not (tmp_path / "short").exists()
    short = shortllm.prune(
        model, [1], tmp_path / "short", verify=False, accept_unknown_references=True
    )
    assert message in json.loads((short / "prune.json").read_text())["notes"]
    written = json.loads((short / "generation_config.json").read_text())
    assert written["retrieval_heads"] == [[1, 0], [4, 1]]


def test_info_lists_the_companions(model: Path) -> None:
    found: list[Reference] = shortllm.info(model, probe=False).companions
    assert {(one.file, one.field, one.kind) for one in found} == {
        ("config.json", "quantization_config.ignore", "pattern"),
        ("config.json", "quantization_config.layer_bits", "table of blocks"),
        ("generation_config.json", "alignment_heads", "pairs"),
    }
    assert all(one.rule == "renumbered" for one in found)
