"""Run several criteria and searches, and take the removal that is best on held-out text."""

from __future__ import annotations

from dataclasses import replace

from shortllm import criteria
from shortllm.criteria import PLACE, Scores, criterion, names_in
from shortllm.criteria.search import ONE_SHOT, Fitness, Found, SearchSpace, begin, scores_of


@criterion("auto", needs="sets", label=PLACE, paper="the best of several criteria on held-out text")
def best_on_held_out(
    space: SearchSpace,
    *,
    candidates: str = f"{ONE_SHOT},span,local",
    fitness: Fitness = "ppl",
    temperature: float = 1.0,
    generations: int = 30,
    offspring: int = 16,
    seed: int = 0,
    held_out: float = 0.6,
    evaluations: int | None = None,
    minutes: float | None = None,
    healing: str | None = None,
    remove: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    period_aligned: bool = False,
) -> Scores:
    """The removal, of those by several criteria and searches, that is best on held-out text.

    Calibration samples are split: all candidates are found on one part, and measured in one walk
    on the other. Of equals the first named wins. Searches start from the best candidate before
    them.

    Args:
        candidates: criteria and searches to try.
        fitness: what is lowered; held-out text decides by perplexity, or by acceptance for that.
        held_out: fraction of the calibration samples that decides. Measuring a few sets is cheap,
            and it takes much text to tell them apart.
        healing: a method of `shortllm heal`; candidates are measured after it.
        generations, offspring, seed, evaluations, minutes: of the searches among the candidates
            that have such an option.
    """
    given = {"generations": generations, "offspring": offspring, "seed": seed}
    names = names_in(candidates)
    searches = {name: criteria.get(name).search for name in names}
    others = [name for name, search in searches.items() if search is None]
    start, proposals, values = begin(space, others or names_in(ONE_SHOT))
    sets = {
        one.criterion: Found(start=one, removed=one.removed, value=value)
        for one, value in zip(proposals, values, strict=True)
    }
    searched: Found | None = None
    for name, search in searches.items():
        if search is not None:
            best = min([start, *sets.values()], key=lambda one: one.value)
            searched = sets[name] = replace(best, rounds=[])
            search.improve(space, searched, {**criteria.get(name).defaults, **given})
    tried = {name: sets[name] for name in names if name in sets}
    measured = space.candidates(
        [(name, one.removed) for name, one in tried.items()], [one.value for one in tried.values()]
    )
    # min takes the first of equals
    winner = min(measured, key=lambda one: (one.held_out is None, one.held_out or 0.0))
    return scores_of(space, measured, winner, tried[winner.criterion].start, searched)
