"""The passes over a model that scores are made from; one block's weights are needed at a time.

Shapes: B samples, T tokens per sample, D width, C inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.model.backward import walk_back
from shortllm.model.decoder import Decoder
from shortllm.model.streams import StreamMemory
from shortllm.model.walk import Advance, block_flops, enter_groups, group_size
from shortllm.runtime import ALONE
from shortllm.width_pruning.groups import BlockGroups, Removed, Sublayer, without_units
from shortllm.width_pruning.options import Importance
from shortllm.width_pruning.scores import BlockImportance, Moments, Products, output_weight, taylor

BlockMoments = dict[str, Moments]
"""Output projection -> the moments of its inputs."""

Decide = Callable[[int, BlockMoments], Removed | None]


@torch.no_grad()
def walk_narrowing(
    decoder: Decoder,
    ids_BT: Tensor,
    groups: Mapping[int, BlockGroups],
    decide: Decide,
    *,
    sequential: bool,
    memory: StreamMemory,
    advance: Advance = lambda work: None,
) -> None:
    """Take all samples through one block after the other, and decide at each what goes from it.

    Args:
        groups: of the blocks to decide on.
        decide: called as `decide(b, moments)` while the weights of block `b` are there; returns
            what goes from it.
        sequential: later blocks see the outputs of the narrower block; else those of the intact
            one, and what `decide` returns is not looked at.
    Raises:
        UnsupportedModelError: the blocks cannot be called one by one.
    """
    size = group_size(decoder, ids_BT.shape[1])
    spans = [slice(row, row + size) for row in range(0, len(ids_BT), size)]
    entries = enter_groups(decoder, [ids_BT[rows] for rows in spans])
    shape = (len(ids_BT), *entries[0].stream_BTD.shape[1:])
    stream_BTD = memory.allocate(shape, decoder.stream_dtype, decoder.device)
    for rows, entry in zip(spans, entries, strict=True):
        stream_BTD[rows] = entry.stream_BTD

    def through(b: int, *, keep: bool) -> None:
        for rows, entry in zip(spans, entries, strict=True):
            before_BTD = stream_BTD[rows].to(decoder.device)
            after_BTD = decoder.apply(b, before_BTD, entry.calls[b])
            if keep:
                stream_BTD[rows] = after_BTD.to(stream_BTD)
        advance(block_flops(decoder, b) * ids_BT.numel())

    for b in decoder.through(range(decoder.block_count)):
        if b not in groups:
            through(b, keep=True)
            continue
        with _watched(decoder.blocks[b], groups[b]) as moments:
            through(b, keep=not sequential)
        gone = decide(b, moments)
        if sequential:
            with without_units(decoder, groups, {b: gone}) if gone else nullcontext():
                through(b, keep=True)


def walk_narrowing_flops(
    decoder: Decoder, groups: Mapping[int, BlockGroups], tokens: int, *, sequential: bool
) -> float:
    """Floating-point operations of `walk_narrowing`, as its `advance` counts them."""
    blocks = [*range(decoder.block_count), *(groups if sequential else ())]
    return sum(block_flops(decoder, b) for b in blocks) * tokens


@contextmanager
def _watched(block: nn.Module, groups: BlockGroups) -> Iterator[BlockMoments]:
    """Within the context the inputs of both output projections are gathered."""
    moments: BlockMoments = {}
    handles = []
    for sublayer in groups.sublayers:
        seen = moments[sublayer.output] = Moments()
        module = block.get_submodule(sublayer.output)
        handles.append(module.register_forward_pre_hook(_gather(seen)))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _gather(moments: Moments) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        moments.add(args[0])

    return hook


def taylor_importance(
    decoder: Decoder,
    ids_BT: Tensor,
    groups: Mapping[int, BlockGroups],
    importance: Importance,
    *,
    memory: StreamMemory,
    advance: Advance = lambda work: None,
) -> dict[int, BlockImportance]:
    """Importance by gradients, which are there for one block at a time.

    Raises:
        UnsupportedModelError: the blocks cannot be called one by one.
    """
    found: dict[int, BlockImportance] = {}
    squares: dict[int, Products] = {}

    def take_sample(b: int, products: dict[str, Tensor]) -> None:
        if b in groups:
            squares.setdefault(b, Products()).add_square(products)

    def take(b: int, products: dict[str, Tensor]) -> None:
        if b in groups:
            held = squares.pop(b, Products())
            held.sum = products
            found[b] = taylor(groups[b], held, importance)

    walk_back(
        decoder,
        ids_BT,
        list(range(decoder.block_count)),
        take,
        ranks=ALONE,
        each=take_sample if importance in ("second", "mixed") else None,
        advance=advance,
        memory=memory,
    )
    return found


@torch.no_grad()
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

    def bias(b: int, sublayer: Sublayer, units: list[int]) -> Tensor:
        mean_C = torch.where(sublayer.removed_C(units), means[b][sublayer.output], 0.0)
        return output_weight(decoder.blocks[b], groups[b], sublayer) @ mean_C

    return {
        b: {s.output: bias(b, s, units) for s, units in removed[b].pairs(groups[b]) if units}
        for b in decoder.through(sorted(removed))
    }
