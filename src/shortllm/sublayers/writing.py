"""A checkpoint with zeroed projections on disk: every other byte is copied.

Zeros come from one sparse file, which takes no space on the disk, beside the checkpoint while it is
written. Everything is written under a temporary name, checked, and renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.sublayers.options import RECORD, SublayerDrop
from shortllm.sublayers.structure import PARTS, Outputs, Sublayer
from shortllm.surgery.apply import PROVENANCE, provenance_of
from shortllm.surgery.derived import stored_name, write_made


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
    provenance = provenance_of(
        checkpoint,
        record.removed_blocks,
        criterion=record.criterion,
        sublayers={part: record.blocks(part) for part in PARTS},
        fingerprint=record.fingerprint,
    )
    write_made(
        checkpoint,
        entries,
        lambda directory: _zeros(directory, zeros),
        {**config, PROVENANCE: provenance},
        target,
        record,
        RECORD,
        advance=advance,
        verify=verify,
    )


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


def _zeros(directory: Path, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors as zeros, all taken from one file that has as many as the largest."""
    if not entries:
        return {}
    directory.mkdir()
    file = directory / "zeros"
    with open(file, "wb") as stream:
        stream.truncate(max(entry.bytes for entry in entries.values()))
    return {name: replace(entry, file=file, offset=0) for name, entry in entries.items()}
