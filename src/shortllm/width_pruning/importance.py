"""Importance of heads and neurons: what the methods share.

The pass over a model that gathers the inputs of output projections, one block's weights at a
time, and the choice by importance: each block's own lowest units, or the lowest of all blocks.

Shapes: B samples, T tokens per sample, D width of the hidden state, C inputs of an output
projection, U units of a sublayer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shortllm.errors import BudgetError, CriterionError
from shortllm.model.decoder import Decoder
from shortllm.model.hidden_states import SampleGroups, block_flops
from shortllm.progress import progress
from shortllm.width_pruning.groups import (
    BlockGroups,
    Removed,
    Sublayer,
    unit_parameters,
    without_units,
)
from shortllm.width_pruning.methods import BlockImportance, Task


@dataclass(slots=True)
class ActivationStats:
    """Sums of the inputs of a projection over tokens, and of their squares, float64 `[C]`."""

    count: int = 0
    sum_C: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares_C: Tensor = field(default_factory=lambda: torch.zeros(()))

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A hook before the projection: take in more tokens, `[..., C]`."""
        given_NC = args[0].reshape(-1, args[0].shape[-1]).double()
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


def output_weight(block: nn.Module, groups: BlockGroups, sublayer: Sublayer) -> Tensor:
    """The matrix of a sublayer's output projection, outputs x inputs, float64 on the CPU."""
    weight: Tensor = block.get_submodule(sublayer.output).weight  # type: ignore[assignment]
    return groups.matrix(sublayer.output, weight.detach()).cpu().double()


BlockStats = dict[str, ActivationStats]
"""Output projection -> sums of its inputs."""

Decide = Callable[[int, BlockStats], Removed | None]


@torch.no_grad()
def watch_inputs(task: Task, decide: Decide, *, sequential: bool) -> None:
    """Take all samples through the blocks in order, and decide at each what to remove from it.

    Args:
        decide: called as `decide(b, stats)` while the weights of block `b` are there; returns
            what to remove from it.
        sequential: later blocks see the outputs of the narrower block; otherwise those of the
            intact one, and what `decide` returns has no effect.
    """
    decoder, groups, ids_BT = task.decoder, task.groups, task.ids()
    samples = SampleGroups(decoder, ids_BT, task.memory)
    stream_BTD = samples.entering()
    passes = [*range(decoder.block_count), *(groups if sequential else ())]
    work = sum(block_flops(decoder, b) for b in passes) * ids_BT.numel()
    with progress("inputs of heads and neurons", work) as advance:

        def through(b: int, *, keep: bool) -> None:
            samples.apply(b, stream_BTD, keep=keep)
            advance(block_flops(decoder, b) * ids_BT.numel())

        for b in decoder.through(range(decoder.block_count)):
            if b not in groups:
                through(b, keep=True)
                continue
            stats = {sublayer.output: ActivationStats() for sublayer in groups[b].sublayers}
            with ExitStack() as hooks:
                for name, seen in stats.items():
                    module = decoder.blocks[b].get_submodule(name)
                    hooks.enter_context(module.register_forward_pre_hook(seen.see))
                through(b, keep=not sequential)
            gone = decide(b, stats)
            if sequential:
                with without_units(decoder, groups, {b: gone} if gone else {}):
                    through(b, keep=True)


Rule = Callable[[Tensor, Sublayer, ActivationStats], Tensor]
"""Called with an output projection's matrix, its sublayer and what was seen of its inputs; returns
an importance `[U]`."""


def block_importance(
    rule: Rule, decoder: Decoder, groups: BlockGroups, b: int, stats: BlockStats
) -> BlockImportance:
    """The importance of a block's units by what was seen at its output projections."""
    found = (
        rule(output_weight(decoder.blocks[b], groups, sublayer), sublayer, stats[sublayer.output])
        for sublayer in groups.sublayers
    )
    return BlockImportance(*found)


def choose_per_block(importance: BlockImportance, counts: tuple[int, int], block: int) -> Removed:
    """A block's own lowest heads and neurons; of equal ones the first."""
    _require_finite(importance, block)
    scores = (importance.heads, importance.neurons)
    lowest = (
        sorted(scores_U.argsort(stable=True)[:count].tolist())
        for scores_U, count in zip(scores, counts, strict=True)
    )
    return Removed(*lowest)


def choose_from_list(
    importance: Mapping[int, BlockImportance], groups: Mapping[int, BlockGroups], ratio: float
) -> dict[int, Removed]:
    """The lowest of all heads and neurons in one list, until that part of their parameters is gone.

    Each counts with the parameters it frees, and the number that comes nearest to the ratio is
    removed. The best head and the best neuron of every block stay.
    """
    entries: list[tuple[float, int, bool, int, int]] = []
    total = 0
    for b, scores in importance.items():
        _require_finite(scores, b)
        for is_head, scores_U, sublayer in (
            (True, scores.heads, groups[b].attention),
            (False, scores.neurons, groups[b].mlp),
        ):
            freed = unit_parameters(sublayer, groups[b].width)
            total += freed * sublayer.units
            best = int(scores_U.argmax())
            entries += [
                (score, b, is_head, unit, freed)
                for unit, score in enumerate(scores_U.tolist())
                if unit != best
            ]
    entries.sort(key=lambda entry: entry[0])
    sums = torch.tensor([0, *(entry[4] for entry in entries)], dtype=torch.int64).cumsum(0)
    count = int((sums - ratio * total).abs().argmin())
    if count == 0 or (ratio * total - int(sums[-1])) > entries[-1][4]:
        least, most = entries[0][4] / total, int(sums[-1]) / total
        raise BudgetError(
            f"--ratio {ratio} of the parameters of heads and neurons cannot be removed: at least "
            f"one unit must go, and one of each in every block stays. Give {least:.2g} to "
            f"{most:.2g}"
        )
    removed = {b: Removed([], []) for b in importance}
    for _, b, is_head, unit, _ in sorted(entries[:count], key=lambda entry: entry[3]):
        (removed[b].heads if is_head else removed[b].neurons).append(unit)
    return removed


def _require_finite(importance: BlockImportance, block: int) -> None:
    for kind, scores_U in (("head", importance.heads), ("neuron", importance.neurons)):
        wrong = (~scores_U.isfinite()).nonzero()
        if len(wrong):
            raise CriterionError(
                f"the score of {kind} {int(wrong[0])} of block {block} is not finite, so "
                "nothing can be ranked. Try --dtype float32, or other calibration text"
            )
