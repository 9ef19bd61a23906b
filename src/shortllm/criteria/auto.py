"""Run several criteria and searches, and take the removal that is best on held-out text."""

from __future__ import annotations

from shortllm import criteria
from shortllm.criteria import PLACE, Scores, criterion
from shortllm.criteria.search import (
    ONE_SHOT,
    Blocks,
    Fitness,
    Found,
    Proposal,
    SearchSpace,
    best_of,
    names_in,
    scores_of,
)


@criterion("auto", needs="sets", label=PLACE, paper="the best of several criteria on held-out text")
def best_on_held_out(
    space: SearchSpace,
    *,
    candidates: str = f"{ONE_SHOT},greedy,local",
    fitness: Fitness = "ppl",
    generations: int = 30,
    offspring: int = 16,
    seed: int = 0,
    held_out: float = 0.6,
    evaluations: int | None = None,
    minutes: float | None = None,
    remove: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    period_aligned: bool = False,
) -> Scores:
    """The removal, of those by several criteria and searches, with the lowest held-out perplexity.

    Calibration samples are split: all candidates are found on one part, and measured in one walk
    on the other. Of equals the first named wins. Searches start from the best plan of the other
    candidates.

    Args:
        candidates: criteria and searches to try.
        held_out: part of the calibration samples that decides. Measuring a few sets is cheap, and
            it takes much text to tell them apart.
        generations, offspring, seed, evaluations, minutes: of the searches among the candidates
            that have such an option.
    """
    given = {"generations": generations, "offspring": offspring, "seed": seed}
    names = names_in(candidates)
    searches = {name: criteria.get(name).search for name in names}
    others = [name for name, search in searches.items() if search is None]
    proposals = space.propose(others or names_in(ONE_SHOT))
    values = space.measure([one.removed for one in proposals])
    start = best_of(proposals, values)
    sets = {
        one.criterion: (one, one.removed, value)
        for one, value in zip(proposals, values, strict=True)
    }
    last: Found | None = None
    for name, search in searches.items():
        if search is not None:
            last = Found(start=start.start, removed=start.removed, value=start.value)
            search.improve(space, last, {**criteria.get(name).defaults, **given})
            sets[name] = (last.start, last.removed, last.value)
    return _choose(space, [name for name in names if name in sets], sets, last)


def _choose(
    space: SearchSpace,
    names: list[str],
    sets: dict[str, tuple[Proposal, Blocks, float]],
    searched: Found | None,
) -> Scores:
    """Measure all on the held-out samples and take the best."""
    found = space.candidates(
        [(name, sets[name][1]) for name in names], [sets[name][2] for name in names]
    )
    place = {name: i for i, name in enumerate(names)}
    winner = min(
        found, key=lambda one: (one.held_out is None, one.held_out or 0.0, place[one.criterion])
    )
    by, removed, _ = sets[winner.criterion]
    record = space.record(
        candidates=found,
        found=winner,
        start=searched.start.criterion if searched else None,
        ordered_by=by.criterion,
        rounds=searched.rounds if searched else [],
        stopped=searched.stopped if searched else None,
    )
    return scores_of(space, removed, by, record)
