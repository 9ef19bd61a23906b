"""The model that a config describes, built without weights, and what its blocks are made of.

Models are built on the meta device, which takes no memory for weights. A block's signature is
everything about its structure that can be compared: submodule classes, shapes, plain attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shortllm.checkpoint.blocks import find_blocks
from shortllm.checkpoint.config import block_shapes, is_own_code, model_classes
from shortllm.checkpoint.shapes import per_block_class
from shortllm.errors import UnsupportedModelError

Signature = dict[str, Any]

PLAIN = (bool, int, float, str, type(None))


def auto_class(config: Any) -> Any:
    """The transformers class that loads a config's model with its text head.

    `AutoModelForCausalLM`, except for types that only have a class with image towers around the
    text decoder, or whose checkpoint names that class, and for blocks that differ in width.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text_only, wrapped = model_classes(config.model_type)
    named = set(getattr(config, "architectures", None) or ())
    if block_shapes(config) is not None:
        return per_block_class(min(text_only & named or text_only))
    if wrapped and (not text_only or named & wrapped - text_only):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def build_empty(config: Any, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a config on the meta device: its structure without memory for its weights.

    Args:
        dtype: type of the parameters; default: the config's.
    """
    try:
        with torch.device("meta"):
            arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
            if is_own_code(config):
                arguments["trust_remote_code"] = True
            model: nn.Module = auto_class(config).from_config(config, **arguments)
    except Exception as error:  # model classes raise whatever a config's values lead to
        raise UnsupportedModelError(
            f"transformers cannot build model type '{config.model_type}' from this config: "
            f"{str(error) or type(error).__name__}"
        ) from error
    return model


def block_signature(block: nn.Module) -> Signature:
    """Everything about a block's structure that can be compared.

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
    """Whether a value is a number, a string or a flat collection of them, to branch on."""
    if isinstance(value, PLAIN):
        return True
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, dict) and all(isinstance(item, PLAIN) for item in value.values())


def same_number(before: Any, after: Any, old: int, new: int, places: int) -> bool:
    """Whether two values are the block's number, plus an equal position within the block."""
    if type(before) is not int or type(after) is not int:
        return False
    return bool(before - old == after - new and 0 <= before - old < places)


@dataclass(frozen=True, slots=True)
class BlockStructure:
    """The block list of the model a config describes."""

    name: str
    """Dotted module name."""
    elements: int
    """Elements of all parameters and stored buffers."""
    period: int
    """After how many blocks their kinds repeat; the block count if they never do."""
    parameters: int
    """Parameters of the whole model, tied ones once."""


def block_structure(config: Any) -> BlockStructure:
    """The blocks of a config's model, built without its weights."""
    model = build_empty(config)
    name, blocks = find_blocks(model, config)
    return BlockStructure(
        name=name,
        elements=sum(tensor.numel() for tensor in blocks.state_dict().values()),
        period=_period([block_signature(block) for block in blocks]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _period(signatures: Sequence[Signature]) -> int:
    """The smallest p such that blocks b and b + p have the same structure for every b."""
    count = len(signatures)
    for period in range(1, count):
        pairs = ((b, b + period) for b in range(count - period))
        if all(_same_structure(signatures[b], signatures[c], b, c) for b, c in pairs):
            return period
    return count


def _same_structure(one: Signature, other: Signature, b: int, c: int) -> bool:
    """Whether two blocks of one model differ only in their numbers."""
    return one.keys() == other.keys() and all(
        one[place] == other[place] or same_number(one[place], other[place], b, c, 1)
        for place in one
    )
