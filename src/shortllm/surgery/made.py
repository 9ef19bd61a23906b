"""Checkpoints that a stage makes: whose a target is, whether it is up to date, how it is written.

Each has a record beside its weights (width.json, heal.json, ...), which carries the fingerprint of
what made it, as config.json does under `shortllm`.


Tensors of a block in the files, by the names that the model's parameters have in memory.

A checkpoint with a few new tensors: all others are copied, byte by byte, from where they are.

Everything is written under a temporary name, checked, and renamed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.tensors import SAFETENSORS, TensorEntry, read_json, read_tensor_table
from shortllm.checkpoint.tokenizer import write_special_tokens
from shortllm.checkpoint.writer import write_tensors
from shortllm.errors import CheckpointError, OutputError, UnsupportedModelError
from shortllm.files import fingerprint, partial_directory, require_writable
from shortllm.records import ResultFile
from shortllm.surgery.apply import PROVENANCE, carried_files, carried_fingerprint

if TYPE_CHECKING:
    from shortllm.data.calibration import Calibration


log = logging.getLogger(__name__)

Made = TypeVar("Made", bound=ResultFile)

NEW = "new"
"""Directory of the tensors that the source does not hold, while a checkpoint is written."""

CARDS = {"README.md", "README.original.md"}
"""Model cards, which a report lays beside the weights, do not count as a change."""


def require_free(target: Path, record: str) -> None:
    """Refuse a target that holds something else than what the same stage has made.

    Args:
        record: the file by which that is known.
    Raises:
        OutputError: it is a file, or a directory with other things in it.
    """
    if target.is_file():
        raise OutputError(f"--out {target} is a file. Give a directory")
    if target.is_dir() and any(target.iterdir()) and not (target / record).is_file():
        raise OutputError(f"{target} holds something else. Choose another --out, or delete it")


def made_fingerprint(
    checkpoint: Checkpoint,
    *,
    calibration: Calibration | None,
    dtype: str,
    device: str,
    without: Collection[str] = (),
    **of: Any,
) -> str:
    """Of everything that a checkpoint made from another one depends on.

    Args:
        calibration: the tokens that were looked at, if any.
        without: files beside the weights that do not count.
        of: the choices of the stage, under its name; and what else the result depends on.
    """
    return fingerprint(
        {
            "model": checkpoint.fingerprint,
            "other files": carried_fingerprint(checkpoint.directory, without=without),
            "calibration": calibration.info.tokens_fingerprint if calibration else None,
            "dtype": dtype,
            "device": device,
            **of,
        }
    )


def is_made_by(
    target: Path, expected: str, kind: type[ResultFile], record: str, *, under: str | None = None
) -> bool:
    """Whether `target` is a finished checkpoint whose record and config have this fingerprint.

    Args:
        kind, record: the class and the file of the record.
        under: the key within the config's entry that the fingerprint stands under, if any.
    """
    try:
        found = kind.load(target / record)
        read_tensor_table(target)
        entry = read_json(target / "config.json")[PROVENANCE]
        held = (entry if under is None else entry[under])["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):  # what the package raises is a ValueError
        return False
    return bool(found.fingerprint == held == expected)


def finished(
    target: Path, expected: str, kind: type[Made], record: str, *, under: str | None = None
) -> Made | None:
    """The record of a target that is up to date, saying so; None where it has to be made.

    Args:
        kind, record, under: as for `is_made_by`.
    """
    if not is_made_by(target, expected, kind, record, under=under):
        return None
    log.info("%s is up to date, skipped", target)
    return kind.load(target / record)


def copy_carried(checkpoint: Checkpoint, names: Iterable[Path], directory: Path) -> None:
    """Copy files that a new checkpoint takes along, see `carried_files`."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.directory / name, directory / name)


def write_made(
    checkpoint: Checkpoint,
    entries: Mapping[str, TensorEntry],
    new: Callable[[Path], Mapping[str, TensorEntry]],
    config: Mapping[str, Any],
    target: Path,
    record: ResultFile,
    name: str,
    *,
    advance: Callable[[int], None],
    verify: Callable[[Path], None],
) -> None:
    """Write a checkpoint as directory `target`, whole or not at all.

    Args:
        entries: new tensor name -> stored tensor, copied from where it is.
        new: makes files in a directory that is deleted afterwards, and gives the tensors in them,
            which take the place of entries or come on top.
        config: the content of config.json.
        record: goes into the directory as the file `name`.
        verify: called with the written directory before it gets its final name; may raise.
    Raises:
        OutputError: the target cannot be written.
    """
    carried = [file for file in carried_files(checkpoint.directory, target) if file.name != name]
    needed = sum(entry.bytes for entry in entries.values())
    require_writable(target.absolute().parent, needed)
    with partial_directory(target, needed_bytes=needed) as directory:
        copy_carried(checkpoint, carried, directory)
        write_special_tokens(checkpoint, directory)
        written = {**entries, **new(directory / NEW)}
        write_tensors(directory, written, advance=advance)
        shutil.rmtree(directory / NEW, ignore_errors=True)
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        verify(directory)
        record.save(directory / name)


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
