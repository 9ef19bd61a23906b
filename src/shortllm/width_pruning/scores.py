"""Importance of heads and neurons, by each method. Pure: tensors in, tensors out.

Higher = keep. Shapes: R outputs of a projection, C its inputs, U units of a sublayer, D width of
the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shortllm.width_pruning.groups import BlockGroups, Sublayer
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
