"""A tiny model with a tokenizer, and data to retrain it on, for the tests of retraining.

shortened(directory)      6 random blocks of width 32 without 2 and 3, the embedded tokenizer
instructions(file)        Alpaca-format rows       text(file)       rows of text
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families

import shortllm
from shortllm.checkpoint.source import open_checkpoint
from shortllm.embedded import MODEL_DIR, rows

REMOVED = [2, 3]

QUICK: dict[str, Any] = {
    "length": 32, "batch": 4, "max_steps": 6, "eval_every": 2, "held_out": 4, "report_to": [],
    "learning_rate": 3e-3,
}  # fmt: skip
"""Options of a training that takes a second."""


def whole(directory: Path, variant: str = "llama") -> Path:
    """The unpruned model of a family, written with a tokenizer."""
    config = families.config_of(variant, vocab_size=1024)
    config.max_position_embeddings = 512
    families.save(families.build(config), directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / name, directory / name)
    return directory


def shortened(directory: Path) -> Path:
    """The model without two blocks, beside the unpruned one, which its provenance names."""
    source = open_checkpoint(whole(directory / "whole"))
    target = directory / "short"
    return families.shortened(source, REMOVED, target)


def text(file: Path, count: int = 40) -> Path:
    """Rows of text, a page of the embedded world each."""
    lines = [json.dumps({"text": page}) for page in rows("train", count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def instructions(file: Path, count: int = 40) -> Path:
    """Instruction rows, every third with an input."""
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = {
                "instruction": f"Say the number {number}.",
                "input": "in words" if number % 3 == 0 else "",
                "output": f"It is {number}, " * (1 + number % 4) + "no more.",
            }
            stream.write(json.dumps(row) + "\n")
    return file


def options(**changes: Any) -> shortllm.RetrainOptions:
    """Quick options with some changed."""
    return shortllm.RetrainOptions(**{**QUICK, **changes})
