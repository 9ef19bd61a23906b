"""A checkpoint with a few new tensors: all others are copied, byte by byte, from where they are.

Everything is written under a temporary name, checked, and renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from shortllm.checkpoint.made import write_made
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS, TensorEntry, read_tensor_table
from shortllm.errors import CheckpointError
from shortllm.results.record import ResultFile


def write_changed(
    checkpoint: Checkpoint,
    entries: dict[str, TensorEntry],
    new: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    target: Path,
    record: ResultFile,
    name: str,
    *,
    advance: Callable[[int], None],
    verify: Callable[[Path], None],
) -> None:
    """Write a checkpoint as directory `target`, whole or not at all.

    Args:
        entries: all tensors by their new names, in the order in which they are stored.
        new: those of them that are not copied, with their names, of the stored shape and type;
            one is in memory at a time.
        record: goes into the directory as the file `name`.
        verify: called with the written directory before it gets its final name; may raise.
    Raises:
        OutputError: the target cannot be written.
    """
    write_made(
        checkpoint,
        entries,
        lambda directory: _write_new(entries, new, directory),
        config,
        target,
        record,
        name,
        advance=advance,
        verify=verify,
    )


def _write_new(
    entries: dict[str, TensorEntry], new: Iterable[tuple[str, Tensor]], directory: Path
) -> dict[str, TensorEntry]:
    """Each new tensor in a file of its own.

    Raises:
        CheckpointError: one has another shape or type than what it takes the place of.
    """
    from safetensors.torch import save_file

    written: dict[str, TensorEntry] = {}
    for number, (name, tensor) in enumerate(new):
        own = directory / str(number)
        own.mkdir(parents=True)
        save_file({name: tensor.contiguous()}, own / SAFETENSORS)
        written |= read_tensor_table(own)
        held = entries[name]
        if (held.shape, held.dtype) != (written[name].shape, written[name].dtype):
            raise CheckpointError(
                f"the new tensor '{name}' is {written[name].dtype} {list(written[name].shape)}, "
                f"where {held.dtype} {list(held.shape)} is stored"
            )
    return written
