"""What a checkpoint without some blocks consists of: config, tensors, other files, origin.

The model is never built in memory: kept tensors are copied under their new names, from file to file
inside the kernel. Memory stays flat for any model size, and the work takes as long as copying the
kept bytes. Tied tensors are stored once and stay so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortllm import __version__
from shortllm.checkpoint.config import is_own_code, read_config
from shortllm.checkpoint.shorten_config import (
    refuse_block_names_in_config,
    refuse_protected,
    refuse_type,
    shorten_config,
    sliced_axis,
)
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import TensorEntry, weight_files
from shortllm.errors import CheckpointError, OutputError
from shortllm.files import PARTIAL, translate_os_errors
from shortllm.records import MAX_BLOCKS
from shortllm.surgery.guard import check_signatures

log = logging.getLogger(__name__)

PROVENANCE = "shortllm"
"""Key in config.json for the origin of a shortened checkpoint."""


def check_removal(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, Any]:
    """The shortened config.json, after the rules and the structural guard; nothing is written."""
    refuse_type(checkpoint.config)
    names = checkpoint.block_names
    refuse_block_names_in_config(checkpoint.raw_config, names.prefix)
    shortened = shorten_config(checkpoint.raw_config, checkpoint.config, kept, heads=names.heads)
    refuse_protected(checkpoint.config, kept)
    check_signatures(checkpoint.config, as_read_from_disk(checkpoint.config, shortened), kept)
    return shortened


def as_read_from_disk(original: Any, raw: dict[str, Any]) -> Any:
    """The transformers config object that a config.json with this content will give."""
    if is_own_code(original):  # its code is not next to the file
        config = type(original).from_dict(raw)
        config._name_or_path = original._name_or_path
        return config
    with (
        translate_os_errors(Path(tempfile.gettempdir()), hint="set TMPDIR to another directory"),
        tempfile.TemporaryDirectory() as directory,
    ):
        (Path(directory) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return read_config(Path(directory), original.model_type)


def renumbered_tensors(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, TensorEntry]:
    """New tensor name -> stored tensor, in file order.

    Tensors of removed blocks and of prediction heads after the last block are left out. Of tensors
    outside the blocks that have a share for every block, the shares of kept blocks stay.
    """
    names = checkpoint.block_names
    if names.heads:
        log.info("the prediction heads after the last block are left out")
    new_number = {old: new for new, old in enumerate(kept)}
    result: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        block, axis = names.block_of(name), sliced_axis(name)
        if block is None and axis is not None:
            result[name] = entry.part(axis, names.count, kept)
        elif block is None and not names.is_head(name):
            result[name] = entry
        elif block in new_number:
            result[names.renumbered(name, new_number[block])] = entry
    return result


def provenance_of(checkpoint: Checkpoint, removed: Sequence[int], **how: Any) -> dict[str, Any]:
    """The entry in config.json of a checkpoint that was derived by removing blocks, and `how`."""
    return {
        "version": __version__,
        "source": checkpoint.id,
        "revision": checkpoint.revision,
        "source_blocks": checkpoint.block_count,
        "removed_blocks": list(removed),
        **how,
        "parent": checkpoint.raw_config.get(PROVENANCE),
    }


def held_provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """The origin that a checkpoint's config states; for a plain one, that no block is removed."""
    held = checkpoint.raw_config.get(PROVENANCE)
    return held if isinstance(held, dict) and held else provenance_of(checkpoint, [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Which blocks of which model a shortened checkpoint contains."""

    source: str
    revision: str | None
    blocks: int
    """Number of blocks of the source."""
    kept: list[int]
    """For each block of the checkpoint its number in the source."""


def lineage(checkpoint: Checkpoint) -> Lineage:
    """The original model of a checkpoint that was shortened once or several times."""
    removals: list[tuple[int, list[int]]] = []
    entry: dict[str, Any] = {}
    parent = checkpoint.raw_config.get(PROVENANCE)
    while isinstance(parent, dict) and "removed_blocks" in parent:
        entry = parent
        count, removed = entry.get("source_blocks"), entry["removed_blocks"]
        if not isinstance(count, int) or count > MAX_BLOCKS or not isinstance(removed, list):
            raise CheckpointError(
                f"{checkpoint.id}: the list of removed blocks in its config.json is damaged"
            )
        removals.append((count, removed))
        parent = entry.get("parent")
    if not removals:
        raise CheckpointError(
            f"{checkpoint.id} does not say from which model it was shortened: its config.json has "
            f"no removed blocks under '{PROVENANCE}', as `shortllm prune` writes them"
        )
    kept = list(range(removals[-1][0]))
    for _, removed in reversed(removals):
        kept = [block for place, block in enumerate(kept) if place not in removed]
    if len(kept) != checkpoint.block_count:
        raise CheckpointError(
            f"{checkpoint.id} has {checkpoint.block_count} blocks, but by the removed blocks in "
            f"its config.json it must have {len(kept)}"
        )
    source, revision = str(entry.get("source")), entry.get("revision")
    return Lineage(source=source, revision=revision, blocks=removals[-1][0], kept=kept)


def open_original(checkpoint: Checkpoint, given: str | None, flag: str) -> Checkpoint:
    """The model that a checkpoint was shortened from: the one given, or as its config.json says."""
    if given is not None:
        return open_checkpoint(given)
    try:
        origin = lineage(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Name the original model with {flag}") from error
    try:
        return open_checkpoint(origin.source, revision=origin.revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.id} was shortened from {origin.source}, which cannot be opened "
            f"({error}). Name it with {flag}"
        ) from error


def open_checkpoints(models: Sequence[str]) -> dict[str, Checkpoint]:
    """Open each model under the last part of its path, or all of it where that is taken.

    A Hub model that another one was derived from is opened at the revision recorded there.
    """
    opened = {model: open_checkpoint(model) for model in models if Path(model).is_dir()}
    entries = [one.raw_config.get(PROVENANCE) for one in opened.values()]
    held = [entry for entry in entries if isinstance(entry, dict)]
    origins = {str(entry.get("source")): entry.get("revision") for entry in held}
    checkpoints: dict[str, Checkpoint] = {}
    for model in models:
        short = Path(model).name or model
        one = opened.get(model) or open_checkpoint(model, revision=origins.get(model))
        checkpoints[model if short in checkpoints else short] = one
    return checkpoints


def require_apart(source: Path, target: Path) -> None:
    """Refuse a target that is the source directory or contains it."""
    source, target = source.resolve(), target.resolve()
    if target == source or target in source.parents:
        relation = "is" if target == source else "contains"
        raise OutputError(
            f"{target} {relation} the original model, which is never changed. Choose another --out"
        )


def carried_files(source: Path, target: Path | None = None) -> list[Path]:
    """Tokenizer, generation config and all else next to the weights, relative to `source`, sorted.

    Left out are config.json, hidden and unfinished files, directories with a model or a run at any
    depth, and directories that are or contain `target`.
    """
    outputs = {target.resolve(), *target.resolve().parents} if target is not None else set()
    weights = weight_files(source)
    carried: list[Path] = []
    for path in sorted(source.iterdir()):
        if path.name in weights or path.name == "config.json":
            continue
        if path.name.startswith(".") or path.name.endswith(PARTIAL):
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


def carried_fingerprint(source: Path, *, without: Collection[str] = ()) -> str:
    """sha256 over names and contents of the files that a new checkpoint copies, but for some."""
    digest = hashlib.sha256()
    for name in carried_files(source):
        if str(name) not in without:
            content = hashlib.sha256((source / name).read_bytes()).hexdigest()
            digest.update(f"{content} {name.as_posix()}\n".encode())
    return digest.hexdigest()
