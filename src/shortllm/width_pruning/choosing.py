"""Which heads and neurons go: each block's own lowest, or the lowest of one list of all blocks.

The ratio that takes a given number of parameters away, so that methods can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shortllm.errors import BudgetError, CriterionError
from shortllm.width_pruning.groups import BlockGroups, Removed, Sublayer
from shortllm.width_pruning.importance import BlockImportance
from shortllm.width_pruning.options import WidthOptions


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


def removing(
    options: WidthOptions, groups: Mapping[int, BlockGroups], parameters: int
) -> WidthOptions:
    """The same options with the ratios that come nearest to removing so many parameters.

    Heads are counted by the nearest ratio for both, and since few of them are many parameters, the
    rest is made up for by neurons. A list of all blocks is asked for the number as it is.

    Args:
        options: filled in.
        groups: of the blocks that are made narrower.
    Raises:
        BudgetError: so many cannot go from these blocks.
    """
    total = sum(
        unit_parameters(sublayer, block.width) * sublayer.units
        for block in groups.values()
        for sublayer in block.sublayers
    )
    ratio = parameters / total
    if not 0 < ratio < 1:
        raise BudgetError(
            f"{parameters:,} parameters cannot go from {len(groups)} blocks, whose heads and "
            f"neurons have {total:,}. Ask for fewer, or for more blocks"
        )
    if options.by_list:
        return options.model_copy(update={"ratio": ratio})
    of_neurons = sum(
        unit_parameters(block.mlp, block.width) * block.mlp.units for block in groups.values()
    )
    for more in (0, 1, -1):
        heads = {
            b: min(block.attention.units - 1, max(1, round(ratio * block.attention.units) + more))
            for b, block in groups.items()
        }
        from_heads = sum(
            heads[b] * unit_parameters(block.attention, block.width) for b, block in groups.items()
        )
        neuron_ratio = (parameters - from_heads) / of_neurons
        if all(0 < round(neuron_ratio * one.mlp.units) < one.mlp.units for one in groups.values()):
            return options.model_copy(
                update={"ratio": _ratio_of_heads(groups, heads), "neuron_ratio": neuron_ratio}
            )
    raise BudgetError(
        f"{parameters:,} parameters cannot go from {len(groups)} blocks by {options.method}: one "
        f"head of {next(iter(groups.values())).attention.units} from each, and one neuron, are "
        "the least, and all but one the most. Choose another --ratio, or leave the method out"
    )


def _ratio_of_heads(groups: Mapping[int, BlockGroups], heads: Mapping[int, int]) -> float:
    """A ratio that removes as many heads from the first block; blocks of one model are alike."""
    first = next(iter(groups))
    block = groups[first]
    share = heads[first] / block.attention.units
    step = 0.5 / (block.attention.units * block.head_dim)
    for ratio in (share, share + step, share - step):
        if removed_units(block.attention.units, block.head_dim, ratio) == heads[first]:
            return ratio
    raise AssertionError(f"no ratio removes {heads[first]} of {block.attention.units} heads")
