"""Verdicts on other programs come from rules, never from guesses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_config
from families import WINDOW, build, config_of, opened, save, saved, shortened
from typer.testing import CliRunner

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.cli import app
from shortllm.surgery.export_lint import ExportFinding, lint_export


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
    assert result.exit_code == 0
    assert "vllm: wrong (vLLM will not run this model correctly: it refuses" in result.stdout
    assert "    max_window_layers: 3" in result.stdout
    printed = CliRunner().invoke(app, ["export-lint", directory, "--json"]).stdout
    assert [ExportFinding.model_validate(item) for item in json.loads(printed)] == (
        shortllm.export_lint(directory)
    )
