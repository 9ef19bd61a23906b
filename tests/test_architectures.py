"""Surgery is right for every model type that transformers has, or refused with the reason.

By default one type of each kind is tried: of those that the page describes by the same row. The
others are slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import Outcome, examine, model_types, page, tiny_config
from families import build, config_of, opened, save
from safetensors.torch import load_file, save_file

from shortllm.checkpoint.shorten_config import structurally_protected
from shortllm.checkpoint.source import open_checkpoint
from shortllm.checkpoint.structure import auto_class
from shortllm.checkpoint.tensors import SAFETENSORS, read_tensor_table
from shortllm.checkpoint.writer import write_tensors
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.model.decoder import Decoder
from shortllm.surgery.apply import check_removal
from shortllm.surgery.verify import bypass_logits, kv_cache_matches, verify_shortened

IMAGES_AND_TEXT = (
    "aya_vision", "idefics3", "internvl", "kimi_k25", "lfm2_vl", "llava", "minimax_m3_vl",
    "mistral3", "qwen2_5_vl", "qwen2_vl",
)  # fmt: skip
"""Some of the types that transformers knows no causal language model of, only one with towers."""

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def page_rows() -> dict[str, Outcome]:
    """The table of the page, by type."""
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = [
        Outcome(name.strip("| `"), status, scoring, " | ".join(note).removesuffix(" |"))
        for name, status, scoring, *note in lines
    ]
    return {outcome.model_type: outcome for outcome in found}


PAGE_IS_OF_THIS_VERSION = f"transformers {transformers.__version__}," in PAGE.read_text()


def sweep() -> list[Any]:
    """Every type; all but the first with the same row on the page are slow."""
    rows = page_rows()
    kinds = {name: outcome.row().partition("` | ")[2] for name, outcome in rows.items()}
    first = {kind: name for name, kind in reversed(kinds.items())}.values()
    return [
        pytest.param(name, marks=() if name in first else pytest.mark.slow)
        for name in model_types()
    ]


@pytest.mark.parametrize("model_type", sweep())
def test_every_type_is_right_or_refused_by_name(model_type: str) -> None:
    outcome = examine(model_type)
    if PAGE_IS_OF_THIS_VERSION:
        assert outcome.row() == page_rows()[model_type].row()
    else:
        assert outcome.status != "refused" or outcome.note


@pytest.mark.parametrize(
    "types", [("llava",), pytest.param(IMAGES_AND_TEXT, marks=pytest.mark.slow)]
)
def test_types_with_a_class_for_images_and_text_alone(types: tuple[str, ...]) -> None:
    outcomes = [examine(model_type) for model_type in types]
    assert not [outcome for outcome in outcomes if outcome.status != "right"]


def test_the_page_lists_every_type() -> None:
    rows = page_rows()
    text = PAGE.read_text()
    assert text == page(list(rows.values()), text.partition(", and the same sweep")[0].split()[-1])
    assert sum(outcome.status == "right" for outcome in rows.values()) >= 120
    if PAGE_IS_OF_THIS_VERSION:
        assert list(rows) == model_types()


# --- what the sweep does not reach ----------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
def test_shares_of_kept_blocks_are_cut_out_of_a_tensor(pickled: bool, tmp_path: Path) -> None:
    for rows, columns in [(7, 6 * 5), (3, 6 * 300_000), (100_000, 6)]:
        for axis in (0, 1):
            directory = tmp_path / f"{rows}-{axis}"
            directory.mkdir()
            check_shares(rows, columns, axis, pickled, directory)


def check_shares(rows: int, columns: int, axis: int, pickled: bool, tmp_path: Path) -> None:
    tensor = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    if axis == 0:
        tensor = tensor.T.contiguous()
    source = tmp_path / "source"
    source.mkdir()
    if pickled:
        torch.save({"other": torch.ones(3), "table": tensor}, source / "pytorch_model.bin")
    else:
        save_file({"other": torch.ones(3), "table": tensor}, source / SAFETENSORS)
    entries = read_tensor_table(source)
    steps: list[int] = []
    part = entries["table"].part(axis, 6, [0, 3, 4])
    write_tensors(tmp_path, {"other": entries["other"], "cut": part}, advance=steps.append)
    written = load_file(tmp_path / SAFETENSORS)
    expected = torch.cat([tensor.chunk(6, dim=axis)[share] for share in (0, 3, 4)], dim=axis)
    assert torch.equal(written["cut"], expected)
    assert torch.equal(written["other"], torch.ones(3))
    assert sum(steps) == expected.nbytes + 12


def test_a_tensor_without_equal_shares_is_refused() -> None:
    entry = opened("llama").tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match="does not consist of 5 equal shares along axis 0"):
        entry.part(0, 5, [0])


def test_protected_blocks_are_told_with_the_reason(tmp_path: Path) -> None:
    assert structurally_protected(config_of("llama")) == {}
    assert structurally_protected(config_of("llama", num_hidden_layers=1)) == {}
    config = tiny_config("gemma4")
    reason = "its keys and values serve blocks 4, 5 too"
    assert structurally_protected(config) == {1: reason}
    checkpoint = open_checkpoint(save(build(config), tmp_path / "source"))
    message = rf"block 1 of model type 'gemma4_text' cannot be removed: {reason}. Choose other"
    with pytest.raises(UnsupportedModelError, match=message):
        check_removal(checkpoint, [0, 2, 3, 4, 5])
    # with all that depend on it, it can go; then the last block left must be one of full attention
    with pytest.raises(UnsupportedModelError, match="last block must attend to all tokens"):
        check_removal(checkpoint, [0, 2, 3])


def test_a_checkpoint_with_towers_is_loaded_with_them(tmp_path: Path) -> None:
    config = tiny_config("qwen3_5")
    assert auto_class(config).__name__ == "AutoModelForImageTextToText"
    config.architectures = None
    assert auto_class(config).__name__ == "AutoModelForCausalLM"
    assert auto_class(config_of("llama")).__name__ == "AutoModelForCausalLM"


def test_a_model_without_a_right_cache_is_compared_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    decoder = Decoder(model)
    assert kv_cache_matches(decoder)
    expected = bypass_logits(decoder)
    plain = model.forward

    def forward(*, input_ids: torch.Tensor, use_cache: bool, **cache: Any) -> Any:
        return plain(input_ids=input_ids, use_cache=use_cache)  # forgets what was read before

    monkeypatch.setattr(model, "forward", forward)
    assert not kv_cache_matches(decoder)
    verify_shortened("forgetful", decoder, expected, cached=False)
    with pytest.raises(CheckpointError, match="other text with a cache than without"):
        verify_shortened("forgetful", decoder, expected)
