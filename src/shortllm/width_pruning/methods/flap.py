"""FLAP: how much the inputs vary; the mean of what is removed becomes a bias.

Shapes: D width of the hidden state, C inputs of the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shortllm.papers import FLAP
from shortllm.width_pruning.methods import METHODS, BlockImportance, Chosen, Task, WidthMethod

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.model.decoder import Decoder
    from shortllm.width_pruning.groups import BlockGroups, Removed, Sublayer
    from shortllm.width_pruning.importance import ActivationStats, BlockStats


@METHODS.register(
    WidthMethod(name="flap", label="FLAP", paper=FLAP, options={"bias": True}, one_list=True)
)
def flap(task: Task) -> Chosen:
    """How much inputs vary; all blocks are ranked in one list, and what goes leaves its mean."""
    from shortllm.width_pruning.importance import (
        block_importance,
        choose_from_list,
        choose_per_block,
        watch_inputs,
    )

    groups = task.groups
    importance: dict[int, BlockImportance] = {}
    means: dict[int, dict[str, Tensor]] = {}

    def decide(b: int, stats: BlockStats) -> None:
        importance[b] = block_importance(fluctuation, task.decoder, groups[b], b, stats)
        means[b] = {name: seen.mean_C for name, seen in stats.items()}

    watch_inputs(task, decide, sequential=False)
    if task.counts:
        removed = {b: choose_per_block(importance[b], task.counts[b], b) for b in groups}
    else:
        removed = choose_from_list(importance, groups, task.options.ratio)
    biases = mean_biases(task.decoder, groups, removed, means) if task.options.bias else {}
    return Chosen(removed=removed, importance=importance, biases=biases)


def fluctuation(weight_DC: Tensor, sublayer: Sublayer, stats: ActivationStats) -> Tensor:
    """Variance of a channel's input times its squared weights, standardised over the sublayer.

    A unit of several channels gets their mean, so that heads and neurons can be in one list.
    Source: An et al. 2023, FLAP, arXiv:2312.11983.
    """
    raw_C = stats.variance_C * weight_DC.square().sum(0)
    deviation = raw_C.std(correction=0)
    standard_C = (raw_C - raw_C.mean()) / (deviation if deviation > 0 else 1.0)
    return sublayer.channel_totals(standard_C) / sublayer.unit_width


def mean_biases(
    decoder: Decoder,
    groups: Mapping[int, BlockGroups],
    removed: Mapping[int, Removed],
    means: Mapping[int, Mapping[str, Tensor]],
) -> dict[int, dict[str, Tensor]]:
    """What the removed units add to the outputs on average, for each output projection `[D]`.

    Args:
        means: for each block the mean input of each channel of its output projections.
    """
    from shortllm.width_pruning.importance import output_weight

    def bias(b: int, sublayer: Sublayer, units: list[int]) -> Tensor:
        kept_C = ~sublayer.removed_C(units)
        mean_C = means[b][sublayer.output].masked_fill(kept_C, 0.0)
        return output_weight(decoder.blocks[b], groups[b], sublayer) @ mean_C

    return {
        b: {s.output: bias(b, s, units) for s, units in removed[b].pairs(groups[b]) if units}
        for b in decoder.through(sorted(removed))
    }
