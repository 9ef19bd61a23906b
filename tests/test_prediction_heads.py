"""Prediction heads go through surgery and every later stage bit by bit, or go without a trace.

mtp.*              qwen3_5_text, whose class in transformers ignores these names
model.layers.6.*   deepseek_v3, whose class ignores such a head only behind 61 blocks
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import retraining
import torch
from safetensors.torch import load_file, save_file
from test_quantize import quantizes
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

import shortllm
from shortllm.checkpoint.shorten_config import shorten_config
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS, read_json, write_json
from shortllm.cli import app
from shortllm.embedded import MODEL_DIR
from shortllm.errors import OutputError, UnsupportedModelError
from shortllm.model.streamed import open_streamed
from shortllm.runtime import quiet_transformers
from shortllm.surgery.verify import bypass_logits

BLOCKS = 6

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * BLOCKS,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_shared_experts": 1,
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "first_k_dense_replace": 0,
    },
}  # fmt: skip

COUNTS = {"qwen3_5_text": "mtp_num_hidden_layers", "deepseek_v3": "num_nextn_predict_layers"}

Tensors = dict[str, Tensor]


def with_head(family: str, directory: Path) -> Path:
    """A tiny model with a tokenizer and a prediction head."""
    config = AutoConfig.for_model(
        family, vocab_size=1024, hidden_size=64, intermediate_size=64, num_hidden_layers=BLOCKS,
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, **SHAPES[family],
    )  # fmt: skip
    families.save(families.build(config), directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / name, directory / name)
    tensors = load_file(directory / SAFETENSORS)
    last = f"model.layers.{BLOCKS - 1}."
    block = {name.removeprefix(last): t + 0.1 for name, t in tensors.items() if last in name}
    own = {"eh_proj.weight": torch.randn(64, 128), "enorm.weight": torch.ones(64)}
    if family == "deepseek_v3":
        head = {f"model.layers.{BLOCKS}.{name}": t for name, t in {**block, **own}.items()}
    else:
        head = {f"mtp.layers.0.{name}": t for name, t in block.items()}
        head |= {"mtp.fc.weight": own["eh_proj.weight"], "mtp.norm.weight": own["enorm.weight"]}
    save_file(tensors | head, directory / SAFETENSORS, metadata={"format": "pt"})
    set_config(directory, **{COUNTS[family]: 1})
    return directory


def set_config(directory: Path, **fields: Any) -> None:
    config = {**read_json(directory / "config.json"), **fields}
    shown = {key: value for key, value in config.items() if value is not None}
    write_json(directory / "config.json", shown)


def head_of(directory: Path) -> Tensors:
    """The stored tensors of the prediction head, by names that do not depend on the block count."""
    behind = f"model.layers.{read_json(directory / 'config.json')['num_hidden_layers']}."
    return {
        name.replace(behind, "head."): tensor
        for name, tensor in load_file(directory / SAFETENSORS).items()
        if name.startswith((behind, "mtp."))
    }


def require_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


def require_loads(directory: Path) -> None:
    """Plain transformers misses nothing, and reports the head at most."""
    with quiet_transformers():
        _, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    blocks = read_json(directory / "config.json")["num_hidden_layers"]
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    beside = [n for n in loading["unexpected_keys"] if not n.startswith(f"model.layers.{blocks}.")]
    assert not beside


@pytest.fixture(scope="module", params=sorted(SHAPES))
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without blocks 1 and 3, beside the source."""
    place = tmp_path_factory.mktemp(request.param)
    source = with_head(request.param, place / "source")
    return shortllm.prune(source, blocks=[1, 3], out=place / "pruned")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return retraining.text(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def text(rows: Path) -> dict[str, Any]:
    return {"data": rows, "samples": 4, "length": 16}


def retrain(method: str) -> Callable[[Path, Path, Path], object]:
    def by_method(model: Path, out: Path, rows: Path) -> object:
        how = retraining.options(method=method, data=str(rows), form="text", max_steps=1)
        return shortllm.retrain(model, out, options=how)

    return by_method


STAGES: dict[str, Callable[[Path, Path, Path], object]] = {
    "prune": lambda model, out, rows: shortllm.prune(model, blocks=[2], out=out),
    "heal": lambda model, out, rows: shortllm.heal(model, out, **text(rows)),
    "full": retrain("full"),
    "lora": retrain("lora"),
    "merge": lambda model, out, rows: shortllm.merge(model, out, blocks=[2], **text(rows)),
    "width": lambda model, out, rows: shortllm.width(
        model, out, ratio=0.5, importance="l1", start=0, end=4, shapes="uniform"
    ),
    "sublayers": lambda model, out, rows: shortllm.drop_sublayers(
        model, out, attention=[1, 2], mlp=[2]
    ),
    "quantize": lambda model, out, rows: shortllm.quantize(model, out, method="int8"),
}

REFUSED = {("deepseek_v3", stage) for stage in ("merge", "width", "sublayers", "quantize")}
"""What a stage cannot do to a type, with a head or without."""


@pytest.mark.parametrize(
    "stage", [pytest.param(n, marks=quantizes if n == "quantize" else ()) for n in STAGES]
)
def test_every_stage_carries_the_head_through(
    pruned: Path, stage: str, rows: Path, tmp_path: Path
) -> None:
    family = read_json(pruned / "config.json")["model_type"]
    expected = head_of(pruned.with_name("source"))
    require_equal(head_of(pruned), expected)
    out = tmp_path / "out"
    if (family, stage) in REFUSED:
        with pytest.raises(UnsupportedModelError):
            STAGES[stage](pruned, out, rows)
        return
    STAGES[stage](pruned, out, rows)
    require_equal(head_of(out), expected)
    config = read_json(out / "config.json")
    assert config[COUNTS[family]] == 1
    assert config["shortllm"]["prediction_heads"] == "kept"
    assert "still belongs to the unpruned model" in (out / "README.md").read_text()
    records = [read_json(path) for path in out.glob("*.json")]
    [notes] = [record["notes"] for record in records if "notes" in record]
    assert "still belongs to the unpruned model" in notes[0]
    if stage == "width":
        assert "cannot load it" in notes[0]
    require_loads(out)


@pytest.mark.parametrize("verify", [True, False])
def test_a_dropped_head_leaves_no_trace(pruned: Path, verify: bool, tmp_path: Path) -> None:
    source = shutil.copytree(pruned.with_name("source"), tmp_path / "source")
    set_config(
        source,
        mtp_use_dedicated_embeddings=False,
        quantization_note={"modules_to_not_convert": ["lm_head", "mtp.fc"], "mtp_config": {"n": 1}},
    )
    write_json(source / "generation_config.json", {"use_mtp": True, "do_sample": False})
    out = shortllm.prune(source, blocks=[1], out=tmp_path / "out", verify=verify, drop_heads=True)
    assert not head_of(out)
    families.load(out)  # nothing missing, nothing unexpected
    config = read_json(out / "config.json")
    record, said = read_json(out / "prune.json"), config.pop("shortllm")
    assert said["prediction_heads"] == "dropped" and "left out" in record["notes"][0]
    assert "prediction head left out" in (out / "README.md").read_text()
    assert config.pop("num_nextn_predict_layers", 0) == 0
    assert "mtp" not in json.dumps(config) and "nextn" not in json.dumps(config)
    assert config["quantization_note"] == {"modules_to_not_convert": ["lm_head"]}
    assert read_json(out / "generation_config.json") == {"do_sample": False}
    assert getattr(AutoConfig.from_pretrained(out), "num_mtp_layers", 0) == 0
    again = shortllm.prune(out, blocks=[1], out=tmp_path / "again")
    assert not any("prediction" in note for note in read_json(again / "prune.json")["notes"])


def test_with_and_without_the_head_are_two_results(pruned: Path, tmp_path: Path) -> None:
    source = pruned.with_name("source")
    shortllm.prune(source, blocks=[1], out=tmp_path / "out", verify=False)
    with pytest.raises(OutputError, match="drop_heads"):
        shortllm.prune(source, blocks=[1], out=tmp_path / "out", verify=False, drop_heads=True)


def test_the_head_behind_the_last_block_is_renumbered(tmp_path: Path) -> None:
    source = with_head("deepseek_v3", tmp_path / "source")
    short = shortllm.prune(source, blocks=[0, 4], out=tmp_path / "short")
    names = open_checkpoint(short).block_names
    assert (names.count, names.heads) == (4, 1)
    heads = open_checkpoint(short).prediction_heads
    assert heads is not None and heads.places == ["model.layers.4"] and heads.unexpected
    note, _ = read_json(short / "prune.json")["notes"]
    assert "reports these tensors as unexpected" in note and "--drop-heads" in note


def test_several_heads_keep_their_order(tmp_path: Path) -> None:
    source = with_head("deepseek_v3", tmp_path / "source")
    tensors = load_file(source / SAFETENSORS)
    tensors |= {
        name.replace("layers.6.", "layers.7."): tensor + 1
        for name, tensor in tensors.items()
        if "layers.6." in name
    }
    save_file(tensors, source / SAFETENSORS, metadata={"format": "pt"})
    set_config(source, num_nextn_predict_layers=2)
    short = shortllm.prune(source, blocks=[0, 1, 2], out=tmp_path / "short")
    found = load_file(short / SAFETENSORS)
    for old, new in ((6, 3), (7, 4)):
        name = "model.layers.{}.eh_proj.weight"
        assert found[name.format(new)].equal(tensors[name.format(old)])
    assert len(open_checkpoint(short).parameters_per_block) == 3


@pytest.mark.parametrize("family", SHAPES)
def test_info_names_the_head_with_and_without_a_field(family: str, tmp_path: Path) -> None:
    source = with_head(family, tmp_path / "source")
    place = {"qwen3_5_text": "mtp", "deepseek_v3": "model.layers.6"}[family]
    for count in (1, 0, None):
        set_config(source, **{COUNTS[family]: count})
        found = CliRunner().invoke(app, ["info", str(source), "--no-probe", "--json"])
        said = json.loads(found.stdout)["prediction_heads"]
        assert said["places"] == [place] and said["tensors"] == len(head_of(source))
        assert said["fields"] == ([] if count is None else [COUNTS[family]])
    shown = CliRunner().invoke(app, ["info", str(source), "--no-probe"]).stdout
    assert f"prediction head, MTP ({place}: " in shown


def test_blocks_behind_the_last_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    source = with_head("deepseek_v3", tmp_path / "source")
    tensors = load_file(source / SAFETENSORS)
    del tensors["model.layers.6.eh_proj.weight"]
    save_file(tensors, source / SAFETENSORS, metadata={"format": "pt"})
    set_config(source, num_nextn_predict_layers=0)
    with pytest.raises(UnsupportedModelError, match="behind the last of 6 blocks, and it is not"):
        shortllm.prune(source, blocks=[1], out=tmp_path / "out")


def test_a_head_behind_a_gap_is_refused_as_one(tmp_path: Path) -> None:
    source = with_head("deepseek_v3", tmp_path / "source")
    tensors = {n.replace("s.6.", "s.8."): t for n, t in load_file(source / SAFETENSORS).items()}
    save_file(tensors, source / SAFETENSORS, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"head 'model.layers.8' .* 'model.layers.6'"):
        shortllm.prune(source, blocks=[1], out=tmp_path / "out")


def test_lists_that_go_on_with_the_heads(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "deepseek_v3", num_hidden_layers=4, num_nextn_predict_layers=2, moe_layers=[1, 3, 4, 5]
    )
    raw = {
        "num_hidden_layers": 4, "num_nextn_predict_layers": 2, "moe_layers": [1, 3, 4, 5],
        "mlp_layer_types": ["a", "b", "c", "d", "head", "other head"],
    }  # fmt: skip
    found = shorten_config(raw, config, [0, 3], heads=2)
    assert found["mlp_layer_types"] == ["a", "d", "head", "other head"]
    assert found["moe_layers"] == [1, 2, 3] and found["num_nextn_predict_layers"] == 2
    bare = shorten_config(raw, config, [0, 3], heads=2, drop_heads=True)
    assert bare["mlp_layer_types"] == ["a", "d"]
    assert bare["moe_layers"] == [1] and bare["num_nextn_predict_layers"] == 0
    with pytest.raises(UnsupportedModelError, match="'unknown'"):
        shorten_config({**raw, "unknown": list(range(6))}, config, [0, 3], heads=2)


def test_the_commands_say_whose_head_it_is(pruned: Path, tmp_path: Path) -> None:
    source, out = pruned.with_name("source"), tmp_path / "out"
    how = ["prune", str(source), "--blocks", "1", "--out", str(out), "--no-verify"]
    assert "still belongs to the unpruned model" in CliRunner().invoke(app, how).stdout
    how = ["drop-sublayers", str(out), "--attention", "1", "--out", str(tmp_path / "dropped")]
    if "qwen3_5" in read_json(source / "config.json")["model_type"]:
        assert "still belongs to the unpruned model" in CliRunner().invoke(app, how).stdout


def test_a_run_drops_heads(tmp_path: Path, rows: Path) -> None:
    source = with_head("qwen3_5_text", tmp_path / "source")
    how: dict[str, Any] = {"blocks": [1], "eval_data": [str(rows)], "eval_length": 16}
    made = shortllm.run(source, out=tmp_path / "run", drop_heads=True, max_segments=4, **how)
    assert not head_of(made.checkpoints["pruned"])


def test_a_streamed_model_leaves_the_head_on_disk(pruned: Path, tmp_path: Path) -> None:
    source = pruned.with_name("source")
    out = shortllm.prune(source, blocks=[1], out=tmp_path / "out", stream=True)
    require_equal(head_of(out), head_of(source))
    decoder = open_streamed(open_checkpoint(out), device=torch.device("cpu"), dtype=torch.float32)
    assert bypass_logits(decoder).isfinite().all()


def test_the_lists_of_a_type_that_cuts_them_itself(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    raw = {
        "model_type": "step3p5", "num_hidden_layers": 4, "num_nextn_predict_layers": 2,
        "layer_types": kinds, "sliding_window": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "dense", "sparse"],
    }  # fmt: skip
    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    assert len(config.layer_types) == 4
    found = shorten_config(raw, config, [0, 1, 3], heads=2)
    assert found["layer_types"] == [*(kinds[b] for b in (0, 1, 3)), *kinds[4:]]
    assert AutoConfig.for_model(**found).mtp_mlp_layer_types == ["dense", "sparse"]
    bare = shorten_config(raw, config, [0, 1, 3], heads=2, drop_heads=True)
    assert len(bare["layer_types"]) == 3 and "num_nextn_predict_layers" not in bare


def test_the_head_of_a_model_with_images(tmp_path: Path) -> None:
    text = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, **SHAPES["qwen3_5_text"], "layer_types": ["full_attention"] * 4,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "out_hidden_size": 32,
    }  # fmt: skip
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    source = families.save(AutoModelForImageTextToText.from_config(config), tmp_path / "source")
    tensors = load_file(source / SAFETENSORS)
    tensors["mtp.fc.weight"] = torch.randn(32, 64)
    save_file(tensors, source / SAFETENSORS, metadata={"format": "pt"})
    written = read_json(source / "config.json")
    set_config(source, text_config={**written["text_config"], "mtp_num_hidden_layers": 1})
    kept = shortllm.prune(source, blocks=[1], out=tmp_path / "kept")
    assert load_file(kept / SAFETENSORS)["mtp.fc.weight"].equal(tensors["mtp.fc.weight"])
    assert read_json(kept / "config.json")["text_config"]["mtp_num_hidden_layers"] == 1
    gone = shortllm.prune(source, blocks=[1], out=tmp_path / "gone", drop_heads=True)
    assert "mtp" not in (gone / "config.json").read_text()
    families.load(kept), families.load(gone)
