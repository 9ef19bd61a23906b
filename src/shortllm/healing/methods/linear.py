"""A linear map for each gap, folded into the output projection of the block before it.

Source: Shopkhoev et al. 2025, ReplaceMe, arXiv:2505.02819; see `least_squares.py` for the maths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.healing.methods import METHODS, Healed, HealingMethod, Task
from shortllm.papers import REPLACE_ME

if TYPE_CHECKING:
    from shortllm.checkpoint.source import Checkpoint
    from shortllm.model.decoder import Decoder


def require_projection(checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Find out on the first block whether maps can be folded into a model."""
    from shortllm.healing.folding import find_foldable

    find_foldable(checkpoint, decoder, [0])


@METHODS.register(
    HealingMethod(
        name="linear",
        label="Linear maps",
        paper=REPLACE_ME,
        check=require_projection,
        options={"ridge": None, "weighting": "norm"},
    )
)
def linear(task: Task) -> Healed:
    """A least-squares map for each gap, folded into the block before it."""
    from shortllm.healing.gap_by_gap import heal_gaps

    return heal_gaps(task)
