"""A checkpoint with zeroed projections on disk: every other byte is copied.

Zeros come from one sparse file, which takes no space on the disk, beside the checkpoint while it is
written. Everything is written under a temporary name, checked, and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortllm import __version__
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.surgery import PROVENANCE, carried_files
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.checkpoint.tokenizer import write_special_tokens
from shortllm.checkpoint.writer import write_tensors
from shortllm.files import PARTIAL, partial_directory
from shortllm.sublayers.record import RECORD, SublayerDrop
from shortllm.sublayers.structure import PARTS, Outputs, Sublayer
from shortllm.width_pruning.writing import stored_name

ZEROS = f"zeros{PARTIAL}"
"""The file that zeros are copied from."""


def write_dropped(
    checkpoint: Checkpoint,
    entries: dict[str, TensorEntry],
    zeros: dict[str, TensorEntry],
    config: dict[str, Any],
    target: Path,
    record: SublayerDrop,
    *,
    advance: Callable[[int], None],
    verify: Callable[[Path], None],
) -> None:
    """Write the checkpoint with sublayers.json as directory `target`, whole or not at all.

    Args:
        entries: new tensor name -> stored tensor.
        zeros: those of them that become zero.
        verify: called with the written directory before it gets its final name; may raise.
    Raises:
        OutputError: the target cannot be written.
    """
    carried = [name for name in carried_files(checkpoint.directory, target) if name.name != RECORD]
    with partial_directory(target) as directory:
        for name in carried:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, directory / name)
        write_special_tokens(checkpoint, directory)
        written = entries | _zeros(directory / ZEROS, zeros)
        write_tensors(directory, written, advance=advance)
        (directory / ZEROS).unlink(missing_ok=True)
        text = json.dumps({**config, PROVENANCE: _provenance(checkpoint, record)}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        verify(directory)
        record.save(directory / RECORD)


def zeroed_names(
    checkpoint: Checkpoint, outputs: Outputs, zeroed: Sequence[Sublayer], kept: Sequence[int]
) -> list[str]:
    """The new names of the weights and biases that become zero."""
    number = {old: new for new, old in enumerate(kept)}
    found = []
    for b, part in zeroed:
        for kind in ("weight", "bias"):
            stored = stored_name(checkpoint, b, f"{outputs[b][part]}.{kind}")
            if stored in checkpoint.tensors:
                found.append(checkpoint.block_names.renumbered(stored, number[b]))
    return found


def _zeros(file: Path, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors as zeros, all taken from one file that has as many as the largest."""
    if not entries:
        return {}
    with open(file, "wb") as stream:
        stream.truncate(max(entry.bytes for entry in entries.values()))
    return {name: replace(entry, file=file, offset=0) for name, entry in entries.items()}


def _provenance(checkpoint: Checkpoint, record: SublayerDrop) -> dict[str, Any]:
    """What config.json says of where the checkpoint comes from."""
    return {
        "version": __version__,
        "source": checkpoint.id,
        "revision": checkpoint.revision,
        "source_blocks": checkpoint.block_count,
        "removed_blocks": record.removed_blocks,
        "criterion": record.criterion,
        "sublayers": {part: record.blocks(part) for part in PARTS},
        "fingerprint": record.fingerprint,
        "parent": checkpoint.raw_config.get(PROVENANCE),
    }
