"""A checkpoint with a few new tensors: all others are copied, byte by byte, from where they are.

Everything is written under a temporary name, checked, and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.surgery import PROVENANCE, carried_files
from shortllm.checkpoint.tensors import SAFETENSORS, TensorEntry, read_tensor_table
from shortllm.checkpoint.tokenizer import write_special_tokens
from shortllm.checkpoint.writer import write_tensors
from shortllm.errors import CheckpointError, OutputError
from shortllm.files import partial_directory, require_writable
from shortllm.results import ResultFile

NEW = "new"
"""Directory of the new tensors while the checkpoint is written."""


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
    require_writable(target.absolute().parent, sum(entry.bytes for entry in entries.values()))
    carried = [file for file in carried_files(checkpoint.directory, target) if file.name != name]
    with partial_directory(target) as directory:
        for file in carried:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / file, directory / file)
        write_special_tokens(checkpoint, directory)
        written = _write_new(entries, new, directory / NEW)
        write_tensors(directory, entries | written, advance=advance)
        shutil.rmtree(directory / NEW, ignore_errors=True)
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        verify(directory)
        record.save(directory / name)


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


def require_free(target: Path, record: str) -> None:
    """Refuse a target that holds something else than what the same command has made.

    Args:
        record: the file by which that is known.
    Raises:
        OutputError: it is a file, or a directory with other things in it.
    """
    if target.is_file():
        raise OutputError(f"--out {target} is a file. Give a directory")
    if target.is_dir() and any(target.iterdir()) and not (target / record).is_file():
        raise OutputError(f"{target} holds something else. Choose another --out, or delete it")


def is_made_by(target: Path, expected: str, kind: type[ResultFile], name: str) -> bool:
    """Whether `target` is a finished checkpoint whose record has this fingerprint."""
    try:
        record = kind.load(target / name)
        read_tensor_table(target)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what the package raises is a ValueError
        return False
    entry = config.get(PROVENANCE) or {}
    held = {entry.get("fingerprint"), (entry.get("healed") or {}).get("fingerprint")}
    return record.fingerprint == expected and expected in held
