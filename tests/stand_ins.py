"""Small things under the names that the documents use, made at the first call.

stand_in("Qwen/Qwen3-0.6B")   20 blocks of width 32    built_in_texts()   for SHORTLLM_DATA
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import families
import retraining
from chatting import TEMPLATE
from test_chat_evaluation import apples
from test_zeroshot import DOCUMENTS, write

import shortllm
from shortllm import embedded
from shortllm.recipe import Recipe


def _model(variant: str, blocks: int) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        config = families.config_of(
            variant,
            vocab_size=1024,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=8,
            max_position_embeddings=4096,
            use_sliding_window=False,
        )
        families.save(families.build(config), target)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(embedded.MODEL_DIR / name, target / name)
        if variant == "qwen3":
            (target / "chat_template.jinja").write_text(TEMPLATE)

    return make


def _without(source: str, removed: list[int]) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        shortllm.prune(str(stand_in(source)), removed, target, verify=False)

    return make


def _finished_run(target: Path) -> None:
    recipe = Recipe(
        model=str(stand_in("MODEL")),
        budget=shortllm.Budget(remove=2),
        calibration=shortllm.CalibrationOptions(data=str(stand_in("my_text.jsonl")), samples=2),
        evaluation=shortllm.EvaluationOptions(max_segments=2, continuations=0),
    )
    shortllm.run(recipe=recipe, out=target)


def _lines(count: int) -> Callable[[Path], object]:
    """A text file whose lines are pages."""
    pages = [" ".join(page.split()) for page in embedded.rows("test", count)]
    return lambda target: target.write_text("\n".join(pages) + "\n", encoding="utf-8")


STAND_INS: dict[str, Callable[[Path], Any]] = {
    "Qwen/Qwen3-0.6B": _model("qwen3", 20),
    "qwen3-short": _without("Qwen/Qwen3-0.6B", [12, 13, 17]),
    "qwen3-retrained": _without("Qwen/Qwen3-0.6B", [12, 13, 17]),
    "MODEL": _model("llama", 12),
    "SHORT": _without("MODEL", [3, 4]),
    "pruned": _without("MODEL", [3, 4]),
    "narrow": _without("MODEL", [2, 5]),
    "my-model": _model("llama", 12),
    "my/model": _model("llama", 12),
    "baffo32/decapoda-research-llama-7B-hf": _model("llama", 12),
    "../shared/models/stories10L": _model("llama", 12),
    "../shared/models/books5M": _model("llama", 12),
    "runs/qwen3": _finished_run,
    "runs/qwen3/retrained": _without("Qwen/Qwen3-0.6B", [12, 13, 17]),
    "runs/other": _finished_run,
    "my_text.jsonl": lambda target: retraining.text(target, 160),
    "../shared/data/stories/valid.jsonl.gz": lambda target: write(
        target, [{"page": row} for row in embedded.rows("test", 60)]
    ),
    "../shared/data/wikitext2/wiki.test.raw": _lines(60),
}
"""Name in the documents -> what writes a small thing of its kind. What a command of the page writes
itself is used instead."""

TEXTS: dict[str, Callable[[Path], Any]] = {
    "alpaca/train.jsonl": retraining.instructions,
    "bookcorpus.txt": _lines(60),
    "c4/train.jsonl": lambda target: retraining.text(target, 60),
    "c4/validation.jsonl": lambda target: retraining.text(target, 40),
    "wikitext2/wiki.train.raw": _lines(60),
    "wikitext2/wiki.test.raw": _lines(40),
    "ptb/ptb.valid.txt": _lines(40),
}
"""Built-in texts below SHORTLLM_DATA."""

_MADE: dict[str, Path] = {}


@cache
def cache_directory() -> Path:
    return Path(families._DIRECTORY.name) / "documents"


def stand_in(name: str) -> Path:
    """The stand-in of a name, made at the first call."""
    # flat, since one name may be within another: runs/qwen3 and runs/qwen3/retrained
    target = cache_directory() / "stand-ins" / name.replace("../", "").replace("/", "--")
    if name not in _MADE:
        target.parent.mkdir(parents=True, exist_ok=True)
        STAND_INS[name](target)
        _MADE[name] = target
    return target


@cache
def built_in_texts() -> Path:
    """A directory for SHORTLLM_DATA: small texts, and documents of tasks."""
    directory = cache_directory() / "texts"
    for name, make in TEXTS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        make(directory / name)
    sciq = {"question": "Where is it?", "support": "", "correct_answer": "hall"}
    sciq |= {f"distractor{i}": place for i, place in enumerate(("river", "attic", "cellar"), 1)}
    write(directory / "sciq/test.jsonl", [sciq])
    for file, document in DOCUMENTS.values():
        write(directory / file, [document(i) for i in range(4)])
    for split in ("train", "test"):
        write(directory / f"gsm8k/{split}.jsonl", [apples(i) for i in range(6)])
    return directory
