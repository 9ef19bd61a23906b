"""Structured Wanda: weights times the size of their inputs, block after block.

Shapes: D width of the hidden state, C inputs of the output projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.papers import FLAP
from shortllm.width_pruning.methods import METHODS, Chosen, Task, WidthMethod

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.width_pruning.groups import Removed, Sublayer
    from shortllm.width_pruning.importance import ActivationStats, BlockStats


@METHODS.register(WidthMethod(name="wanda-sp", label="Wanda-sp", paper=FLAP))
def wanda_sp(task: Task) -> Chosen:
    """Weights times inputs; each block is scored on the outputs of the narrower ones before it."""
    from shortllm.width_pruning.importance import block_importance, choose_per_block, watch_inputs

    chosen = Chosen(removed={}, importance={})

    def decide(b: int, stats: BlockStats) -> Removed:
        found = block_importance(weighted_input, task.decoder, task.groups[b], b, stats)
        gone = choose_per_block(found, task.counts[b], b)
        chosen.importance[b], chosen.removed[b] = found, gone
        return gone

    watch_inputs(task, decide, sequential=True)
    return chosen


def weighted_input(weight_DC: Tensor, sublayer: Sublayer, stats: ActivationStats) -> Tensor:
    """Mean absolute weight of a channel times the root mean square of its input, summed per unit.

    Source: the structured Wanda of An et al. 2023, FLAP, arXiv:2312.11983.
    """
    return sublayer.channel_totals(weight_DC.abs().mean(0) * stats.root_mean_square_C)
