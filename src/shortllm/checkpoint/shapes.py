"""Checkpoints whose blocks differ in width: their shapes stand in config.json, block by block.

    "model_type": "llama with a shape per block (load it with shortllm.load)"
    "per_block_shapes": [{"num_attention_heads": 4, ..., "projections": {...}}, ...]

No model class of transformers builds such blocks. The model type is one that it does not know, so
that its loader refuses the checkpoint and repeats what to do, in place of filling tensors of the
wrong shape with random numbers. Here the type's own config class reads the rest, and
model/shapes.py builds the blocks.
"""

from __future__ import annotations

from typing import Any

SHAPES = "per_block_shapes"
"""Config field with one entry per block."""

MARK = " with a shape per block (load it with shortllm.load)"
"""What the model type of such a checkpoint ends with."""


def marked(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the model type that transformers refuses."""
    return {**raw, "model_type": plain_type(raw) + MARK}


def plain_type(raw: dict[str, Any]) -> str:
    """The model type without the mark."""
    return str(raw["model_type"]).removesuffix(MARK)


def per_block_config(raw: dict[str, Any]) -> Any:
    """The transformers config of such a config.json, of the plain type, shapes included.

    Raises:
        KeyError: transformers does not know the plain type.
    """
    from transformers import CONFIG_MAPPING

    model_type = plain_type(raw)
    return CONFIG_MAPPING[model_type].from_dict({**raw, "model_type": model_type})


def block_shapes(config: Any) -> list[dict[str, Any]] | None:
    """The entries of a transformers config, one per block; None for a plain checkpoint."""
    return getattr(config, SHAPES, None)
