"""Criteria that look at what a block does to the stream, all from one forward pass.

The stream after the last block is taken from that block itself: what transformers hands out as the
last hidden state is already normed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.criteria import Scores, criterion
from shortllm.model.metrics import angular_distance, cosine
from shortllm.papers import DEEPER_LAYERS, SHORTGPT

if TYPE_CHECKING:
    from torch import Tensor


@criterion("influence", needs="streams", label="block influence, 1 − cos [no unit]", paper=SHORTGPT)
def block_influence(before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
    """1 - cos(block input, block output); in [0, 2], 0 = the block keeps the direction."""
    return 1.0 - cosine(before_BTD, after_BTD)


@criterion(
    "relative",
    needs="streams",
    label="relative size of the block's update [no unit]",
    paper=SHORTGPT,
)
def relative_magnitude(before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
    """Length of what the block adds, relative to the length of its output."""
    before_BTD, after_BTD = before_BTD.float(), after_BTD.float()
    added_BT: Tensor = (after_BTD - before_BTD).norm(dim=-1)
    length_BT: Tensor = after_BTD.norm(dim=-1)
    return added_BT / length_BT.clamp_min(1e-30)


@criterion(
    "angular", needs="last token", label="angular distance [fraction of π]", paper=DEEPER_LAYERS
)
def angular_spans(last_SBD: Tensor) -> Scores:
    """Angle, divided by pi, between the last token's stream before and after a span of blocks.

    Mean over samples, for every span; a plan removes the span of its size with the smallest
    distance. The importance of single blocks is that of spans of one.

    Args:
        last_SBD: the last token's stream entering each block and leaving the last, L+1 of them.
    """
    depth = len(last_SBD)
    spans = [
        [
            angular_distance(last_SBD[start], last_SBD[start + n]).double().mean().item()
            for start in range(depth - n)
        ]
        for n in range(1, depth)
    ]
    single_LB = angular_distance(last_SBD[:-1], last_SBD[1:])
    return Scores(
        importance=spans[0], values=spans[0], spans=spans, samples=single_LB.double().tolist()
    )
