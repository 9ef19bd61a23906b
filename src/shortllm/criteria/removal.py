"""Criteria that look at predictions with one block removed, all removals in one sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.criteria import Advance, Scores, criterion
from shortllm.metrics import next_token_nll, perplexity

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.model.resident import ResidentModel


def sweep_flops(model: ResidentModel, samples: int, length: int) -> float:
    """Work of one sweep over all single removals."""
    from shortllm.model import walk

    return walk.sweep_flops(model, samples, length)


@criterion("ppl", source="Kim et al. 2024, Shortened LLaMA, arXiv:2402.02834", flops=sweep_flops)
def perplexity_without_block(model: ResidentModel, ids_BT: Tensor, advance: Advance) -> Scores:
    """Perplexity of the calibration text when the block is removed.

    exp of the mean next-token NLL over all B*(T-1) predictions, every prediction weighing the same.
    """
    from shortllm.model.walk import sweep_removals

    totals = [0.0] * (model.block_count + 1)  # the intact model last

    def consume(
        removed: int | None, logits_NV: Tensor, intact_NV: Tensor, target_N: Tensor
    ) -> None:
        place = model.block_count if removed is None else removed
        totals[place] += next_token_nll(logits_NV, target_N).double().sum().item()

    sweep_removals(model, ids_BT, consume, advance=advance)
    predictions = ids_BT.shape[0] * (ids_BT.shape[1] - 1)
    *without, intact = (total / predictions for total in totals)
    values = [perplexity(nll) for nll in without]
    return Scores(
        importance=values,
        values=values,
        intact=perplexity(intact),
        delta_nll=[nll - intact for nll in without],
    )
