"""Build models whose blocks differ in width, from the shapes in their config.

The model is built by its own class, then the projections of each block get their shapes, and the
block's modules the head counts that go with them. Everything else (loading, saving, generating,
training) is the class's own.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortllm.checkpoint.blocks import find_blocks
from shortllm.checkpoint.config import block_shapes, marked, per_block_config
from shortllm.checkpoint.tensors import read_json

HEAD_COUNTS = {
    "num_heads": "num_attention_heads",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "split_size": "attention_width",
}
"""Attribute of a module that its forward may read -> the entry in the block's shapes."""


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
    """Give one block the shapes of its entry; an empty entry changes nothing.

    Its weights are not initialised.
    """
    if not shapes:
        return
    for name, (rows, columns) in shapes["projections"].items():
        shape_projection(block.get_submodule(name), rows, columns)
    for name in shapes["biases"]:
        module: Any = block.get_submodule(name)
        rows, _ = shapes["projections"][name]
        bias = torch.empty(rows, dtype=module.weight.dtype, device=module.weight.device)
        module.bias = nn.Parameter(bias)
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
    like = {"dtype": module.weight.dtype, "device": module.weight.device}
    module.weight = nn.Parameter(torch.empty(shape, **like))
    if module.bias is not None:
        module.bias = nn.Parameter(torch.empty(rows, **like))
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
        text = json.dumps(marked(read_json(path)), indent=2) + "\n"
        path.write_text(text, encoding="utf-8")


@cache
def per_block_class(name: str) -> Any:
    """The model class of transformers called `name`, for blocks that differ in width."""
    import transformers

    base = getattr(transformers, name)
    # with a name and module of its own the loader would take it for custom code, and rename no
    # tensors
    return type(name, (PerBlockModel, base), {"__module__": base.__module__})
