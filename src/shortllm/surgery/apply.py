"""What a checkpoint without some blocks consists of: config, tensors, origin; and a guard.

The model is never built in memory: kept tensors are copied under their new names, from file to file
inside the kernel. Memory stays flat for any model size, and the work takes as long as copying the
kept bytes. Tied tensors are stored once and stay so.

The guard: every kept block of the shortened model must be built like its original. Just lowering
the block count silently changes models whose blocks differ by position: the sixth block of the new
model gets the attention, position code or experts of position six with the weights of another
position. Both models are built on the meta device (no memory for weights), and for every kept block
the structural signatures are compared: parameter names and shapes, submodule classes, and every
plain attribute that can reach the forward pass, except the block's own number and numbers of other
blocks.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from shortllm import __version__
from shortllm.checkpoint.config import is_own_code, read_config, text_config
from shortllm.checkpoint.loaded import is_name
from shortllm.checkpoint.shorten_config import (
    period_hint,
    refuse_block_names_in_config,
    refuse_protected,
    refuse_type,
    shorten_config,
    sliced_axis,
)
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.structure import (
    Signature,
    block_signature,
    build_empty,
    find_blocks,
    same_number,
)
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.files import translate_os_errors
from shortllm.records import MAX_BLOCKS

log = logging.getLogger(__name__)

PROVENANCE = "shortllm"
"""Key in config.json for the origin of a shortened checkpoint."""

REFERENCES = {"kv_shared_layer_index"}
"""Attributes that are the number of another block."""

COVERED = {"store_full_length_kv"}
"""Attributes that may differ because a rule covers them: sources of shared keys stay."""


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
        return read_config(Path(directory), raw)


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


# ---- origin


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
        short = model if is_name(model) else Path(model).name or model
        one = opened.get(model) or open_checkpoint(model, revision=origins.get(model))
        checkpoints[model if short in checkpoints else short] = one
    return checkpoints


# ---- the guard


def check_signatures(original: Any, shortened: Any, kept: Sequence[int]) -> None:
    """Build both configs on the meta device and compare every kept block with its original."""
    before, outside_before = _signatures(original)
    after, outside_after = _signatures(shortened)
    if len(after) != len(kept):
        raise UnsupportedModelError(
            f"model type '{original.model_type}': {len(kept)} blocks requested, but the shortened "
            f"config builds {len(after)}"
        )
    places = max(1, text_config(original).num_hidden_layers // len(before))
    numbers = Renumbering(kept, len(before), places)
    for new, old in enumerate(kept):
        problem = difference(before[old], after[new], old, numbers)
        if problem:
            raise UnsupportedModelError(
                f"removing these blocks from model type '{original.model_type}' would turn block "
                f"{old} into a different block: {problem}. No rule covers this yet."
                f"{period_hint(original)}"
            )
    expected = _sliced(outside_before, len(before), len(kept))
    for place in {**expected, **outside_after}:
        was, shape = expected.get(place, "absent"), outside_after.get(place, "absent")
        if was == shape:
            continue
        raise UnsupportedModelError(
            f"removing blocks from model type '{original.model_type}' would change tensors "
            f"outside the blocks: {place} is {shape} instead of {was}. No rule covers this yet"
        )


def _sliced(outside: Signature, count: int, kept: int) -> Signature:
    """Shapes outside the blocks without the shares of removed blocks."""
    result = dict(outside)
    for place, shape in outside.items():
        axis = sliced_axis(place)
        if axis is not None:
            share = shape[axis] // count
            result[place] = (*shape[:axis], share * kept, *shape[axis + 1 :])
    return result


def _signatures(config: Any) -> tuple[list[Signature], Signature]:
    """The signature of each block, and the shapes of all tensors outside the blocks."""
    model = build_empty(config)
    name, blocks = find_blocks(model, config)
    outside = {
        f"shape of {key}": tuple(tensor.shape)
        for key, tensor in (*model.named_parameters(), *model.named_buffers())
        if not key.startswith(name + ".")
    }
    return [block_signature(block) for block in blocks], outside


@dataclass(frozen=True, slots=True)
class Renumbering:
    """How block numbers change, for attributes that contain some."""

    kept: Sequence[int]
    """Original numbers of the kept blocks, ascending."""
    count: int
    places: int = 1
    """How many numbers each block takes; more than one for a block of several sublayers."""

    def explains(self, before: Any, after: Any, block: int) -> bool:
        """Whether `after` means in the shortened model what `before` means in the original."""
        new_number = {old: new for new, old in enumerate(self.kept)}
        if isinstance(before, (list, tuple)):
            if len(before) == self.count and list(after) == [before[old] for old in self.kept]:
                return True
            numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in before)
            renumbered = [new_number[n] for n in before if n in new_number]
            return numbers and list(after) == renumbered
        if isinstance(before, dict):
            return bool(after == {new_number[n]: v for n, v in before.items() if n in new_number})
        return any(
            same_number(before, after, block * places, new_number[block] * places, places)
            for places in {1, self.places}
        )


def difference(
    original: Signature, shortened: Signature, block: int, numbers: Renumbering
) -> str | None:
    """The first place where two signatures of block `block` differ, None if they agree.

    The block's own number may differ, and lists with one entry per block or of block numbers.
    """
    for place in {**original, **shortened}:
        before, after = original.get(place, "absent"), shortened.get(place, "absent")
        attribute = place.split(".")[-1]
        if not (
            before == after
            or attribute in COVERED
            or (isinstance(before, float) and isinstance(after, float) and isclose(before, after))
            or (attribute in REFERENCES and (after, before) in enumerate(numbers.kept))
            or (type(before) is type(after) and numbers.explains(before, after, block))
        ):
            return f"{place} is {after!r} instead of {before!r}"
    return None
