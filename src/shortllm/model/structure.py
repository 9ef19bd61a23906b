"""What a block is made of, compared between blocks and between models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shortllm.model.blocks import build_empty, find_blocks

Signature = dict[str, Any]

REFERENCES = {"kv_shared_layer_index"}
"""Attributes that hold the number of another block."""

ANSWERED = {"store_full_length_kv"}
"""Attributes that may differ, as a rule keeps what they stand for: sources of shared keys stay."""

PLAIN = (bool, int, float, str, type(None))


def block_signature(block: nn.Module) -> Signature:
    """Everything about a block's structure that can be compared, keyed by a readable place.

    Keys: `class of X`, `shape of X`, and the dotted name of each plain attribute.
    """
    signature: Signature = {}
    for name, module in block.named_modules():
        signature[f"class of {name or 'block'}"] = type(module).__qualname__
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute == "training":
                continue
            if _is_plain(value):
                signature[f"{name}.{attribute}".lstrip(".")] = value
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        signature[f"shape of {name}"] = tuple(tensor.shape)
    return signature


def _is_plain(value: Any) -> bool:
    """Numbers, strings and flat collections of them: what a forward pass may branch on."""
    if isinstance(value, PLAIN):
        return True
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, dict) and all(isinstance(item, PLAIN) for item in value.values())


@dataclass(frozen=True, slots=True)
class Renumbering:
    """How block numbers change, for attributes that hold some."""

    kept: Sequence[int]
    """Original numbers of the kept blocks, ascending."""
    count: int
    places: int = 1
    """How many numbers each block takes, where a block of several sublayers takes more."""

    def explains(self, before: Any, after: Any, block: int) -> bool:
        """Whether `after` says of the shortened model what `before` said of the original."""
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
            _same_number(before, after, block * places, new_number[block] * places, places)
            for places in {1, self.places}
        )

    def refers_alike(self, before: Any, after: Any) -> bool:
        """Whether two numbers of another block mean the same one."""
        return before in self.kept and self.kept.index(before) == after


def difference(
    original: Signature, shortened: Signature, block: int, numbers: Renumbering
) -> str | None:
    """The first place where two signatures differ, None if they agree.

    May differ: the block's own number, and lists with one entry per block or of block numbers.

    Args:
        block: original number of the block.
    """
    for place in {**original, **shortened}:
        before, after = original.get(place, "absent"), shortened.get(place, "absent")
        attribute = place.split(".")[-1]
        if before == after or attribute in ANSWERED:
            continue
        if isinstance(before, float) and isinstance(after, float) and math.isclose(before, after):
            continue
        if attribute in REFERENCES and numbers.refers_alike(before, after):
            continue
        if type(before) is type(after) and numbers.explains(before, after, block):
            continue
        return f"{place} is {after!r} instead of {before!r}"
    return None


def _same_number(before: Any, after: Any, old: int, new: int, places: int) -> bool:
    """Whether two values are the block's number before and after, counted on within the block."""
    if type(before) is not int or type(after) is not int:
        return False
    return bool(before - old == after - new and 0 <= before - old < places)


@dataclass(frozen=True, slots=True)
class BlockStructure:
    """The block list of the model a config describes."""

    name: str
    """Dotted module name."""
    elements: int
    """Of all parameters and stored buffers."""
    period: int
    """After how many blocks their kinds repeat; the block count if they never do."""
    parameters: int
    """Of the whole model, tied ones once."""


def block_structure(config: Any) -> BlockStructure:
    """Build a config's model without its weights, and look at its blocks."""
    model = build_empty(config)
    name, blocks = find_blocks(model, config)
    return BlockStructure(
        name=name,
        elements=sum(tensor.numel() for tensor in blocks.state_dict().values()),
        period=_period([block_signature(block) for block in blocks]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _period(signatures: Sequence[Signature]) -> int:
    """The smallest p such that blocks b and b + p are built alike for every b."""
    count = len(signatures)
    for period in range(1, count):
        pairs = ((b, b + period) for b in range(count - period))
        if all(_alike(signatures[b], signatures[c], b, c) for b, c in pairs):
            return period
    return count


def _alike(one: Signature, other: Signature, b: int, c: int) -> bool:
    """Whether two blocks of one model are built alike but for their numbers."""
    return one.keys() == other.keys() and all(
        one[place] == other[place] or _same_number(one[place], other[place], b, c, 1)
        for place in one
    )


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
