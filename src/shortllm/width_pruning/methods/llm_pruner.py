"""LLM-Pruner: how much the loss changes, estimated from weights and gradients.

Shapes: U units of a sublayer, B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shortllm.papers import LLM_PRUNER
from shortllm.width_pruning.methods import METHODS, BlockImportance, Chosen, Task, WidthMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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
    import torch

    from shortllm.width_pruning.importance import choose_per_block

    decoder, groups, kind = task.decoder, task.groups, task.options.importance
    assert kind is not None
    if kind == "random":
        generator = torch.Generator().manual_seed(task.options.calibration.seed)
        found = {b: sampled(groups[b], generator) for b in groups}
    elif kind in ("l1", "l2"):
        power = 1 if kind == "l1" else 2
        found = {
            b: magnitude(decoder.blocks[b], groups[b], power) for b in decoder.through(list(groups))
        }
    else:
        found = taylor_importance(task, kind)
    removed = {b: choose_per_block(found[b], task.counts[b], b) for b in groups}
    return Chosen(removed=removed, importance=found)


def taylor(
    groups: BlockGroups,
    products: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor],
    importance: Importance,
) -> BlockImportance:
    """Change of the loss that its expansion predicts, summed over a unit's weights.

    Biases do not count. Source: Ma et al. 2023, LLM-Pruner, arXiv:2305.11627.

    Args:
        products: for each weight `w g`, of the loss of all samples.
        curvature: for each weight `w H w`, if the importance needs it.
        importance: first `|w g|`, second `|w H w|`, mixed `|w g - w H w / 2|`, each summed over all
            weights of the unit; vectorised `|sum of w g|`.
    """

    def value(name: str) -> Tensor:
        weight = f"{name}.weight"
        found = curvature[weight] if importance == "second" else products[weight]
        if importance == "mixed":
            found = found - curvature[weight] / 2
        return groups.matrix(name, found if importance == "vectorised" else found.abs())

    return BlockImportance(*(one.weight_totals(value).abs() for one in groups.sublayers))


def magnitude(block: nn.Module, groups: BlockGroups, power: int) -> BlockImportance:
    """Absolute values of a unit's weights to a power, 1 or 2, summed."""

    def value(name: str) -> Tensor:
        weight: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
        return groups.matrix(name, weight.detach()).float().abs() ** power

    return BlockImportance(*(one.weight_totals(value) for one in groups.sublayers))


def sampled(groups: BlockGroups, generator: torch.Generator) -> BlockImportance:
    """Random ranks."""
    import torch

    ranks = (torch.randperm(one.units, generator=generator) for one in groups.sublayers)
    return BlockImportance(*(ranks_U.double() for ranks_U in ranks))


def taylor_importance(task: Task, importance: Importance) -> dict[int, BlockImportance]:
    """Importance by gradients, which exist for one block at a time."""
    from shortllm.model.backward import walk_back, walk_back_flops
    from shortllm.progress import progress
    from shortllm.runtime import ALONE

    decoder, groups, ids_BT = task.decoder, task.groups, task.ids()
    found: dict[int, BlockImportance] = {}
    squares: dict[int, dict[str, Tensor]] = {b: {} for b in groups}

    def take_sample(b: int, products: dict[str, Tensor]) -> None:
        for name, product in products.items() if b in groups else ():
            square = product.square_()
            held = squares[b].get(name)
            squares[b][name] = square.clone() if held is None else held.add_(square)

    def take(b: int, products: dict[str, Tensor]) -> None:
        if b in groups:
            # H is the mean squared gradient of the loss of a single sample, and a sample's share
            # of the products is of its part of the mean over samples, 1/samples of that loss
            held = squares.pop(b).items()
            curvature = {name: square.mul_(len(ids_BT)) for name, square in held}
            found[b] = taylor(groups[b], products, curvature, importance)

    blocks = list(range(decoder.block_count))
    each = take_sample if importance in ("second", "mixed") else None
    work = walk_back_flops(decoder, blocks, *ids_BT.shape)
    with progress("gradients of heads and neurons", work) as advance:
        walk_back(
            decoder, ids_BT, blocks, take, ranks=ALONE, each=each, advance=advance,
            memory=task.memory,
        )  # fmt: skip
    return found
