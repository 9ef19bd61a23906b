"""A factor for the hidden state behind each gap, and no other change.

Source: Prune&Comp, arXiv:2507.18212; see `gain.py` of the package above for how it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.errors import UnsupportedModelError
from shortllm.healing.methods import METHODS, Healed, HealingMethod, Task
from shortllm.papers import PRUNE_AND_COMP

if TYPE_CHECKING:
    from shortllm.checkpoint.source import Checkpoint
    from shortllm.model.decoder import Decoder


def require_scalable(checkpoint: Checkpoint, decoder: Decoder, first: int = 2) -> None:
    """Refuse a model whose blocks do not ignore the scale of the hidden state.

    `first` is the first block behind a gap. Those before it are not scaled, and where the hidden
    state is small, the epsilon of a norm is not.
    """
    from shortllm.healing.gain import find_scalable

    if find_scalable(checkpoint, decoder, range(first, decoder.block_count)) is None:
        raise UnsupportedModelError(
            f"the blocks of {checkpoint.id} do not ignore the scale of the hidden state, so a "
            "factor cannot be folded into them. Choose another --method, e.g. regression"
        )


@METHODS.register(
    HealingMethod(
        name="gain",
        label="Gain compensation",
        paper=PRUNE_AND_COMP,
        check=require_scalable,
        options={"weighting": "norm"},
    )
)
def gain(task: Task) -> Healed:
    """One factor for the hidden state behind each gap."""
    from shortllm.healing.gap_by_gap import heal_gaps

    require_scalable(task.checkpoint, task.decoder, min(task.removed) + 1)
    return heal_gaps(task)
