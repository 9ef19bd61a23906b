"""Verdicts on other programs come from rules, never from guesses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from architectures import tiny_config
from families import WINDOW, build, config_of, opened, save, saved, shortened
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.cli import app
from shortllm.surgery.export_lint import ExportFinding, lint_export
from shortllm.surgery.export_tables import ALIKE, BY_FIELD, BY_TYPE, Target


def lint(config: Any, directory: Path) -> dict[str, ExportFinding]:
    """Findings by target, of a model with this config."""
    checkpoint = open_checkpoint(save(build(config), directory))
    return {finding.target: finding for finding in lint_export(checkpoint)}


def test_blocks_that_are_alike_are_right_everywhere(tmp_path: Path) -> None:
    target = shortened(opened("llama"), [1, 4], tmp_path / "short")
    assert {finding.verdict for finding in lint_export(open_checkpoint(target))} == {"ok"}


def test_a_type_no_rule_speaks_of_is_unknown(tmp_path: Path) -> None:
    found = lint(tiny_config("zaya"), tmp_path / "zaya")
    assert {finding.verdict for finding in found.values()} == {"unknown"}
    assert "'zaya', whose blocks differ by position" in found["gguf"].reason
    assert found["vllm"].hint == "Compare its output with the output of transformers"


@pytest.mark.parametrize(
    "model_type, target, arguments",
    [
        ("gemma2", "gguf", {"head_dim": 8, "query_pre_attn_scalar": 8}),
        ("cohere2", "gguf", {"num_hidden_layers": 8}),
        ("gpt_oss", "gguf", {}),
        ("gpt_oss", "vllm", {}),
    ],
)
def test_a_window_that_comes_and_goes_by_heart(
    model_type: str, target: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(model_type)
    for name, value in {"layer_types": None, **arguments}.items():
        setattr(config, name, value)
    config = type(config)(**{**config.to_dict(), "layer_types": None})
    whole = lint(config, tmp_path / "whole")[target]
    assert whole.verdict == "ok"
    checkpoint = open_checkpoint(tmp_path / "whole")
    short = open_checkpoint(shortened(checkpoint, [1], tmp_path / "short"))
    finding = {f.target: f for f in lint_export(short)}[target]
    assert finding.verdict == "wrong"
    assert finding.fields == {"layer_types": short.config.layer_types}
    assert finding.hint and "--period-aligned" in finding.hint
    period = list(range(checkpoint.structure.period))
    aligned = open_checkpoint(shortened(checkpoint, period, tmp_path / "aligned"))
    assert {f.target: f.verdict for f in lint_export(aligned)}[target] == "ok"


def test_blocks_without_positions(tmp_path: Path) -> None:
    config = config_of("smollm3", no_rope_layer_interval=4, use_sliding_window=False)
    assert lint(config, tmp_path / "a")["gguf"].verdict == "ok"
    finding = lint(config_of("smollm3"), tmp_path / "b")["gguf"]  # every third instead
    assert (finding.verdict, list(finding.fields)) == ("wrong", ["no_rope_layers"])


def test_the_attention_scale_that_goes_by_the_block_count(tmp_path: Path) -> None:
    config = config_of("gemma2", head_dim=16, query_pre_attn_scalar=8)
    finding = lint(config, tmp_path / "a")["gguf"]
    assert finding.verdict == "wrong"
    assert "scales attention by 1/sqrt(16) in a model of 6 blocks" in finding.reason
    assert finding.fields["query_pre_attn_scalar"] == 8
    deep = config_of("gemma2", head_dim=16, query_pre_attn_scalar=8, num_hidden_layers=46)
    assert lint(deep, tmp_path / "b")["gguf"].verdict == "ok"


def test_shared_keys_from_a_fixed_block_on(tmp_path: Path) -> None:
    config = tiny_config("gemma3n_text")
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    config = type(config)(
        **{
            **config.to_dict(),
            "layer_types": kinds,
            "num_hidden_layers": 5,
            "intermediate_size": 48,
            "activation_sparsity_pattern": None,
            "num_kv_shared_layers": 0,
        }
    )
    finding = lint(config, tmp_path / "a")["gguf"]
    assert finding.verdict == "wrong"
    assert "blocks from 20 on share keys and values; here those from 5 on do" in finding.reason


def test_experts_that_go_by_a_step(tmp_path: Path) -> None:
    config = tiny_config("llama4_text")
    whole = type(config)(**{**config.to_dict(), "no_rope_layers": [1, 1, 1, 0, 1, 1]})
    assert lint(whole, tmp_path / "a")["gguf"].verdict == "ok"
    odd = type(config)(
        **{**config.to_dict(), "no_rope_layers": [1, 1, 1, 0, 1, 1], "moe_layers": [1, 2, 5]}
    )
    assert list(lint(odd, tmp_path / "b")["gguf"].fields) == [
        "interleave_moe_layer_step",
        "moe_layers",
    ]


def test_a_window_in_some_blocks_alone() -> None:
    found = {finding.target: finding for finding in lint_export(opened("qwen2"))}
    assert found["vllm"].verdict == "wrong"
    assert found["vllm"].fields == {
        "max_window_layers": 3,
        "num_hidden_layers": 6,
        "sliding_window": WINDOW,
    }
    assert found["gguf"].verdict == "unknown"


def test_the_command_tells_the_same() -> None:
    directory = str(saved("qwen2"))
    result = CliRunner().invoke(app, ["export-lint", directory])
    assert result.exit_code == 3
    assert "vllm: wrong (vLLM will not run this model correctly: it refuses" in result.stdout
    assert "    max_window_layers: 3" in result.stdout
    assert "    read in: vllm-project/vllm vllm/model_executor/models/qwen2.py at " in result.stdout
    printed = CliRunner().invoke(app, ["export-lint", directory, "--json"]).stdout
    assert [ExportFinding.model_validate(item) for item in json.loads(printed)] == (
        shortllm.export_lint(directory)
    )
    other = CliRunner().invoke(app, ["export-lint", directory, "--target", "gguf"])
    assert other.exit_code == 0 and "vllm" not in other.stdout
    mistyped = CliRunner().invoke(app, ["export-lint", directory, "--target", "llama"])
    assert isinstance(mistyped.exception, shortllm.ShortLLMError)
    assert "the programs are gguf, vllm," in str(mistyped.exception)


def by_target(directory: Path) -> dict[str, ExportFinding]:
    return {found.target: found for found in shortllm.export_lint(str(directory))}


def verdicts(directory: Path) -> dict[str, str]:
    return {target: found.verdict for target, found in by_target(directory).items()}


def changed(directory: Path, **fields: Any) -> Path:
    """A checkpoint with other fields in config.json; None removes one."""
    path = directory / "config.json"
    merged = json.loads(path.read_text()) | fields
    stated = {name: value for name, value in merged.items() if value is not None}
    path.write_text(json.dumps(stated))
    return directory


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_every_fourth_block_attends_fully(model_type: str, tmp_path: Path) -> None:
    """Without blocks 1 and 2, llama.cpp looks for tensors of the other kind, and does not load."""
    config = tiny_config(model_type)
    config.num_hidden_layers = 8
    config.layer_types = (["linear_attention"] * 3 + ["full_attention"]) * 2
    source = open_checkpoint(save(build(config), tmp_path / "source"))
    stated = changed(shortened(source, [1, 2], tmp_path / "odd"), full_attention_interval=4)
    odd = by_target(stated)
    assert {name: one.verdict for name, one in odd.items() if name != "executorch"} == {
        "gguf": "wrong", "vllm": "ok", "mlx": "wrong", "sglang": "wrong",
    }  # fmt: skip
    assert odd["gguf"].fields["full_attention_interval"] == 4
    assert [one.project for one in odd["gguf"].sources] == ["ggml-org/llama.cpp"]
    aligned = changed(shortened(source, range(4, 8), tmp_path / "a"), full_attention_interval=4)
    assert set(verdicts(aligned).values()) - {"unknown"} == {"ok"}
    assert by_target(aligned)["gguf"].hint == (
        "Convert it with `shortllm export`, or give the converter --no-mtp"
    )
    silent = by_target(changed(aligned, full_attention_interval=None))
    assert (silent["gguf"].verdict, silent["sglang"].verdict) == ("ok", "unknown")
    assert silent["sglang"].hint == 'Add "full_attention_interval": 4 to config.json'
    half = shortened(source, [0, 1, 4, 5], tmp_path / "half")
    assert by_target(half)["gguf"].hint == 'Set "full_attention_interval": 2 in config.json'
    assert verdicts(changed(half, full_attention_interval=2))["gguf"] == "ok"


def test_kinds_that_are_read_from_the_config(tmp_path: Path) -> None:
    config = tiny_config("lfm2")
    config.layer_types = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
    config.num_hidden_layers = 6
    source = open_checkpoint(save(build(config), tmp_path / "source"))
    short = shortened(source, [0, 4], tmp_path / "short")
    assert set(verdicts(short).values()) == {"ok"}
    assert "reads layer_types" in by_target(short)["gguf"].reason
    assert "n_layers = 4" in (by_target(short)["executorch"].hint or "")
    stale = by_target(changed(short, full_attn_idxs=[1, 4]))["mlx"]
    assert (stale.verdict, stale.fields["full_attn_idxs"]) == ("wrong", [1, 4])
    none_left = by_target(shortened(source, [1, 4], tmp_path / "none"))["mlx"]
    assert none_left.verdict == "wrong" and "and there is none" in none_left.reason


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_heads_behind_the_last_block(model_type: str, tmp_path: Path) -> None:
    """They are blocks of the next numbers; a program skips them by their count or their number."""
    config = tiny_config(model_type)
    blocks = config.num_hidden_layers
    directory = save(build(config), tmp_path / "a")
    changed(directory, num_nextn_predict_layers=0)
    assert {verdicts(directory)[name] for name in ("gguf", "vllm", "mlx", "sglang")} == {"ok"}
    add_heads(directory, blocks, 1)
    one = by_target(changed(directory, num_nextn_predict_layers=1))
    assert {one[name].verdict for name in ("gguf", "vllm", "sglang")} == {"ok"}
    assert one["mlx"].verdict == {"deepseek_v3": "wrong", "glm4_moe": "ok"}[model_type]
    two = by_target(changed(directory, num_nextn_predict_layers=2))
    assert {two[name].verdict for name in ("gguf", "vllm", "sglang")} == {"ok"}  # the count is high
    changed(directory, num_nextn_predict_layers=0)
    none = by_target(directory)["vllm"]
    assert none.verdict == "wrong"
    assert none.hint == "Set num_nextn_predict_layers to 1 in config.json"
    add_heads(directory, blocks, 1, at=blocks + 3)
    apart = by_target(changed(directory, num_nextn_predict_layers=1))
    assert (apart["vllm"].verdict, apart["sglang"].verdict) == ("wrong", "ok")
    assert f"stored: block {blocks}, block {blocks + 3}" in apart["vllm"].reason


def add_heads(directory: Path, blocks: int, heads: int, at: int | None = None) -> None:
    """Store the last block again behind the last, with a projection, as prediction heads."""
    first = blocks if at is None else at
    file = directory / "model.safetensors"
    tensors = load_file(file)
    last = {name: t for name, t in tensors.items() if f"layers.{blocks - 1}." in name}
    for head in range(first, first + heads):
        for name, tensor in last.items():
            tensors[name.replace(f"layers.{blocks - 1}.", f"layers.{head}.")] = tensor.clone()
        tensors[f"model.layers.{head}.eh_proj.weight"] = torch.zeros(4, 8)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_plain_query_goes_by_the_block_count(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v2")
    config.q_lora_rank = None
    found = lint(config, tmp_path / "lite")["gguf"]
    assert found.verdict == "wrong" and "26 or 27 blocks" in found.reason


def test_intervals_of_blocks_without_positions(tmp_path: Path) -> None:
    """MLX reads the list; ExecuTorch knows one interval."""
    third = lint(config_of("smollm3"), tmp_path / "a")
    assert (third["gguf"].verdict, third["executorch"].verdict) == ("wrong", "ok")
    odd = lint(config_of("smollm3", no_rope_layers=[1, 0, 0, 1, 1, 1]), tmp_path / "b")
    assert (odd["mlx"].verdict, odd["executorch"].verdict) == ("ok", "wrong")


def test_every_verdict_names_the_line_it_rests_on() -> None:
    sources = [
        *(rule.source for table in BY_TYPE.values() for rules in table.values() for rule in rules),
        *(rule.source for table in BY_FIELD.values() for rule in table.values()),
        *(source for table in ALIKE.values() for source in table.values()),
    ]
    for source in sources:
        assert re.fullmatch(r"[0-9a-f]{40}", source.commit), source
        assert source.file and source.place and source.project.count("/") == 1
    assert set(BY_TYPE) == set(ALIKE) == set(get_args(Target))
