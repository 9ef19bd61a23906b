"""New weights of the output projections of the block before each gap, by least squares.

All weights of the projections are unknowns: as many columns as it has inputs, where a linear map
behind one has only as many as the hidden state is wide. See `least_squares.py` for the maths.
"""

from __future__ import annotations

from shortllm.healing.methods import METHODS, Healed, HealingMethod, Task
from shortllm.healing.methods.linear import require_projection


@METHODS.register(
    HealingMethod(
        name="regression",
        label="Regression of the weights",
        check=require_projection,
        options={
            "ridge": None,
            "weighting": "norm",
            "attention": True,
            "gain": True,
            "before": 3,
            "behind": 0,
        },
    )
)
def regression(task: Task) -> Healed:
    """The output projections of the block before each gap, refitted as a whole."""
    from shortllm.healing.gap_by_gap import heal_gaps

    return heal_gaps(task)
