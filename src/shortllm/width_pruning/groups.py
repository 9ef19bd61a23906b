"""Heads and neurons of a block as structural groups: which rows and columns belong together.

A sublayer is an output projection (o, or down), whose input channels are divided into units, and
the input projections (q, k, v, or gate, up, or one matrix of several) whose rows belong to these
units. The unit of attention is a kv head with its query heads, that of an MLP a neuron.

How many units a ratio removes, and the ratio that removes a given number of parameters.

Shapes: R outputs of a projection (rows), C inputs of the output projection (channels), U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shortllm.errors import BudgetError

if TYPE_CHECKING:
    from shortllm.model.decoder import Decoder
    from shortllm.width_pruning.options import WidthOptions


@dataclass(frozen=True, slots=True, eq=False)
class Sublayer:
    """The attention or the MLP of a block."""

    output: str
    """Name of the output projection within the block."""
    unit_of_channel_C: Tensor
    unit_of_row_R: dict[str, Tensor]
    """Input projection -> the unit each of its rows belongs to."""

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self.unit_of_channel_C.max()) + 1

    @property
    def unit_width(self) -> int:
        """Input channels of the output projection per unit."""
        return len(self.unit_of_channel_C) // self.units

    @property
    def projections(self) -> tuple[str, ...]:
        """The input projections, then the output projection."""
        return (*self.unit_of_row_R, self.output)

    def kept(self, name: str, removed: Iterable[int]) -> list[int]:
        """Rows of an input projection, or channels of the output projection, that stay."""
        gone = set(removed)
        units = self.unit_of_channel_C if name == self.output else self.unit_of_row_R[name]
        return [place for place, unit in enumerate(units.tolist()) if unit not in gone]

    def removed_C(self, removed: Iterable[int]) -> Tensor:
        """Whether a channel is removed."""
        gone = torch.zeros(self.units, dtype=torch.bool)
        gone[list(removed)] = True
        return gone[self.unit_of_channel_C]

    def channel_totals(self, values_C: Tensor) -> Tensor:
        """Values of the channels, summed over each unit, float64 `[U]`."""
        return _totals(values_C, self.unit_of_channel_C, self.units)

    def weight_totals(self, value: Callable[[str], Tensor]) -> Tensor:
        """Values of all weights of each unit, summed, float64 `[U]`; `value` of a projection's
        name is one number for each of its weights, outputs x inputs."""
        totals = self.channel_totals(value(self.output).sum(0, dtype=torch.float64))
        for name, units in self.unit_of_row_R.items():
            totals += _totals(value(name).sum(1, dtype=torch.float64), units, self.units)
        return totals


def _totals(values: Tensor, unit_of: Tensor, count: int) -> Tensor:
    totals = torch.zeros(count, dtype=torch.float64)
    return totals.index_add_(0, unit_of, values.double().cpu())


@dataclass(frozen=True, slots=True, eq=False)
class BlockGroups:
    """The groups of one block."""

    attention: Sublayer
    mlp: Sublayer
    query_heads: int
    """Query heads of one unit of attention."""
    width: int
    """Width of the hidden state."""
    transposed: frozenset[str] = frozenset()
    """Projections whose matrix is stored as inputs x outputs."""

    @property
    def head_dim(self) -> int:
        """Channels of one query head."""
        return self.attention.unit_width // self.query_heads

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """Attention, then MLP."""
        return self.attention, self.mlp

    def matrix(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the shape of a projection's weight as outputs x inputs."""
        return tensor.T if name in self.transposed else tensor


@dataclass(frozen=True, slots=True)
class Removed:
    """What is removed from one block."""

    heads: list[int]
    """Units of attention, ascending."""
    neurons: list[int]

    def pairs(self, groups: BlockGroups) -> Iterator[tuple[Sublayer, list[int]]]:
        """Each sublayer with its removed units."""
        yield from zip(groups.sublayers, (self.heads, self.neurons), strict=True)


@contextmanager
def without_units(
    decoder: Decoder,
    groups: Mapping[int, BlockGroups],
    removed: Mapping[int, Removed],
    biases: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Iterator[None]:
    """Within the context, what the units `removed` pass to output projections is zero, and
    `biases` are added to what these return."""

    def silence(removed_C: Tensor) -> Callable[..., Any]:
        return lambda module, args: (args[0].masked_fill(removed_C, 0), *args[1:])

    def add(bias_D: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, output: output + bias_D.to(output.dtype)

    with ExitStack() as hooks:
        for b, gone in removed.items():
            added = (biases or {}).get(b, {})
            for sublayer, units in gone.pairs(groups[b]):
                module = decoder.blocks[b].get_submodule(sublayer.output)
                mask_C = sublayer.removed_C(units).to(decoder.device)
                hooks.enter_context(module.register_forward_pre_hook(silence(mask_C)))
                if sublayer.output in added:
                    bias_D = added[sublayer.output].to(decoder.device)
                    hooks.enter_context(module.register_forward_hook(add(bias_D)))
        yield


def removed_units(units: int, width: int, ratio: float) -> int:
    """How many units of `width` channels each a ratio removes.

    Of `C` channels, `C - int(C * (1 - ratio))` go, in whole units.
    """
    channels = units * width
    return (channels - int(channels * (1 - ratio))) // width


def removed_counts(
    groups: BlockGroups, ratio: float, neuron_ratio: float | None = None
) -> tuple[int, int]:
    """How many units of attention and how many neurons a ratio removes from a block."""
    heads, neurons = groups.attention.units, groups.mlp.units
    of_neurons = ratio if neuron_ratio is None else neuron_ratio
    gone = removed_units(heads, groups.head_dim, ratio), removed_units(neurons, 1, of_neurons)
    if 0 < gone[0] < heads and 0 < gone[1] < neurons:
        return gone
    kind = "heads" if groups.query_heads == 1 else f"kv heads (of {groups.query_heads} query heads)"
    named = ", ".join(  # at most eight, from one head to all but one
        f"{share / heads:.3g} ({share} of {heads} heads)"
        for share in range(1, heads, max(1, (heads - 1) // 7))
        if removed_units(heads, groups.head_dim, float(f"{share / heads:.3g}")) == share
    )
    raise BudgetError(
        f"--ratio {ratio} removes {gone[0]} of {heads} {kind} and {gone[1]} of {neurons} neurons "
        f"from a block, but some must go and some must stay. Ratios that work: {named}"
    )


def unit_parameters(sublayer: Sublayer, width: int) -> int:
    """Weights that one unit frees: its rows of the inputs, its columns of the output.

    For a head of llama with its share of the keys and values `head_dim*hidden*(2 + 2/group)` per
    query head, for a neuron `3*hidden`.
    """
    rows = sum(len(units) for units in sublayer.unit_of_row_R.values()) // sublayer.units
    return (rows + sublayer.unit_width) * width


def options_to_remove(
    parameters: int, options: WidthOptions, groups: Mapping[int, BlockGroups]
) -> WidthOptions:
    """The same options with the ratios that come nearest to removing that many parameters.

    Heads get the ratio nearest to the share of both. A head has many parameters, so neurons make
    up the difference. A method that ranks all blocks in one list gets the share itself.
    """
    per_head = {b: unit_parameters(block.attention, block.width) for b, block in groups.items()}
    of_neurons = sum(
        unit_parameters(block.mlp, block.width) * block.mlp.units for block in groups.values()
    )
    total = of_neurons + sum(per_head[b] * block.attention.units for b, block in groups.items())
    ratio = parameters / total
    if not 0 < ratio < 1:
        raise BudgetError(
            f"{parameters:,} parameters cannot be removed from {len(groups)} blocks, whose heads "
            f"and neurons have {total:,}. Remove fewer, or from more blocks"
        )
    if options.one_list:
        return options.model_copy(update={"ratio": ratio})
    for more in (0, 1, -1):
        heads = {
            b: min(block.attention.units - 1, max(1, round(ratio * block.attention.units) + more))
            for b, block in groups.items()
        }
        neuron_ratio = (parameters - sum(heads[b] * per_head[b] for b in groups)) / of_neurons
        if all(0 < round(neuron_ratio * one.mlp.units) < one.mlp.units for one in groups.values()):
            first = next(iter(groups))  # all blocks are alike
            of_heads = _ratio_of_heads(groups[first], heads[first])
            return options.model_copy(update={"ratio": of_heads, "neuron_ratio": neuron_ratio})
    raise BudgetError(
        f"{parameters:,} parameters cannot be removed from {len(groups)} blocks by "
        f"{options.method}: it removes at least one head of "
        f"{next(iter(groups.values())).attention.units} and one neuron from each block, and at "
        "most all but one. Choose another --ratio, or leave the method out"
    )


def _ratio_of_heads(block: BlockGroups, count: int) -> float:
    """A ratio that removes `count` heads from a block."""
    units, width = block.attention.units, block.head_dim
    share, step = count / units, 0.5 / (units * width)
    for ratio in (share, share + step, share - step):
        if removed_units(units, width, ratio) == count:
            return ratio
    raise AssertionError(f"no ratio removes {count} of {units} heads")
