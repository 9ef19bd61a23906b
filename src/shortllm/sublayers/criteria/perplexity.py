"""The perplexity without each sublayer, one sublayer after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortllm.papers import BLOCKPRUNER
from shortllm.sublayers.criteria import CRITERIA, Ranking, SublayerCriterion, Task

if TYPE_CHECKING:
    from shortllm.sublayers.structure import Sublayer, Variants


@CRITERIA.register(
    SublayerCriterion(
        name="sublayer-ppl",
        label="Sublayer perplexity",
        value="perplexity without",
        paper=BLOCKPRUNER,
    )
)
def sublayer_ppl(task: Task) -> Ranking:
    """The lowest perplexity without it, one sublayer after the other.

    Of equal ones the one of the later block goes first, and of one block the attention. Finished
    rounds are in the journal. A NLL that is not a number counts as infinite.
    """
    from shortllm.model.metrics import perplexity
    from shortllm.model.walk import TOGETHER, mean_nlls
    from shortllm.runtime import progress
    from shortllm.sublayers.structure import PARTS, Variants

    variants, journal = Variants(task.decoder, task.outputs), task.journal
    rounds: list[list[float]] = (journal.position() or {"rounds": []})["rounds"]
    order: list[tuple[Sublayer, float]] = []
    intact = 0.0
    with progress("scoring sublayers by perplexity", _flops(variants, task)) as advance:
        for place in range(task.remove):
            gone = frozenset(one for one, _ in order)
            left = [one for one in task.candidates if one not in gone]
            if place == len(rounds):
                part = journal.part(f"round-{place}")
                means = mean_nlls(
                    variants.as_decoder(), task.ids_BT, variants.round(gone, left),
                    together=TOGETHER, advance=advance, memory=task.memory, journal=part,
                )  # fmt: skip
                rounds.append(means)
                journal.commit({"rounds": rounds}, {})
                part.discard()
            values = [value if value == value else float("inf") for value in rounds[place]]
            if not gone:
                intact, *values = values
            found = dict(zip(left, values, strict=True))
            least = min(left, key=lambda one: (found[one], -one[0], PARTS.index(one[1])))
            order.append((least, perplexity(found[least])))
    return Ranking(order=order, intact=perplexity(intact))


def _flops(variants: Variants, task: Task) -> float:
    """Floating-point operations of all rounds, as if the first candidates were removed."""
    from shortllm.model.walk import TOGETHER, walk_flops

    total = 0.0
    for done in range(task.remove):
        removals = variants.round(frozenset(task.candidates[:done]), task.candidates[done:])
        for start in range(0, len(removals), TOGETHER):
            together = removals[start : start + TOGETHER]
            total += walk_flops(variants.as_decoder(), together, *task.ids_BT.shape)
    return total
