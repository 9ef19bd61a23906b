"""First-order estimate of what the loss would lose with a block's weights set to zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shortllm.criteria import criterion
from shortllm.model.metrics import Reduction, reduce_powers
from shortllm.papers import SHORTENED_LLAMA

if TYPE_CHECKING:
    from torch import Tensor


@criterion(
    "taylor",
    needs="gradients",
    label="estimated change of the loss, |weight × gradient|",
    paper=SHORTENED_LLAMA,
)
def first_order_change(
    products: dict[str, Tensor],
    *,
    power: Literal[1, 2] = 1,
    over_weights: Reduction = "sum",
    over_block: Reduction = "sum",
) -> float:
    """Absolute values of weight times gradient, reduced over each tensor, then over the block.

    The product is signed and summed over all samples before its absolute value is taken. The loss
    is the mean next-token NLL of all samples as one batch: summing the products of several equal
    batches gives the same times their number. A matrix is first summed over its inputs, so that
    `over_weights` reduces its rows. A product is reported as its logarithm.
    """
    return reduce_powers(
        products.values(), power=power, over_weights=over_weights, over_block=over_block
    )
