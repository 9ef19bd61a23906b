"""Weights alone: needs no text and never builds the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shortllm.criteria import criterion
from shortllm.model.metrics import Reduction, reduce_powers
from shortllm.papers import SHORTENED_LLAMA

if TYPE_CHECKING:
    from torch import Tensor


@criterion(
    "magnitude", needs="weights", label="size of the weights, |weight|", paper=SHORTENED_LLAMA
)
def weight_magnitude(
    weights: dict[str, Tensor],
    *,
    power: Literal[1, 2] = 1,
    over_weights: Reduction = "sum",
    over_block: Reduction = "sum",
) -> float:
    """Absolute values of the block's weights, reduced over each tensor, then over the block.

    Norm weights count, biases do not. A matrix is first summed over its inputs, so that
    `over_weights` reduces its rows. A product is reported as its logarithm.
    """
    return reduce_powers(
        weights.values(), power=power, over_weights=over_weights, over_block=over_block
    )
