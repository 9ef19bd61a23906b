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
    from shortllm.model.metrics import perplexity
    from shortllm.runtime import progress
    from shortllm.sublayers.variants import Variants, remove_one_by_one, rounds_flops

    variants = Variants(task.decoder, task.outputs)
    work = rounds_flops(variants, task.candidates, task.remove, *task.ids_BT.shape)
    with progress("scoring sublayers by perplexity", work) as advance:
        intact, order = remove_one_by_one(
            variants,
            task.ids_BT,
            task.candidates,
            task.remove,
            advance=advance,
            memory=task.memory,
            journal=task.journal,
        )
    return Ranking(order=[(one, perplexity(nll)) for one, nll in order], intact=perplexity(intact))
