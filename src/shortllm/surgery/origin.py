"""Where a checkpoint comes from: what others may read of it, and what is of this machine alone.

    config.json   under `shortllm`: names, hashes, what was done     sent with the checkpoint
    local.json    the directory of the original model                 never sent

`heal` and `retrain` open the original again by local.json. Next to NAME.gguf it is NAME.local.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortllm import __version__
from shortllm.checkpoint.hub import EMBEDDED, is_gguf
from shortllm.checkpoint.loaded import is_name
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tensors import read_json, write_json
from shortllm.errors import CheckpointError
from shortllm.format import ABSOLUTE, model_name, without_directories, without_paths
from shortllm.surgery.steps import (
    PROVENANCE,
    Step,
    advised,
    derived_steps,
    kept_after,
    steps_of,
)

LOCAL = "local.json"
"""Name of the file with what is true on this machine only."""


# ---- what config.json says


def provenance_of(checkpoint: Checkpoint, removed: Sequence[int], **how: Any) -> dict[str, Any]:
    """The entry in config.json of a checkpoint that was derived by removing blocks, and `how`."""
    gone = set(removed)
    earlier = steps_of(checkpoint.id, checkpoint.raw_config)
    blocks = kept_after(earlier) if earlier else list(range(checkpoint.block_count))
    kept = [block for place, block in enumerate(blocks) if place not in gone]
    original = earlier[0].source_blocks if earlier else checkpoint.block_count
    return {
        "version": __version__,
        **named_source(checkpoint),
        "source_blocks": checkpoint.block_count,
        "removed_blocks": list(removed),
        **({"draft_reads": draft_reads(original, kept)} if removed else {}),
        **how,
        "parent": checkpoint.raw_config.get(PROVENANCE),
    }


def draft_reads(blocks: int, kept: Sequence[int]) -> dict[str, list[int]]:
    """Before which blocks an EAGLE-style draft of a model of `blocks` blocks reads hidden states
    unless its config says otherwise, and before which of the `kept` ones these states are now."""
    original = sorted({min(2, blocks - 1), blocks // 2, max(0, blocks - 3)})
    return {
        "original": original,
        "now": [sum(block < place for block in kept) for place in original],
    }


def draft_note(provenance: Mapping[str, Any]) -> list[str]:
    """The line that says so to the users of a draft; none where no blocks are gone."""
    if "draft_reads" not in provenance:
        return []
    original, now = (
        ", ".join(map(str, provenance["draft_reads"][name])) for name in ("original", "now")
    )
    return [
        f"a draft of the original (EAGLE) that reads hidden states before its blocks {original} "
        f"must read them before blocks {now} of this model: name those in its config"
    ]


def held_provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """The origin that a checkpoint's config states; for a plain one, that no block is removed."""
    held = checkpoint.raw_config.get(PROVENANCE)
    return held if isinstance(held, dict) and held else provenance_of(checkpoint, [])


def named_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """The Hub id and revision of a model, or the name and hash of a directory."""
    place = own_place(checkpoint)
    if place is None:
        return {"source": checkpoint.id, "revision": checkpoint.revision}
    return {
        "source": model_name(str(place)),
        "source_fingerprint": checkpoint.fingerprint,
        "revision": None,
    }


def sendable(value: Any) -> Any:
    """Content of a JSON file with the last part of each absolute path in it."""
    if isinstance(value, Mapping):
        return {key: sendable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [sendable(one) for one in value]
    return without_paths(without_directories(value)) if isinstance(value, str) else value


# ---- what is of this machine


def own_place(checkpoint: Checkpoint) -> Path | None:
    """The directory or GGUF file of a checkpoint; None where any machine finds it by its name, and
    for a model in memory."""
    named = checkpoint.id == EMBEDDED or is_name(checkpoint.id)
    if checkpoint.revision is not None or named:
        return None
    given = checkpoint.id if is_gguf(checkpoint.id) else checkpoint.directory
    return Path(os.path.abspath(Path(given).expanduser()))


def original_place(place: Path | None, steps: Sequence[Step]) -> str | None:
    """Where the first model of a lineage lies; None if it is found by its name.

    Args:
        place: of the last model.
        steps: that led to it; none for a model that was not shortened.
    """
    if place is None:
        return None
    if not steps:
        return str(place)
    file = local_file(place)
    if file.is_file():
        held = read_json(file).get("original")
        return held if isinstance(held, str) else None
    source = steps[0].source  # earlier versions wrote the directory here
    return source if re.match(ABSOLUTE, source) else None


def write_local(place: Path, original: str | None) -> None:
    """Write next to a new checkpoint what is true on this machine only, if there is anything."""
    if original is not None:
        write_json(local_file(place), {"original": original})


def local_file(place: Path) -> Path:
    """The file next to a checkpoint's files, or next to a GGUF file."""
    return place.with_suffix(f".{LOCAL}") if is_gguf(place) else place / LOCAL


# ---- the original model


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Which blocks of which model a shortened checkpoint contains."""

    source: str
    revision: str | None
    fingerprint: str | None
    """Of the source, where it was a directory."""
    blocks: int
    """Number of blocks of the source."""
    kept: list[int]
    """For each block of the checkpoint its number in the source."""


def lineage(checkpoint: Checkpoint) -> Lineage:
    """The original model of a checkpoint that was shortened once or several times."""
    steps = derived_steps(checkpoint.id, checkpoint.raw_config)
    kept = kept_after(steps)
    if len(kept) != checkpoint.block_count:
        raise CheckpointError(
            f"{checkpoint.id} has {checkpoint.block_count} blocks, but by the removed blocks in "
            f"its config.json it must have {len(kept)}"
        )
    return Lineage(
        source=steps[0].source,
        revision=steps[0].revision,
        fingerprint=steps[0].source_fingerprint,
        blocks=steps[0].source_blocks,
        kept=kept,
    )


def open_original(checkpoint: Checkpoint, given: str | None, flag: str) -> Checkpoint:
    """The model that a checkpoint was shortened from: the one given, or the recorded one."""
    if given is not None:
        return open_checkpoint(given)
    try:
        origin = lineage(checkpoint)
    except CheckpointError as error:
        raise advised(error, flag) from error
    steps = steps_of(checkpoint.id, checkpoint.raw_config)
    place = original_place(own_place(checkpoint), steps)
    if place is None and origin.fingerprint is not None:
        raise CheckpointError(
            f"{checkpoint.id} was shortened from {origin.source}, and where that lies on this "
            f"machine is not known: the checkpoint has no {LOCAL}. Name it with {flag}"
        )
    try:
        original = open_checkpoint(place or origin.source, revision=origin.revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.id} was shortened from {origin.source}, which cannot be opened "
            f"({error}). Name it with {flag}"
        ) from error
    if origin.fingerprint not in (None, original.fingerprint):
        raise CheckpointError(
            f"{checkpoint.id} was shortened from {origin.source}, but {place} is another model "
            f"now. Name the one it was shortened from with {flag}"
        )
    return original


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
        short = model if is_name(model) else Path(model).name or model
        one = opened.get(model) or open_checkpoint(model, revision=origins.get(model))
        checkpoints[model if short in checkpoints else short] = one
    return checkpoints
