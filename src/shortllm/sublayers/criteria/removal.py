"""What the model does without each sublayer: one goes after the other, in several walks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shortllm.papers import BLOCKPRUNER, FINERCUT
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
    """The lowest perplexity without it, one sublayer after the other."""
    from shortllm.model.metrics import perplexity

    order, intact = _one_by_one(task, kl=False)
    return Ranking(
        order=[(one, perplexity(value)) for one, value in order], intact=perplexity(intact)
    )


@CRITERIA.register(
    SublayerCriterion(
        name="sublayer-kl",
        label="Sublayer divergence",
        value="KL(intact || without)",
        paper=FINERCUT,
    )
)
def sublayer_kl(task: Task) -> Ranking:
    """The lowest divergence from the intact model without it, one sublayer after the other."""
    order, intact = _one_by_one(task, kl=True)
    return Ranking(order=order, intact=intact)


def _one_by_one(task: Task, *, kl: bool) -> tuple[list[tuple[Sublayer, float]], float]:
    """Sublayers in the order in which they go, each with its mean when it went, and the mean of the
    intact model; nats per token.

    Of equal ones the one of the later block goes first, and of one block the attention. Finished
    rounds are in the journal. A mean that is not a number counts as infinite.
    """
    from shortllm.criteria.removal import divergence_without_block
    from shortllm.model.walk import TOGETHER, mean_losses, target_nll
    from shortllm.progress import progress
    from shortllm.sublayers.structure import PARTS, Variants

    variants, journal = Variants(task.decoder, task.outputs), task.journal
    rounds: list[list[float]] = (journal.position() or {"rounds": []})["rounds"]
    order: list[tuple[Sublayer, float]] = []
    intact = 0.0
    measure = "divergence" if kl else "perplexity"
    with progress(f"scoring sublayers by {measure}", _flops(variants, task, kl)) as advance:
        for place in range(task.remove):
            gone = frozenset(one for one, _ in order)
            left = [one for one in task.candidates if one not in gone]
            if place == len(rounds):
                part = journal.part(f"round-{place}")
                means = mean_losses(
                    variants.as_decoder(), task.ids_BT, variants.round(gone, left),
                    value=divergence_without_block if kl else target_nll,
                    intact=variants.without(frozenset()) if kl else None, together=TOGETHER,
                    advance=advance, memory=task.memory, journal=part,
                )  # fmt: skip
                rounds.append(means)
                journal.commit({"rounds": rounds}, {})
                part.discard()
            values = [math.inf if math.isnan(value) else value for value in rounds[place]]
            if not gone:
                intact, *values = values
            found = dict(zip(left, values, strict=True))
            least = min(left, key=lambda one: (found[one], -one[0], PARTS.index(one[1])))
            order.append((least, found[least]))
    return order, intact


def _flops(variants: Variants, task: Task, kl: bool) -> float:
    """Floating-point operations of all rounds, as if the first candidates were removed."""
    from shortllm.model.walk import TOGETHER, walk_flops

    total, first = 0.0, [variants.without(frozenset())] if kl else []
    for done in range(task.remove):
        removals = variants.round(frozenset(task.candidates[:done]), task.candidates[done:])
        for start in range(0, len(removals), TOGETHER):
            together = [*first, *removals[start : start + TOGETHER]]
            total += walk_flops(variants.as_decoder(), together, *task.ids_BT.shape)
    return total
