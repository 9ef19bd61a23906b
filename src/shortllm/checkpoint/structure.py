"""The model that a config describes: built without weights, its blocks and what they consist of.

Models are built on the meta device, which takes no memory for weights. The block list is found by
structure, not by a family's name: the module list as long as the config's block count. A block's
signature is everything about its structure that can be compared: submodule classes, shapes, plain
attributes. Models whose blocks differ in width are built by their own class, then the projections
of each block get the shapes in the config, and its modules the head counts that go with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortllm.checkpoint.config import (
    block_count,
    block_shapes,
    is_own_code,
    marked,
    model_classes,
    per_block_config,
    text_config,
)
from shortllm.checkpoint.tensors import read_json, write_json
from shortllm.errors import UnsupportedModelError

Signature = dict[str, Any]

PLAIN = (bool, int, float, str, type(None))

HEAD_COUNTS = {
    "num_heads": "num_attention_heads",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "split_size": "attention_width",
}
"""Attribute of a module that its forward may read -> the entry in the block's shapes."""


# ---- building


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
    """The model of a config on the meta device; parameters in the config's type by default."""
    arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if is_own_code(config):
        arguments["trust_remote_code"] = True
    try:
        with torch.device("meta"):
            model: nn.Module = auto_class(config).from_config(config, **arguments)
    except Exception as error:  # model classes raise whatever a config's values lead to
        raise UnsupportedModelError(
            f"transformers cannot build model type '{config.model_type}' from this config: "
            f"{str(error) or type(error).__name__}"
        ) from error
    return model


# ---- finding blocks


def find_blocks(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """Dotted name and module list of the decoder's blocks: modules that have parts themselves.

    Where several lists have the right length (a vision tower as deep as the decoder), those inside
    the text decoder are taken: within `model.get_decoder()`, and built from the text config.
    """
    count = block_count(config)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(True for _ in block.children()) for block in module)
    ]
    outer = [
        (name, module)
        for name, module in found
        if not any(name.startswith(other + ".") for other, _ in found)
    ]
    if len(outer) > 1:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        inside = {id(module) for module in decoder.modules()}
        outer = [(name, module) for name, module in outer if id(module) in inside]
    if len(outer) > 1:
        text_type = text_config(config).model_type
        outer = [(name, m) for name, m in outer if _config_type(model, name) == text_type]
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise UnsupportedModelError(
            f"model type '{config.model_type}' has {count} blocks, but the module lists of that "
            f"length are: {names}. Exactly one is needed to know which blocks can go"
        )
    return outer[0]


def _config_type(model: nn.Module, name: str) -> str | None:
    """Model type of the nearest config above the module `name`."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return str(getattr(config, "model_type", None))
    return None


def is_projection(module: nn.Module) -> bool:
    """Whether a module is one matrix that its input is multiplied with."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


# ---- comparing blocks


def block_signature(block: nn.Module) -> Signature:
    """What can be compared: `class of X`, `shape of X`, and plain attributes by dotted name."""
    signature: Signature = {}
    for name, module in block.named_modules():
        signature[f"class of {name or 'block'}"] = type(module).__qualname__
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and attribute != "training" and _is_plain(value):
                signature[f"{name}.{attribute}".lstrip(".")] = value
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        signature[f"shape of {name}"] = tuple(tensor.shape)
    return signature


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a string or a flat collection of them, to branch on."""
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, (tuple, list, dict)):
        return all(isinstance(item, PLAIN) for item in items)
    return isinstance(value, PLAIN)


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
    transposed: frozenset[str]
    """Names within a block of the matrices with a column for each output instead of a row."""
    ignored: tuple[str, ...] = ()
    """Patterns of stored names that the class ignores while it is loaded."""

    def ignores(self, name: str) -> bool:
        """Whether transformers loads the model without a word on a stored tensor of this name."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def block_structure(config: Any) -> BlockStructure:
    """The blocks of a config's model, built without its weights."""
    model = build_empty(config)
    name, blocks = find_blocks(model, config)
    return BlockStructure(
        name=name,
        elements=sum(tensor.numel() for tensor in blocks.state_dict().values()),
        period=_period([block_signature(block) for block in blocks]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        transposed=frozenset(
            f"{name}.weight"
            for block in blocks
            for name, module in block.named_modules()
            if is_projection(module) and not isinstance(module, nn.Linear)
        ),
        ignored=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
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


# ---- blocks that differ in width


class BlockConfig:
    """A model's config as the modules of one block see it, with the head counts of that block."""

    def __init__(self, config: Any, counts: dict[str, int]) -> None:
        self._config = config
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_counts"):  # missing while the object is being copied
            raise AttributeError(name)
        return self._counts[name] if name in self._counts else getattr(self._config, name)


def shape_block(block: nn.Module, shapes: dict[str, Any]) -> None:
    """Give one block the shapes of its entry, without weights; an empty entry changes nothing."""
    if not shapes:
        return
    for name, (rows, columns) in shapes["projections"].items():
        shape_projection(block.get_submodule(name), rows, columns)
    for name in shapes["biases"]:
        module: Any = block.get_submodule(name)
        rows, _ = shapes["projections"][name]
        module.bias = nn.Parameter(module.weight.new_empty(rows))
    counts = {name: shapes[entry] for name, entry in HEAD_COUNTS.items()}
    for module in block.modules():
        for name, count in counts.items():
            if isinstance(vars(module).get(name), int):
                setattr(module, name, count)
        if "config" in vars(module):
            own = {name: shapes[name] for name in ("num_attention_heads", "num_key_value_heads")}
            module.config = BlockConfig(module.config, own)


def shape_projection(module: Any, rows: int, columns: int) -> None:
    """Give a projection another number of outputs and inputs."""
    linear = isinstance(module, nn.Linear)
    shape = (rows, columns) if linear else (columns, rows)
    if module.weight.shape == shape:
        return
    module.weight = nn.Parameter(module.weight.new_empty(shape))
    if module.bias is not None:
        module.bias = nn.Parameter(module.weight.new_empty(rows))
    if linear:
        module.in_features, module.out_features = columns, rows
    else:
        module.nx, module.nf = columns, rows


class PerBlockModel:
    """Mixed into a model class for blocks that differ in width."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        _, blocks = find_blocks(model, config)
        for block, shapes in zip(blocks, block_shapes(config) or (), strict=True):
            shape_block(block, shapes)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """The model without weights, as an auto class of transformers builds it."""
        return cls._from_config(config, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the class does, with the config that transformers cannot read."""
        if kwargs.get("config") is None:
            kwargs["config"] = per_block_config(read_json(Path(directory) / "config.json"))
        kwargs.pop("trust_remote_code", None)
        return super().from_pretrained(directory, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the class does; the model type is marked again."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "config.json"
        write_json(path, marked(read_json(path)))


@cache
def per_block_class(name: str) -> Any:
    """The model class of transformers called `name`, for blocks that differ in width."""
    import transformers

    base = getattr(transformers, name)
    # with a name and module of its own the loader would take it for custom code, and rename no
    # tensors
    return type(name, (PerBlockModel, base), {"__module__": base.__module__})
