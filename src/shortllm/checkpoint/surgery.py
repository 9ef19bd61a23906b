"""A plan applied to a checkpoint on disk: kept tensors are copied under their new names.

The model is never built in memory. Bytes go from file to file inside the kernel, so memory stays
flat whatever the model's size, and the work takes as long as copying the kept bytes. Tied tensors
are stored once and stay so. Everything is written beside the target and renamed when complete.

    shortllm prune MODEL --blocks 3,4 --out DIR
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shortllm import __version__
from shortllm.checkpoint.rules import refuse_block_names_in_config, shorten_config
from shortllm.checkpoint.source import Checkpoint, read_config
from shortllm.checkpoint.tensors import TensorEntry, weight_files
from shortllm.checkpoint.writer import MAX_SHARD_BYTES, write_tensors
from shortllm.files import partial_directory, require_writable

PROVENANCE = "shortllm"
"""Key in config.json under which a shortened checkpoint says where it comes from."""

Advance = Callable[[int], None]


def check_removal(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, Any]:
    """The shortened config.json, after the rules and the structural guard; nothing is written.

    Args:
        kept: kept block numbers, ascending.
    Raises:
        UnsupportedModelError: removing these blocks would give a wrong model.
    """
    from shortllm.checkpoint.signature import check_signatures

    refuse_block_names_in_config(checkpoint.raw_config, checkpoint.block_names.prefix)
    shortened = shorten_config(checkpoint.raw_config, checkpoint.config, kept)
    check_signatures(checkpoint.config, _as_read_from_disk(checkpoint.config, shortened), kept)
    return shortened


def _as_read_from_disk(original: Any, raw: dict[str, Any]) -> Any:
    """The transformers config object that a file holding `raw` will give."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return read_config(Path(directory), original.model_type)


def write_shortened(
    checkpoint: Checkpoint,
    kept: Sequence[int],
    target: Path,
    *,
    provenance: dict[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Advance = lambda copied: None,
    verify: Callable[[Path], None] = lambda written: None,
) -> None:
    """Write the checkpoint of the blocks `kept` as directory `target`, whole or not at all.

    Args:
        kept: kept block numbers, ascending.
        provenance: goes into config.json under `shortllm`, beside the version and the source.
        advance: called with the number of bytes copied since its last call.
        verify: called with the written directory before it gets its final name; may raise.
    Raises:
        UnsupportedModelError: removing these blocks would give a wrong model.
        OutputError: the target cannot be written.
    """
    config = check_removal(checkpoint, kept)
    entries = renumbered_tensors(checkpoint, kept)
    require_writable(target.parent, sum(entry.bytes for entry in entries.values()))
    config[PROVENANCE] = {
        "version": __version__,
        "source": checkpoint.id,
        "revision": checkpoint.revision,
        "source_blocks": checkpoint.block_count,
        "removed_blocks": sorted(set(range(checkpoint.block_count)) - set(kept)),
        **provenance,
        "parent": checkpoint.raw_config.get(PROVENANCE),
    }
    with partial_directory(target) as directory:
        carry_other_files(checkpoint.directory, directory)
        write_tensors(directory, entries, max_shard_bytes=max_shard_bytes, advance=advance)
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        verify(directory)


def renumbered_tensors(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, TensorEntry]:
    """New tensor name -> stored tensor, in file order; tensors of removed blocks are absent."""
    names = checkpoint.block_names
    new_number = {old: new for new, old in enumerate(kept)}
    result: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        block = names.block_of(name)
        if block is None:
            result[name] = entry
        elif block in new_number:
            result[names.renumbered(name, new_number[block])] = entry
    return result


def carry_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and all else that is neither weights nor config.json."""
    weights = weight_files(source)
    for path in sorted(source.iterdir()):
        if path.name in weights or path.name == "config.json" or path.name.startswith("."):
            continue
        if path.is_dir():
            if not weight_files(path):  # e.g. a second copy of the weights in another format
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)
