"""Importance of heads and neurons, by each method. Pure: tensors in, tensors out.

Higher = keep. Shapes: R outputs of a projection, C its inputs, U units of a sublayer, D width of
the stream.


The passes over a model that scores are made from; one block's weights are needed at a time.

Shapes: B samples, T tokens per sample, D width, C inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shortllm.model.backward import walk_back
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import SampleGroups, StreamMemory, block_flops
from shortllm.runtime import ALONE, Advance
from shortllm.width_pruning.groups import BlockGroups, Removed, Sublayer, without_units
from shortllm.width_pruning.options import Importance


@dataclass(slots=True, eq=False)
class BlockImportance:
    """One number for each unit of both sublayers, float64 `[U]`."""

    heads: Tensor
    neurons: Tensor


@dataclass(slots=True)
class Moments:
    """Sums of the inputs of a projection over tokens, and of their squares, float64 `[C]`."""

    count: int = 0
    sum_C: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares_C: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, given: Tensor) -> None:
        """Take in more tokens, `[..., C]`."""
        given_NC = given.reshape(-1, given.shape[-1]).double()
        self.count += len(given_NC)
        self.sum_C = self.sum_C + given_NC.sum(0).cpu()
        self.squares_C = self.squares_C + given_NC.square().sum(0).cpu()

    @property
    def mean_C(self) -> Tensor:
        """Mean input of each channel."""
        return self.sum_C / self.count

    @property
    def variance_C(self) -> Tensor:
        """Its variance, of all tokens."""
        return (self.squares_C / self.count - self.mean_C.square()).clamp(min=0)

    @property
    def root_mean_square_C(self) -> Tensor:
        """Square root of its mean square."""
        return (self.squares_C / self.count).sqrt()


@dataclass(slots=True)
class Products:
    """Products of weights and gradients of one block, and of their squares over single samples."""

    sum: dict[str, Tensor] = field(default_factory=dict)
    """Name of a weight -> signed product, of the loss of all samples, float32."""
    samples: int = 0
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Name of a weight -> sum over samples of the squared share of one."""

    def add_square(self, products: Mapping[str, Tensor]) -> None:
        """Take in one sample's share of the products."""
        self.samples += 1
        for name, product in products.items():
            square = product.square_()
            self.squares[name] = self.squares.get(name, torch.zeros_like(square)).add_(square)

    def curvature(self, name: str) -> Tensor:
        """`w * H * w` with `H` the mean squared gradient of the loss of a single sample.

        A share is that loss's part of the mean over samples, 1/samples of it.
        """
        return self.squares[name] * self.samples


def taylor(groups: BlockGroups, products: Products, importance: Importance) -> BlockImportance:
    """Change of the loss that the loss's expansion foretells, summed over a unit's weights.

    Biases do not count. Source: Ma et al. 2023, LLM-Pruner, arXiv:2305.11627.

    Args:
        importance: first `|w g|`, second `|w H w|`, mixed `|w g - w H w / 2|`, each summed over all
            weights of the unit; vectorised `|sum of w g|`.
    """

    def value(name: str) -> Tensor:
        weight = f"{name}.weight"
        if importance == "vectorised":
            found = products.sum[weight]
        elif importance == "first":
            found = products.sum[weight].abs()
        elif importance == "second":
            found = products.curvature(weight).abs()
        else:
            found = (products.sum[weight] - products.curvature(weight) / 2).abs()
        return groups.matrix(name, found)

    return BlockImportance(
        groups.attention.weight_totals(value).abs(), groups.mlp.weight_totals(value).abs()
    )


def magnitude(block: nn.Module, groups: BlockGroups, power: int) -> BlockImportance:
    """Absolute values of a unit's weights to a power, 1 or 2, summed."""

    def value(name: str) -> Tensor:
        weight: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
        return groups.matrix(name, weight.detach()).float().abs() ** power

    return BlockImportance(groups.attention.weight_totals(value), groups.mlp.weight_totals(value))


def drawn(groups: BlockGroups, generator: torch.Generator) -> BlockImportance:
    """Random ranks."""
    heads, neurons = groups.attention.units, groups.mlp.units
    return BlockImportance(
        torch.randperm(heads, generator=generator).double(),
        torch.randperm(neurons, generator=generator).double(),
    )


def weighted_input(weight_DC: Tensor, sublayer: Sublayer, moments: Moments) -> Tensor:
    """Mean absolute weight of a channel times the root mean square of its input, summed per unit.

    Source: the structured Wanda of An et al. 2023, FLAP, arXiv:2312.11983.

    Args:
        weight_DC: see `output_weight`.
    """
    return sublayer.channel_totals(weight_DC.abs().mean(0) * moments.root_mean_square_C)


def fluctuation(weight_DC: Tensor, sublayer: Sublayer, moments: Moments) -> Tensor:
    """Variance of a channel's input times its squared weights, standardised over the sublayer.

    A unit of several channels gets their mean, so that heads and neurons can stand in one list.
    Source: An et al. 2023, FLAP, arXiv:2312.11983.
    """
    raw_C = moments.variance_C * weight_DC.square().sum(0)
    deviation = raw_C.std(correction=0)
    standard_C = (raw_C - raw_C.mean()) / (deviation if deviation > 0 else 1.0)
    return sublayer.channel_totals(standard_C) / sublayer.unit_width


def output_weight(block: nn.Module, groups: BlockGroups, sublayer: Sublayer) -> Tensor:
    """The matrix of a sublayer's output projection, outputs x inputs, float64 on the CPU."""
    weight: Tensor = block.get_submodule(sublayer.output).weight  # type: ignore[assignment]
    return groups.matrix(sublayer.output, weight.detach()).cpu().double()


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
    samples = SampleGroups(decoder, ids_BT, memory)
    stream_BTD = samples.entering()

    def through(b: int, *, keep: bool) -> None:
        samples.apply(b, stream_BTD, keep=keep)
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
