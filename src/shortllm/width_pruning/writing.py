"""A narrower checkpoint on disk: rows and columns that stay are copied, tensor by tensor.

Kept weights are unchanged to the bit. What is new (biases of flap) is written beside them first,
so that all tensors come from files. Everything is written under a temporary name, checked, and
renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS, TensorEntry, read_tensor_table
from shortllm.surgery.apply import PROVENANCE, provenance_of
from shortllm.surgery.made import require_stored, stored_name, write_made
from shortllm.width_pruning.groups import BlockGroups, Removed
from shortllm.width_pruning.options import RECORD, WidthPruning


def require_plain_names(checkpoint: Checkpoint, groups: Mapping[int, BlockGroups]) -> None:
    """Refuse checkpoints whose tensors are called otherwise than the model's parameters.

    Raises:
        UnsupportedModelError: naming the tensor that is not there.
    """
    for b, of_block in groups.items():
        for sublayer in of_block.sublayers:
            for name in (*sublayer.unit_of_row_R, sublayer.output):
                require_stored(checkpoint, b, name, so_that="they cannot be cut")


def narrowed_tensors(
    checkpoint: Checkpoint, groups: Mapping[int, BlockGroups], removed: Mapping[int, Removed]
) -> dict[str, TensorEntry]:
    """Tensor name -> the part of the stored tensor that stays, in file order."""
    result = dict(checkpoint.tensors)
    for b, gone in removed.items():
        of_block = groups[b]

        def cut(name: str, axis: int, kept: list[int], b: int = b) -> None:
            stored = stored_name(checkpoint, b, name)
            entry = checkpoint.tensors.get(stored)
            if entry is not None and len(kept) < entry.shape[axis]:
                result[stored] = entry.part(axis, entry.shape[axis], kept)

        for sublayer, units in gone.pairs(of_block):
            for name in sublayer.unit_of_row_R:
                rows = sublayer.kept_rows(name, units)
                cut(f"{name}.weight", int(name in of_block.transposed), rows)
                cut(f"{name}.bias", 0, rows)
            name, channels = sublayer.output, sublayer.kept_channels(units)
            cut(f"{name}.weight", int(name not in of_block.transposed), channels)
    return result


def write_narrowed(
    checkpoint: Checkpoint,
    entries: dict[str, TensorEntry],
    new: dict[str, Tensor],
    config: dict[str, Any],
    target: Path,
    record: WidthPruning,
    *,
    advance: Callable[[int], None],
    verify: Callable[[Path], None],
) -> None:
    """Write the checkpoint with width.json as directory `target`, whole or not at all.

    Args:
        entries: see `narrowed_tensors`.
        new: tensors that the source does not hold, or holds otherwise.
        verify: called with the written directory before it gets its final name; may raise.
    Raises:
        OutputError: the target cannot be written.
    """
    width = {"method": record.method, **record.options, "shapes": record.shapes}
    provenance = provenance_of(checkpoint, [], width=width, fingerprint=record.fingerprint)
    write_made(
        checkpoint,
        entries,
        lambda directory: _written(new, directory),
        {**config, PROVENANCE: provenance},
        target,
        record,
        RECORD,
        advance=advance,
        verify=verify,
    )


def _written(tensors: dict[str, Tensor], directory: Path) -> dict[str, TensorEntry]:
    """The tensors as entries of a file in `directory`."""
    from safetensors.torch import save_file

    if not tensors:
        return {}
    directory.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SAFETENSORS
    )
    return read_tensor_table(directory)
