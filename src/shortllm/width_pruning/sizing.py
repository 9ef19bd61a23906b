"""The ratio that takes a given number of parameters away, so that methods can be compared."""

from __future__ import annotations

from collections.abc import Mapping

from shortllm.errors import BudgetError
from shortllm.width_pruning.choosing import removed_units, unit_parameters
from shortllm.width_pruning.groups import BlockGroups
from shortllm.width_pruning.options import WidthOptions


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
