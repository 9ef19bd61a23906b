"""What a checkpoint without some blocks consists of: its config and tensors; and a guard.

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
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from shortllm.checkpoint.config import is_own_code, read_config, text_config
from shortllm.checkpoint.rules import PERIOD_OF
from shortllm.checkpoint.shorten_config import (
    period_hint,
    refuse_protected,
    refuse_type,
    shorten_config,
    sliced_axis,
)
from shortllm.checkpoint.source import Checkpoint
from shortllm.checkpoint.structure import (
    Signature,
    block_signature,
    build_empty,
    find_blocks,
    same_number,
)
from shortllm.checkpoint.tensors import TensorEntry
from shortllm.errors import UnsupportedModelError
from shortllm.files import translate_os_errors
from shortllm.model.loading import require_complete
from shortllm.surgery.companions import follow_removal

REFERENCES = {"kv_shared_layer_index"}
"""Attributes that are the number of another block."""

COVERED = {"store_full_length_kv", *PERIOD_OF}
"""Attributes that may differ because a rule covers them: sources of shared keys stay, and a list
says of each block what a period says of all."""


def check_removal(
    checkpoint: Checkpoint, kept: Sequence[int], *, drop_heads: bool = False, stored: bool = True
) -> dict[str, Any]:
    """The shortened config.json, after the rules and the structural guard; nothing is written.

    Args:
        stored: whether the tensors are those of files, so that some may be missing.
    """
    refuse_type(checkpoint.config)
    followed = follow_removal(checkpoint, kept, drop_heads=drop_heads)
    if stored:
        require_complete(checkpoint)
    heads = checkpoint.block_names.heads
    shortened = shorten_config(
        followed.config, checkpoint.config, kept, heads=heads, drop_heads=drop_heads
    )
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


def renumbered_tensors(
    checkpoint: Checkpoint, kept: Sequence[int], *, drop_heads: bool = False
) -> dict[str, TensorEntry]:
    """New tensor name -> stored tensor, in file order.

    Tensors of removed blocks are left out. Prediction heads behind the last block get new numbers.
    Of tensors outside the blocks that have a share for every block, the shares of kept blocks stay.
    """
    names = checkpoint.block_names
    new_numbers = names.new_numbers(kept, drop_heads=drop_heads)
    result: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        number, axis = names.number_of(name), sliced_axis(name)
        if drop_heads and names.is_head(name):
            continue
        if number is None:
            result[name] = entry if axis is None else entry.part(axis, names.count, kept)
        elif number in new_numbers:
            result[names.renumbered(name, new_numbers[number])] = entry
    return result


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
