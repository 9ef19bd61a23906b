"""Which heads and neurons go: each block's own lowest, or the lowest of one list of all blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shortllm.errors import BudgetError, CriterionError
from shortllm.width_pruning.groups import BlockGroups, Removed, Sublayer
from shortllm.width_pruning.scores import BlockImportance


def removed_units(units: int, width: int, ratio: float) -> int:
    """How many units of `width` channels each a ratio removes.

    Of the channels `C - int(C * (1 - ratio))` go, in whole units.
    """
    channels = units * width
    return (channels - int(channels * (1 - ratio))) // width


def removed_counts(
    groups: BlockGroups, ratio: float, neuron_ratio: float | None = None
) -> tuple[int, int]:
    """How many units of attention and how many neurons a ratio removes from a block.

    The channels of attention are those of its keys.

    Args:
        neuron_ratio: for the neurons, where it is another.

    Raises:
        BudgetError: none or all of them, naming ratios that work.
    """
    heads, neurons = groups.attention.units, groups.mlp.units
    of_neurons = ratio if neuron_ratio is None else neuron_ratio
    gone = removed_units(heads, groups.head_dim, ratio), removed_units(neurons, 1, of_neurons)
    if 0 < gone[0] < heads and 0 < gone[1] < neurons:
        return gone
    kind = "heads" if groups.query_heads == 1 else f"kv heads (of {groups.query_heads} query heads)"
    named = ", ".join(
        f"{share / heads:.3g} ({share} of {heads} heads)"
        for share in _spread(heads)
        if removed_units(heads, groups.head_dim, float(f"{share / heads:.3g}")) == share
    )
    raise BudgetError(
        f"--ratio {ratio} removes {gone[0]} of {heads} {kind} and {gone[1]} of {neurons} neurons "
        f"from a block; some must go and some stay. Ratios that work: {named}"
    )


def _spread(heads: int) -> list[int]:
    """At most eight numbers of heads that can go, from one to all but one."""
    step = max(1, (heads - 1) // 7)
    return list(range(1, heads, step))


def choose_per_block(
    importance: BlockImportance, groups: BlockGroups, counts: tuple[int, int], block: int
) -> Removed:
    """A block's own lowest heads and neurons; of equal ones the first.

    Raises:
        CriterionError: a score that cannot be ranked.
    """
    _require_finite(importance, block)
    heads, neurons = counts
    return Removed(_lowest(importance.heads, heads), _lowest(importance.neurons, neurons))


def _lowest(scores_U: Tensor, count: int) -> list[int]:
    return sorted(scores_U.argsort(stable=True)[:count].tolist())


def choose_from_list(
    importance: Mapping[int, BlockImportance], groups: Mapping[int, BlockGroups], ratio: float
) -> dict[int, Removed]:
    """The lowest of all heads and neurons in one list, until a part of their parameters is gone.

    Each weighs as many parameters as it frees; of the two numbers of them around the ratio the
    nearer one is taken. The best head and the best neuron of every block stay.

    Raises:
        BudgetError: nothing would go, or more than may.
        CriterionError: a score that cannot be ranked.
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
            f"--ratio {ratio} of the parameters of heads and neurons cannot go: at least one must "
            f"and one of each in every block stays. Give {least:.2g} to {most:.2g}"
        )
    chosen = entries[:count]
    return {
        b: Removed(
            sorted(unit for _, block, is_head, unit, _ in chosen if block == b and is_head),
            sorted(unit for _, block, is_head, unit, _ in chosen if block == b and not is_head),
        )
        for b in importance
    }


def unit_parameters(sublayer: Sublayer, width: int) -> int:
    """Weights that one unit frees: its rows of the inputs, its columns of the output.

    For a head of llama with its share of the keys and values `head_dim*hidden*(2 + 2/group)` per
    query head, for a neuron `3*hidden`.

    Args:
        width: numbers per token in the stream.
    """
    rows = sum(len(units) for units in sublayer.unit_of_row_R.values()) // sublayer.units
    return (rows + sublayer.unit_width) * width


def _require_finite(importance: BlockImportance, block: int) -> None:
    for kind, scores_U in (("head", importance.heads), ("neuron", importance.neurons)):
        wrong = (~scores_U.isfinite()).nonzero()
        if len(wrong):
            raise CriterionError(
                f"the score of {kind} {int(wrong[0])} of block {block} is not a number, so that "
                "nothing can be ranked. Try --dtype float32, or other calibration text"
            )
