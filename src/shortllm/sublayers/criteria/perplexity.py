"""The perplexity without each sublayer, one sublayer after the other."""

from __future__ import annotations

from shortllm.papers import BLOCKPRUNER
from shortllm.sublayers.criteria import CRITERIA, Ranking, SublayerCriterion, Task


@CRITERIA.register(
    SublayerCriterion(
        name="sublayer-ppl",
        label="Sublayer perplexity",
        value="perplexity without",
        paper=BLOCKPRUNER,
    )
)
def sublayer_ppl(task: Task) -> Ranking:
    """The lowest perplexity without it, one sublayer after the other."""
    from shortllm.sublayers.variants import remove_one_by_one

    return remove_one_by_one(task)
