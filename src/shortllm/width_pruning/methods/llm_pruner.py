"""LLM-Pruner: how much the loss changes, estimated from weights and gradients.

Shapes: U units of a sublayer, B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shortllm.papers import LLM_PRUNER
from shortllm.width_pruning.methods import METHODS, BlockImportance, Chosen, Task, WidthMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory
    from shortllm.runtime import Advance
    from shortllm.width_pruning.groups import BlockGroups
    from shortllm.width_pruning.options import Importance

WITHOUT_TEXT = ("l1", "l2", "random")
"""Importances that look at no text."""


@METHODS.register(
    WidthMethod(
        name="llm-pruner",
        label="LLM-Pruner",
        paper=LLM_PRUNER,
        options={"importance": "first"},
        needs_text=lambda options: options.importance not in WITHOUT_TEXT,
        sample_length=64,
        protects_ends=True,
    )
)
def llm_pruner(task: Task) -> Chosen:
    """Weights times gradients; each block loses its own lowest."""
    from shortllm.width_pruning.importance import choose_per_block

    importance = _importance(task)
    removed = {b: choose_per_block(importance[b], task.counts[b], b) for b in task.groups}
    return Chosen(removed=removed, importance=importance)


def _importance(task: Task) -> dict[int, BlockImportance]:
    """The importance of every head and neuron, as the option `importance` says."""
    import torch

    from shortllm.model.backward import walk_back_flops
    from shortllm.runtime import progress

    decoder, groups, kind = task.decoder, task.groups, task.options.importance
    if kind == "random":
        generator = torch.Generator().manual_seed(task.options.calibration.seed)
        return {b: sampled(groups[b], generator) for b in groups}
    if kind in ("l1", "l2"):
        power = 1 if kind == "l1" else 2
        return {
            b: magnitude(decoder.blocks[b], groups[b], power) for b in decoder.through(list(groups))
        }
    assert kind is not None
    ids_BT = task.ids()
    work = walk_back_flops(decoder, range(decoder.block_count), *ids_BT.shape)
    with progress("gradients of heads and neurons", work) as advance:
        return taylor_importance(decoder, ids_BT, groups, kind, memory=task.memory, advance=advance)


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
            if name in self.squares:
                self.squares[name].add_(square)
            else:
                self.squares[name] = square.clone()

    def curvature(self, name: str) -> Tensor:
        """`w * H * w` with `H` the mean squared gradient of the loss of a single sample.

        A share is that loss's part of the mean over samples, 1/samples of it.
        """
        return self.squares[name] * self.samples


def taylor(groups: BlockGroups, products: Products, importance: Importance) -> BlockImportance:
    """Change of the loss that its expansion predicts, summed over a unit's weights.

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


def sampled(groups: BlockGroups, generator: torch.Generator) -> BlockImportance:
    """Random ranks."""
    import torch

    heads, neurons = groups.attention.units, groups.mlp.units
    return BlockImportance(
        torch.randperm(heads, generator=generator).double(),
        torch.randperm(neurons, generator=generator).double(),
    )


def taylor_importance(
    decoder: Decoder,
    ids_BT: Tensor,
    groups: Mapping[int, BlockGroups],
    importance: Importance,
    *,
    memory: StreamMemory,
    advance: Advance = lambda work: None,
) -> dict[int, BlockImportance]:
    """Importance by gradients, which exist for one block at a time."""
    from shortllm.model.backward import walk_back
    from shortllm.runtime import ALONE

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
