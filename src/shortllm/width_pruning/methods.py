"""The methods: from a model and text to what goes from each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shortllm.model.backward import walk_back_flops
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import StreamMemory
from shortllm.runtime import progress
from shortllm.width_pruning.choosing import choose_from_list, choose_per_block
from shortllm.width_pruning.groups import BlockGroups, Removed, Sublayer
from shortllm.width_pruning.importance import (
    BlockImportance,
    BlockMoments,
    Moments,
    drawn,
    fluctuation,
    magnitude,
    mean_biases,
    output_weight,
    taylor_importance,
    walk_narrowing,
    walk_narrowing_flops,
    weighted_input,
)
from shortllm.width_pruning.options import WidthOptions

if TYPE_CHECKING:
    Groups = Mapping[int, BlockGroups]


@dataclass(slots=True, kw_only=True)
class Chosen:
    """What goes from each block, and why."""

    removed: dict[int, Removed]
    importance: dict[int, BlockImportance]
    biases: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """For each block what is added to the outputs of its output projections, float64 `[D]`."""


def choose(
    decoder: Decoder,
    ids_BT: Tensor | None,
    groups: Groups,
    options: WidthOptions,
    counts: Mapping[int, tuple[int, int]],
    *,
    memory: StreamMemory,
) -> Chosen:
    """Score the heads and neurons of the blocks in `groups` and choose by the method's rule.

    Args:
        ids_BT: calibration ids; None where the importance looks at no text.
        options: filled in.
        counts: for each block how many units of attention and how many neurons go; empty where
            one list of all blocks decides.
    Raises:
        CriterionError: a score that cannot be ranked.
        BudgetError: a ratio that the list cannot meet.
    """
    if options.method == "llm-pruner":
        importance = _pruner_importance(decoder, ids_BT, groups, options, memory)
        removed = {b: choose_per_block(importance[b], groups[b], counts[b], b) for b in groups}
        return Chosen(removed=removed, importance=importance)
    assert ids_BT is not None
    if options.method == "wanda-sp":
        return _choose_in_sequence(decoder, ids_BT, groups, counts, memory)
    return _choose_by_fluctuation(decoder, ids_BT, groups, options, counts, memory)


def _pruner_importance(
    decoder: Decoder,
    ids_BT: Tensor | None,
    groups: Groups,
    options: WidthOptions,
    memory: StreamMemory,
) -> dict[int, BlockImportance]:
    kind = options.importance
    if kind == "random":
        generator = torch.Generator().manual_seed(options.seed)
        return {b: drawn(groups[b], generator) for b in groups}
    if kind in ("l1", "l2"):
        power = 1 if kind == "l1" else 2
        return {
            b: magnitude(decoder.blocks[b], groups[b], power) for b in decoder.through(list(groups))
        }
    assert ids_BT is not None and kind is not None
    work = walk_back_flops(decoder, range(decoder.block_count), *ids_BT.shape)
    with progress("gradients of heads and neurons", work) as advance:
        return taylor_importance(decoder, ids_BT, groups, kind, memory=memory, advance=advance)


def _by_moments(
    rule: Callable[[Tensor, Sublayer, Moments], Tensor],
    decoder: Decoder,
    groups: Groups,
    b: int,
    moments: BlockMoments,
) -> BlockImportance:
    """The importance of a block's units by what was seen at its output projections."""
    return BlockImportance(
        *(
            rule(
                output_weight(decoder.blocks[b], groups[b], sublayer),
                sublayer,
                moments[sublayer.output],
            )
            for sublayer in groups[b].sublayers
        )
    )


def _choose_in_sequence(
    decoder: Decoder,
    ids_BT: Tensor,
    groups: Groups,
    counts: Mapping[int, tuple[int, int]],
    memory: StreamMemory,
) -> Chosen:
    """Wanda-sp: each block is scored on the outputs of the narrower ones before it."""
    chosen = Chosen(removed={}, importance={})

    def decide(b: int, moments: BlockMoments) -> Removed:
        chosen.importance[b] = _by_moments(weighted_input, decoder, groups, b, moments)
        gone = choose_per_block(chosen.importance[b], groups[b], counts[b], b)
        chosen.removed[b] = gone
        return gone

    with _walking(decoder, ids_BT, groups, sequential=True) as advance:
        walk_narrowing(
            decoder, ids_BT, groups, decide, sequential=True, memory=memory, advance=advance
        )
    return chosen


def _choose_by_fluctuation(
    decoder: Decoder,
    ids_BT: Tensor,
    groups: Groups,
    options: WidthOptions,
    counts: Mapping[int, tuple[int, int]],
    memory: StreamMemory,
) -> Chosen:
    """FLAP: all blocks are scored in the intact model; what goes leaves its mean as a bias."""
    importance: dict[int, BlockImportance] = {}
    means: dict[int, dict[str, Tensor]] = {}

    def decide(b: int, moments: BlockMoments) -> None:
        importance[b] = _by_moments(fluctuation, decoder, groups, b, moments)
        means[b] = {name: seen.mean_C for name, seen in moments.items()}

    with _walking(decoder, ids_BT, groups, sequential=False) as advance:
        walk_narrowing(
            decoder, ids_BT, groups, decide, sequential=False, memory=memory, advance=advance
        )
    if options.by_list:
        removed = choose_from_list(importance, groups, options.ratio)
    else:
        removed = {b: choose_per_block(importance[b], groups[b], counts[b], b) for b in groups}
    biases = mean_biases(decoder, groups, removed, means) if options.bias else {}
    return Chosen(removed=removed, importance=importance, biases=biases)


@contextmanager
def _walking(
    decoder: Decoder, ids_BT: Tensor, groups: Groups, *, sequential: bool
) -> Iterator[Callable[[float], None]]:
    work = walk_narrowing_flops(decoder, groups, ids_BT.numel(), sequential=sequential)
    with progress("inputs of heads and neurons", work) as advance:
        yield advance
