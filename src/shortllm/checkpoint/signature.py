"""The structural guard: every kept block of the shortened model must be built like its original.

Lowering the block count alone silently changes models whose blocks differ by position: the sixth
block of the new model gets the attention, position code or experts of place six under the weights
of another place. Both models are built on the meta device (no memory for weights), and for every
kept block the structural signature is compared: parameter names and shapes, submodule classes, and
every plain attribute that can reach the forward pass, except those that are the block's own number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from shortllm.errors import UnsupportedModelError
from shortllm.model.blocks import build_empty, find_blocks

Signature = dict[str, Any]

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


def difference(original: Signature, shortened: Signature, old: int, new: int) -> str | None:
    """The first place where two signatures differ, None if they agree.

    An attribute that is `old` in one and `new` in the other is the block's number and may differ.
    """
    for place in {**original, **shortened}:
        before, after = original.get(place, "absent"), shortened.get(place, "absent")
        if before == after or (_is_number(before, old) and _is_number(after, new)):
            continue
        return f"{place} is {after!r} instead of {before!r}"
    return None


def _is_number(value: Any, expected: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == expected


def check_signatures(original: Any, shortened: Any, kept: Sequence[int]) -> None:
    """Build both configs on the meta device and compare every kept block with its original.

    Args:
        original: transformers config of the whole model.
        shortened: transformers config after the rules.
        kept: original numbers of the kept blocks, ascending.
    Raises:
        UnsupportedModelError: naming the block and the attribute that would be wrong.
    """
    before, outside_before = _signatures(original)
    after, outside_after = _signatures(shortened)
    if len(after) != len(kept):
        raise UnsupportedModelError(
            f"model type '{original.model_type}': asked for {len(kept)} blocks, the shortened "
            f"config builds {len(after)}"
        )
    for new, old in enumerate(kept):
        problem = difference(before[old], after[new], old, new)
        if problem:
            raise UnsupportedModelError(
                f"removing these blocks from model type '{original.model_type}' would turn block "
                f"{old} into a "
                f"different block: {problem}. No rule covers this yet"
            )
    problem = difference(outside_before, outside_after, -1, -1)
    if problem:
        raise UnsupportedModelError(
            f"removing blocks from model type '{original.model_type}' would change tensors "
            "outside the blocks: "
            f"{problem}. No rule covers this yet"
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
