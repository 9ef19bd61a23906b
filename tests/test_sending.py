"""What a checkpoint says of itself to others, and what of this machine it keeps back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import retraining

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.cli import main
from shortllm.errors import CheckpointError
from shortllm.surgery.derived import files_to_send
from shortllm.surgery.origin import LOCAL, open_original
from shortllm.surgery.steps import PROVENANCE

TEXT: dict[str, Any] = {"data": "embedded", "samples": 4, "length": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a directory, and everything that can be made of it, on text of a file there."""
    place = tmp_path_factory.mktemp("alice")
    retraining.shortened(place)
    rows = str(retraining.text(place / "rows.jsonl"))
    source, short = str(place / "whole"), str(place / "short")
    shortllm.heal(short, place / "healed", **{**TEXT, "data": rows})
    for before, name in (("healed", "retrained"), ("retrained", "twice")):
        shortllm.retrain(
            str(place / before), place / name, options=retraining.options(data=rows, method="lora")
        )
    shortllm.prune(str(place / "twice"), [0], place / "shorter")
    shortllm.merge(source, place / "merged", blocks=[2], **{**TEXT, "data": rows})
    shortllm.width(
        source, place / "narrow", ratio=0.5, shapes="per-block", **{**TEXT, "data": rows}
    )
    shortllm.drop_sublayers(source, place / "dropped", attention=[1], mlp=[1, 3])
    return place


NAMES = ("short", "healed", "retrained", "twice", "shorter", "merged", "narrow", "dropped")


def card_of(checkpoint: Path) -> str:
    """The lines of a card that say what was done."""
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    return card[card.index("This checkpoint") : card.index("## Figures")]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_sent_names_a_place_on_this_machine(name: str, place: Path) -> None:
    sent = files_to_send(place / name)
    assert {Path("config.json"), Path("README.md")} < set(sent)
    assert any(path.suffix == ".safetensors" for path in sent)
    for path in sent:
        content = (place / name / path).read_bytes()
        assert str(place.parent).encode() not in content and place.name.encode() not in content
    assert not {path.name for path in sent} & {LOCAL, "prune.json", "heal.json", "retrain.json"}


def test_a_run_sends_no_place_either(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bob").mkdir()
    source = shutil.copytree(place / "whole", tmp_path / "bob" / "tiny")
    rows = shutil.copyfile(place / "rows.jsonl", tmp_path / "bob" / "rows.jsonl")
    run = tmp_path / "bob" / "run"
    command = [
        "run", source, "--out", run, "--remove", 2, "--data", rows, "--samples", 4, "--length", 16,
        "--eval-data", rows, "--eval-length", 32, "--max-segments", 2, "--continuations", 0,
        "--heal", "linear", "--set", "healing.calibration.samples=4", "--device", "cpu",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        main(list(map(str, command)))
    for name in ("pruned", "healed"):
        for path in files_to_send(run / name):
            assert b"/bob" not in (run / name / path).read_bytes(), path
        card = (run / name / "README.md").read_text()
        assert "| perplexity, rows.jsonl" in card and f"|  | original | {name} |" in card


def test_a_card_says_what_the_checkpoint_is(place: Path) -> None:
    assert "- blocks 2, 3 of the original (counted from 0) removed, chosen by hand" in card_of(
        place / "short"
    )
    assert "Its quality was not measured" in (place / "short" / "README.md").read_text()
    assert "healed" not in card_of(place / "short") and "healed" in card_of(place / "healed")
    assert card_of(place / "twice").count("- retrained by lora, on rows.jsonl (6 steps") == 2
    removed = [line for line in card_of(place / "shorter").splitlines() if "removed" in line]
    assert len(removed) == 2 and removed[1].startswith("- block 0 of the original")
    assert "- block 2 of the original (counted from 0) folded" in card_of(place / "merged")
    assert "shortllm.load" in card_of(place / "narrow") and "heads" in card_of(place / "narrow")
    dropped = card_of(place / "dropped")
    assert "- block 1 of" in dropped and "- mlp of blocks 1, 3 removed" in dropped


def test_the_original_is_found_by_the_local_file(place: Path) -> None:
    for name in NAMES:
        found = open_original(open_checkpoint(place / name), None, "--source")
        assert found.directory == place / "whole"


def test_without_the_local_file_the_original_has_to_be_named(place: Path, tmp_path: Path) -> None:
    short = shutil.copytree(place / "short", tmp_path / "short")
    (short / LOCAL).unlink()
    with pytest.raises(CheckpointError, match="shortened from whole, and where .* with --source"):
        shortllm.heal(str(short), tmp_path / "healed", **TEXT)
    shortllm.heal(str(short), tmp_path / "healed", source=str(place / "whole"), **TEXT)


def test_another_model_in_the_place_of_the_original_is_refused(tmp_path: Path) -> None:
    short = retraining.shortened(tmp_path)
    families.save(families.build(families.config_of("llama", vocab_size=512)), tmp_path / "whole")
    with pytest.raises(CheckpointError, match="whole is another model now. Name .* --teacher"):
        open_original(open_checkpoint(short), None, "--teacher")


def test_a_checkpoint_of_an_earlier_version_still_opens(place: Path, tmp_path: Path) -> None:
    """It has the directory in config.json, which no later checkpoint takes over."""
    short = shutil.copytree(place / "short", tmp_path / "short")
    (short / LOCAL).unlink()
    config = json.loads((short / "config.json").read_text())
    del config[PROVENANCE]["source_fingerprint"], config[PROVENANCE]["paper"]
    config[PROVENANCE]["source"] = str(place / "whole")
    (short / "config.json").write_text(json.dumps(config))
    assert open_original(open_checkpoint(short), None, "--source").directory == place / "whole"
    with pytest.raises(CheckpointError, match="names directories of this machine.*--overwrite"):
        files_to_send(short)
    shortllm.heal(str(short), tmp_path / "healed", **TEXT)
    shortllm.prune(str(short), [0], tmp_path / "shorter")
    for target in (tmp_path / "healed", tmp_path / "shorter"):
        assert files_to_send(target)
        assert str(place) not in (target / "config.json").read_text()
        assert open_original(open_checkpoint(target), None, "").directory == place / "whole"


PARENT = {"source": "whole", "source_blocks": 6, "removed_blocks": [0, 1]}


@pytest.mark.parametrize("entry, said", [
    ({"source_blocks": "six"}, "source_blocks six"), ({"removed_blocks": 3}, "removed_blocks 3"),
    ({"healed": 1}, "healed 1"), ({"removed_blocks": [6]}, "removed blocks are not some of 6"),
    ({"removed_blocks": [1, 1]}, "removed blocks are not some of 6"),
    ({"parent": PARENT}, "6 blocks, where the step before left another number"),
])  # fmt: skip
def test_a_damaged_origin_is_refused(
    place: Path, tmp_path: Path, entry: dict[str, Any], said: str
) -> None:
    short = shutil.copytree(place / "short", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, PROVENANCE: {
        **config[PROVENANCE], **entry}}))  # fmt: skip
    with pytest.raises(CheckpointError, match=f"'shortllm' of its config.*{said}"):
        shortllm.prune(str(short), [0], tmp_path / "shorter")
