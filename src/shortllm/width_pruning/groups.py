"""Heads and neurons of a block as structural groups: which rows and columns go together.

A sublayer is an output projection (o, or down), whose input channels are parted into units, and the
input projections (q, k, v, or gate, up, or one matrix of several) whose rows belong to these units.
The unit of attention is a kv head with its query heads, that of an MLP a neuron.

Shapes: R outputs of a projection (rows), C inputs of the output projection (channels), U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from shortllm.model.decoder import Decoder


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
        """Input channels of the output projection that belong to one unit."""
        return len(self.unit_of_channel_C) // self.units

    def kept_rows(self, name: str, removed: Iterable[int]) -> list[int]:
        """Rows of an input projection that stay, ascending."""
        return _kept(self.unit_of_row_R[name], removed)

    def kept_channels(self, removed: Iterable[int]) -> list[int]:
        """Input channels of the output projection that stay, ascending."""
        return _kept(self.unit_of_channel_C, removed)

    def removed_C(self, removed: Iterable[int]) -> Tensor:
        """Whether a channel goes."""
        gone = torch.zeros(self.units, dtype=torch.bool)
        gone[list(removed)] = True
        return gone[self.unit_of_channel_C]

    def channel_totals(self, values_C: Tensor) -> Tensor:
        """Numbers of the channels summed over each unit, float64 `[U]`."""
        return _totals(values_C, self.unit_of_channel_C, self.units)

    def weight_totals(self, value: Callable[[str], Tensor]) -> Tensor:
        """Numbers of all weights of each unit summed, float64 `[U]`.

        Args:
            value: for a projection's name one number for each of its weights, outputs x inputs.
        """
        totals = self.channel_totals(value(self.output).sum(0, dtype=torch.float64))
        for name, units in self.unit_of_row_R.items():
            totals += _totals(value(name).sum(1, dtype=torch.float64), units, self.units)
        return totals


def _kept(unit_of: Tensor, removed: Iterable[int]) -> list[int]:
    gone = set(removed)
    return [place for place, unit in enumerate(unit_of.tolist()) if unit not in gone]


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
    """Numbers per token in the stream."""
    transposed: frozenset[str] = frozenset()
    """Projections whose matrix is kept as inputs x outputs."""

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

    def query_heads_of(self, units: Iterable[int]) -> list[int]:
        """Numbers of the query heads that belong to the kv heads `units`."""
        return [unit * self.query_heads + i for unit in units for i in range(self.query_heads)]


@dataclass(frozen=True, slots=True)
class Removed:
    """What goes from one block."""

    heads: list[int]
    """Units of attention, ascending."""
    neurons: list[int]

    def pairs(self, groups: BlockGroups) -> Iterator[tuple[Sublayer, list[int]]]:
        """Each sublayer with the units that go from it."""
        yield from zip(groups.sublayers, (self.heads, self.neurons), strict=True)


@contextmanager
def without_units(
    decoder: Decoder,
    groups: Mapping[int, BlockGroups],
    removed: Mapping[int, Removed],
    biases: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Iterator[None]:
    """Within the context the model computes what it computes without the units `removed`.

    What a unit hands to the output projection is set to zero.

    Args:
        biases: for each block what is added to the outputs of an output projection, by its name.
    """
    handles: list[Any] = []
    try:
        for b, gone in removed.items():
            added = (biases or {}).get(b, {})
            for sublayer, units in gone.pairs(groups[b]):
                module = decoder.blocks[b].get_submodule(sublayer.output)
                mask_C = sublayer.removed_C(units).to(decoder.device)
                handles.append(module.register_forward_pre_hook(_silence(mask_C)))
                if sublayer.output in added:
                    bias_D = added[sublayer.output].to(decoder.device)
                    handles.append(module.register_forward_hook(_add(bias_D)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(removed_C: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any) -> Any:
        return (args[0].masked_fill(removed_C, 0), *args[1:])

    return hook


def _add(bias_D: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + bias_D.to(output.dtype)

    return hook
