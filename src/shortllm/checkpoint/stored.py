"""Tensors of a block in the files, by the names that the model's parameters have in memory."""

from __future__ import annotations

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.errors import UnsupportedModelError


def stored_name(checkpoint: Checkpoint, b: int, name: str) -> str:
    """The name in the files of a tensor of block `b`."""
    return f"{checkpoint.block_names.prefix}.{b}.{name}"


def require_stored(checkpoint: Checkpoint, b: int, name: str, *, so_that: str) -> TensorEntry:
    """The weights of the projection `name` of block `b`.

    Args:
        so_that: what cannot be done without, e.g. 'they cannot be cut'.
    Raises:
        UnsupportedModelError: the files call them otherwise than the model does.
    """
    stored = stored_name(checkpoint, b, f"{name}.weight")
    entry = checkpoint.tensors.get(stored)
    if entry is None:
        raise UnsupportedModelError(
            f"{checkpoint.id} stores the weights of '{name}' of block {b} under another name than "
            f"'{stored}', so that {so_that}. Save it again with transformers' save_pretrained"
        )
    return entry
