"""Quantized checkpoints in the format of compressed-tensors: what a stored tensor stands for.

    X.weight_packed   several weights to an int32        X.weight_shape   rows and columns
    X.weight          8-bit weights, one to a byte       X.weight_scale, ...   beside either

Counted as the weights they stand for, so that a quantized model has the parameters of its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortllm.checkpoint.tensors import TensorEntry, read_tensor

PACKED = ".weight_packed"
SHAPE = ".weight_shape"
BESIDE = (SHAPE, ".weight_scale", ".weight_zero_point", ".weight_g_idx")


def is_packed(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint in this format."""
    held = raw_config.get("quantization_config")
    return isinstance(held, Mapping) and held.get("quant_method") == "compressed-tensors"


def unpacked_elements(
    tensors: Mapping[str, TensorEntry], raw_config: Mapping[str, Any]
) -> dict[str, int]:
    """Tensor name -> number of weights it stands for; 0 for what only says how to read others."""
    counts = {name: entry.elements for name, entry in tensors.items()}
    if not is_packed(raw_config):
        return counts
    for name in tensors:
        layer = name.rpartition(".")[0]
        if name.endswith(PACKED) and layer + SHAPE in tensors:
            rows, columns = read_tensor(tensors[layer + SHAPE]).tolist()
            counts[name] = rows * columns
        elif name.endswith(BESIDE) and (layer + PACKED in tensors or layer + ".weight" in tensors):
            counts[name] = 0
    return counts
