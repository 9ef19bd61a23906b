"""The files next to a checkpoint's weights: which go with it, and what they say of single blocks.

Tokenizer, generation config, quantizer's lists, a draft's config: all are copied to a checkpoint
that is derived from another one. Where blocks are removed, every JSON file is read for references
to blocks (checkpoint/references.py). Those with a rule are rewritten; any other one stops surgery
before something is written, unless the user accepts that it stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortllm.checkpoint.names import BlockTexts
from shortllm.checkpoint.options import ACCEPT, accepts_unknown_references
from shortllm.checkpoint.references import RENUMBERED, Reference, Survey
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import weight_files
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.files import PARTIAL
from shortllm.surgery.card import CARD, ORIGINAL_CARD
from shortllm.surgery.origin import LOCAL
from shortllm.surgery.steps import PROVENANCE

TOKENIZER = {"merges", "tekken", "template", "tokenizer", "tokens", "vocab", "vocabulary"}
"""Words in the names of files that speak of tokens alone."""

REPORTS = {
    "args", "eval", "evaluation", "history", "log", "logs", "metrics", "result", "results", "state",
    "train", "trainer", "training",
}  # fmt: skip
"""Words in the names of files that report how a model was trained or measured: no program loads a
model by them."""

CARDS = {CARD, ORIGINAL_CARD}
"""Model cards do not count as a change."""

RECORDS = {
    f"{name}.json"
    for name in ("prune", "heal", "merge", "width", "sublayers", "quantize", "retrain")
}
"""Records of derived checkpoints, which speak of the weights next to them and are not copied on."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What the files of a checkpoint say once some of its blocks are gone."""

    config: dict[str, Any] = field(default_factory=dict)
    """config.json, except for the fields that the rules for configs change."""
    files: dict[Path, Any] = field(default_factory=dict)
    """Content of the other files that change."""
    references: list[Reference] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """One line for each reference that a user may want to look at."""
        return [
            str(one)
            for one in self.references
            if one.file != "config.json" or one.rule in (None, RENUMBERED)
        ]


def companions_of(checkpoint: Checkpoint) -> list[Reference]:
    """All files and fields of a checkpoint that refer to blocks."""
    every = range(checkpoint.block_count)
    return _surveyed(checkpoint, every, drop_heads=False).references


def follow_removal(
    checkpoint: Checkpoint, kept: Sequence[int], *, drop_heads: bool = False
) -> Followed:
    """The files of a checkpoint of which the blocks `kept` stay; nothing is written.

    Raises:
        UnsupportedModelError: a reference has no rule, and the user has not accepted that.
    """
    found = _surveyed(checkpoint, kept, drop_heads=drop_heads)
    if len(kept) < checkpoint.block_count:
        require_rules(found.references)
    return found


def require_rules(references: Sequence[Reference]) -> None:
    """Refuse references to blocks that no rule covers, unless the user accepts them."""
    unknown = [one for one in references if one.rule is None]
    if unknown and not accepts_unknown_references():
        first, *others = unknown
        more = f" ({len(others)} more such fields)" if others else ""
        raise UnsupportedModelError(
            f"{first}: {first.value}{more}. Delete or correct the field, or leave it as it is with "
            f"{ACCEPT}"
        )


def _surveyed(checkpoint: Checkpoint, kept: Sequence[int], *, drop_heads: bool) -> Followed:
    names = checkpoint.block_names
    survey = Survey(
        texts=BlockTexts(
            prefixes=tuple(dict.fromkeys((names.prefix, checkpoint.structure.name))),
            tensors=list(checkpoint.tensors),
            new_number=names.new_numbers(kept, drop_heads=drop_heads),
            total=names.count + names.heads,
        ),
        kept=kept,
        count=names.count,
        config=checkpoint.config,
    )
    config = survey.of_config(checkpoint.raw_config, skip=(PROVENANCE,))
    files: dict[Path, Any] = {}
    for name, content in _json_files(checkpoint.directory):
        try:
            new = survey.of_file(name.as_posix(), content)
        except RecursionError as error:
            message = f"{name} is nested too deeply to be read. Delete or correct the file"
            raise CheckpointError(message) from error
        if new != content:
            files[name] = new
    return Followed(config, files, list(survey.found.values()))


def _json_files(directory: Path) -> Iterator[tuple[Path, Any]]:
    """Name and content of the readable JSON files that can refer to blocks, without config.json."""
    for name in carried_files(directory):
        words = set(re.findall("[a-z]+", name.stem.lower()))
        others = words & (TOKENIZER | REPORTS)
        if name.suffix == ".json" and name.name not in RECORDS and not others:
            try:
                yield name, json.loads((directory / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):  # no program reads it either
                continue


def carried_files(source: Path, target: Path | None = None) -> list[Path]:
    """Tokenizer, generation config and all else next to the weights, relative to `source`, sorted.

    Left out are config.json, hidden, unfinished and local files, directories with a model or a run
    at any depth, and directories that are or contain `target`.
    """
    outputs = {target.resolve(), *target.resolve().parents} if target is not None else set()
    weights = weight_files(source)
    carried: list[Path] = []
    for path in sorted(source.iterdir()):
        if path.name in weights or path.name == "config.json":
            continue
        if path.name.startswith(".") or path.name.endswith((PARTIAL, LOCAL)):
            continue
        if path.is_file():
            carried.append(path.relative_to(source))
        elif path.is_dir() and path.resolve() not in outputs and not _contains_output(path):
            carried += sorted(p.relative_to(source) for p in path.rglob("*") if p.is_file())
    return carried


def _contains_output(directory: Path) -> bool:
    """Whether it contains weights (of another format or model), a run, or unfinished work."""
    if weight_files(directory) or (directory / "run.json").exists():
        return True
    return any(
        path.name.endswith(PARTIAL) or (path.is_dir() and _contains_output(path))
        for path in directory.iterdir()
        if not path.is_symlink()
    )


def carried_fingerprint(source: Path) -> str:
    """sha256 over names and contents of the files that a new checkpoint copies, without cards."""
    digest = hashlib.sha256()
    for name in carried_files(source):
        if str(name) not in CARDS | RECORDS:
            content = hashlib.sha256((source / name).read_bytes()).hexdigest()
            digest.update(f"{content} {name.as_posix()}\n".encode())
    return digest.hexdigest()
