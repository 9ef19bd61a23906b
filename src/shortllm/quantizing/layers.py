"""Which layers of a model are quantized: every linear layer inside the blocks, found by structure.

Embeddings, norms and the head stay as they are. The model is looked at without its weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from shortllm.checkpoint.source import Checkpoint
from shortllm.errors import ShortLLMError, UnsupportedModelError
from shortllm.model.blocks import build_empty, find_blocks, text_config
from shortllm.quantizing.options import PER_ROW

MOST_UNTOUCHED = 0.1
"""Part of a block's weights that may be in no linear layer (convolutions of state-space blocks)."""

LEAST_GROUP = 16
"""Smaller groups cost as much for their scales as they save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The linear layers of a model, by dotted name."""

    widths: dict[str, int]
    """Layer inside the blocks -> its number of inputs."""
    outside: list[str]
    """Linear layers that are not in the blocks: the head."""


def find_layers(checkpoint: Checkpoint) -> Layers:
    """The layers to quantize.

    Raises:
        UnsupportedModelError: the model is quantized already, is no plain text model, has blocks of
            different widths, or most of its weights are in other layers than linear ones.
    """
    _refuse_kinds(checkpoint)
    model = build_empty(checkpoint.config)
    prefix, blocks = find_blocks(model, checkpoint.config)
    inside = {
        f"{prefix}.{name}": module
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    weights = {id(module.weight) for module in inside.values()}
    matrices = [(name, p) for name, p in blocks.named_parameters() if p.ndim > 1]
    untouched = [(name, p) for name, p in matrices if id(p) not in weights]
    part = sum(p.numel() for _, p in untouched) / max(1, sum(p.numel() for _, p in matrices))
    if not inside or part > MOST_UNTOUCHED:
        name = f" (e.g. '{prefix}.{untouched[0][0]}')" if untouched else ""
        raise UnsupportedModelError(
            f"{part:.0%} of the weights in the blocks of model type '{checkpoint.model_type}' are "
            f"in other layers than linear ones{name}, and only linear ones can be quantized. "
            "Quantize it with a program that knows the type"
        )
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in inside
    ]
    return Layers(
        widths={name: module.in_features for name, module in inside.items()}, outside=outside
    )


def _refuse_kinds(checkpoint: Checkpoint) -> None:
    from shortllm.checkpoint.shapes import block_shapes

    config = checkpoint.config
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint.id} is quantized already. Give the checkpoint it was made from"
        )
    if text_config(config) is not config:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' has other towers around its text decoder, and only "
            "plain text models can be quantized"
        )
    if block_shapes(config) is not None:
        raise UnsupportedModelError(
            f"the blocks of {checkpoint.id} differ in width, so that plain transformers could not "
            "load the result. Make it narrower with --shapes uniform"
        )


def require_group_size(layers: Layers, size: int) -> None:
    """Refuse a group size that does not divide the inputs of every layer.

    Raises:
        ShortLLMError: naming the sizes that do.
    """
    if size == PER_ROW:
        return
    unfit = {name: width for name, width in layers.widths.items() if width % size}
    if not unfit:
        return
    name, width = next(iter(unfit.items()))
    fitting = fitting_sizes(layers)
    sizes = f"a size that divides all: {', '.join(map(str, fitting))}; or " if fitting else ""
    raise ShortLLMError(
        f"--group-size {size} does not divide the {width} inputs of '{name}'. Give {sizes}"
        "--group-size 0 for one scale per row"
    )


def fitting_sizes(layers: Layers) -> list[int]:
    """Group sizes that divide the inputs of every layer, the largest first; none below 16."""
    common = math.gcd(*layers.widths.values())
    return [size for size in range(common, LEAST_GROUP - 1, -1) if common % size == 0]
