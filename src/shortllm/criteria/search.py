"""Searches over sets of blocks of one size, each starting from the best one-shot plan.

    local    swaps one removed block for a kept one: all swaps are measured on a quarter of the
             samples, the 16 best of them on all, and the best is made, while it helps
    evolve   children of the best set so far have one to three such pairs flipped at random; the
             better ones are measured on more and more samples (EvoPress)

Neither can end worse than its start on the text that it searches on: only a strictly better set,
measured on all of that text, replaces the one before it. A unit is removed or kept as a whole: a
block, or a period of blocks.

    shortllm run MODEL --criterion local --remove 6
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from shortllm.criteria import PLACE, Scores, SearchMethod, criterion, names_in
from shortllm.errors import CriterionError
from shortllm.papers import EVOPRESS
from shortllm.records import Record

if TYPE_CHECKING:
    from shortllm.model.hidden_states import SampleGroups
    from shortllm.progress import Advance
    from shortllm.runtime import Ranks

Blocks = frozenset[int]
Unit = tuple[int, ...]
Fitness = Literal["ppl", "kl", "acceptance"]
AnyFitness = Literal["ppl", "kl", "acceptance", "task"]

FITNESS = {
    "ppl": "perplexity",
    "kl": "KL divergence",
    "acceptance": "fraction of rejected tokens",
    "task": "fraction of wrong answers",
}
"""What searches lower, in words."""

Choice = Callable[["SampleGroups", "Ranks", "Advance"], Sequence[int]]
"""Chooses a set by the hidden states of samples, of which each process has a share."""

ONE_SHOT = "ppl,kl,taylor,influence,relative,angular,magnitude"
"""Criteria that are cheap compared with a search."""

FINALISTS = 16
"""Swaps of a round that are measured on all of the search text."""

Stages = list[tuple[float, int]]
"""Of each stage of a selection, the fraction of the samples, and how many sets it measures."""


def held_out_by(fitness: AnyFitness) -> AnyFitness:
    """What is measured on the held-out samples of a search."""
    return "acceptance" if fitness == "acceptance" else "ppl"


class CandidateSet(Record):
    """One removal that a search began with, chose from, or found."""

    criterion: str
    removed: list[int] = Field(description="ascending")
    value: float | None = Field(
        description="on the search samples: perplexity, or KL(intact || without) in nats per "
        "token; by `acceptance` the fraction of drafted tokens rejected; by `task` that of items "
        "answered wrongly, and less than one item more"
    )
    held_out: float | None = Field(
        default=None,
        description="on the held-out samples: perplexity; by `acceptance` as `value`",
    )


class NotTried(Record):
    """A criterion that has no removal of the requested kind."""

    criterion: str
    reason: str


class Search(Record):
    """How a searched set of blocks came about."""

    fitness: AnyFitness
    candidates: list[CandidateSet] = Field(description="in the order requested")
    found: CandidateSet = Field(description="what is removed")
    start: str | None = Field(
        description="the candidate that swaps or children began with; null where there are none"
    )
    ordered_by: str = Field(description="the criterion whose scores order the blocks")
    rounds: list[float] = Field(
        description="mean fitness of the best set after each round, in nats per token, or in items"
    )
    stopped: str | None = Field(description="why there were no more rounds")
    evaluations: float = Field(
        description="sets measured; one measured on a fraction of the samples counts as that"
    )
    search_samples: int
    held_out_samples: int
    left_out: list[NotTried] = Field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a criterion removes, scored on the search text."""

    criterion: str
    removed: Blocks
    importance: list[float]


@dataclass(slots=True, kw_only=True)
class Found:
    """The best set so far."""

    start: Proposal
    removed: Blocks
    value: float
    """Mean fitness on all of the search text, nats; lower is better."""
    rounds: list[float] = field(default_factory=list)
    stopped: str = ""

    def take(self, removed: Blocks, value: float) -> bool:
        """Continue from another set if it is strictly better."""
        better = value < self.value
        if better:
            self.removed, self.value = removed, value
        self.rounds.append(self.value)
        return better


class SearchSpace(Protocol):
    """Sets of blocks of one size, which can be measured."""

    blocks: int
    units: list[Unit]
    """What may be removed, each all or not at all, ascending."""

    def propose(self, names: Sequence[str]) -> list[Proposal]:
        """What each criterion removes; those without a removal of this kind are left out."""

    def measure(self, sets: Sequence[Blocks], part: float = 1.0) -> list[float]:
        """Mean fitness of each set on a fraction of the search text, nats; infinite where NaN.

        All are measured in one walk.
        """

    def choose(self, choice: Choice) -> Blocks:
        """The set that is chosen by the hidden states of the search text."""

    def left(self) -> float:
        """How many more measurements the budget allows."""

    def share(self, part: float) -> float:
        """What measuring a fraction of the samples counts as, rounded up to whole samples."""

    def spent(self) -> str:
        """Why `left` is zero."""

    def candidates(
        self, sets: Sequence[tuple[str, Blocks]], values: Sequence[float]
    ) -> list[CandidateSet]:
        """Named sets with their perplexity on the held-out samples, if there are any."""

    def record(self, **found: Any) -> Search:
        """The result, with the search's own settings and counts."""


def select(space: SearchSpace, sets: Sequence[Blocks], stages: Stages) -> tuple[float, Blocks]:
    """The best of some sets by measuring fewer and fewer of them on more and more samples."""
    ranked = [(0.0, sorted(one), one) for one in sets]
    for part, count in stages:
        rest = [one for _, _, one in ranked[:count]]
        values = space.measure(rest, part)
        ranked = sorted(zip(values, map(sorted, rest), rest, strict=True))
    value, _, best = ranked[0]
    return value, best


def swap_stages(count: int) -> Stages:
    """All on a quarter of the samples, unless they are few, and the best ones on all."""
    return [(1.0, count)] if count <= 2 * FINALISTS else [(0.25, count), (1.0, FINALISTS)]


def child_stages(count: int) -> Stages:
    """All on a quarter of the samples, a quarter of them on half, an eighth of them on all."""
    return [(0.25, count), (0.5, math.ceil(count / 4)), (1.0, math.ceil(count / 8))]


def affordable(space: SearchSpace, count: int, stages: Callable[[int], Stages]) -> int:
    """How many of `count` sets a selection can begin with before the limit is reached."""
    while count and sum(n * space.share(part) for part, n in stages(count)) > space.left():
        count -= 1
    return count


def climb(space: SearchSpace, found: Found, options: Mapping[str, Any]) -> None:
    """Make the best swap of each round while there is one that helps.

    If the limit allows only a part of a round, the swaps most promising by the start's criterion
    are tried.
    """
    while True:
        swaps = _swaps(space, found)
        tried = swaps[: affordable(space, len(swaps), swap_stages)]
        if not tried:
            found.stopped = space.spent() if swaps else "no other set of that size"
            return
        value, best = select(space, tried, swap_stages(len(tried)))
        if not found.take(best, value):
            found.stopped = "no swap helps" if len(tried) == len(swaps) else space.spent()
            return


def evolve(space: SearchSpace, found: Found, options: Mapping[str, Any]) -> None:
    """Generations of children of the best set; fewer where the budget ends before."""
    random, generations = Random(options["seed"]), options["generations"]
    for _ in range(generations):
        children = _children(space, found.removed, options["offspring"], random)
        tried = children[: affordable(space, len(children), child_stages)]
        if not tried:
            found.stopped = space.spent() if children else "no other set"
            return
        value, best = select(space, tried, child_stages(len(tried)))
        found.take(best, value)
    found.stopped = f"{generations} generations"


@criterion(
    "local",
    needs="sets",
    label=PLACE,
    paper="local search by swaps",
    # as if two rounds helped
    search=SearchMethod(
        climb, lambda options, removed, kept: 2 * (0.25 * removed * kept + FINALISTS)
    ),
)
def swap_while_it_helps(
    space: SearchSpace,
    *,
    start: str = ONE_SHOT,
    fitness: AnyFitness = "ppl",
    temperature: float = 1.0,
    tasks: str | None = None,
    items: int = 100,
    held_out: float = 0.2,
    evaluations: int | None = None,
    minutes: float | None = None,
    healing: str | None = None,
    remove: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    period_aligned: bool = False,
) -> Scores:
    """The best one-shot plan, with removed blocks swapped for kept ones while a swap helps.

    Args:
        start: criteria whose plans are tried as the start.
        fitness: what is lowered: perplexity, divergence from the intact model, drafted tokens that
            it rejects, or the mistakes in the items of tasks.
        temperature: of the criterion `acceptance`, for that fitness.
        tasks, items: of the criterion `task`, for that fitness.
        held_out: fraction of the calibration samples that the search does not see.
        evaluations: sets measured at most, in addition to the starts.
        minutes: no round begins later than this.
        healing: a method of `shortllm heal`; sets are measured after it.
        remove: number of blocks to remove; default: a quarter of them.
    """
    return _searched(space, "local", start, climb, {})


@criterion(
    "evolve",
    needs="sets",
    label=PLACE,
    paper=EVOPRESS,
    search=SearchMethod(evolve, lambda options, removed, kept: 8.0 * options["generations"]),
)
def evolve_from_the_best_plan(
    space: SearchSpace,
    *,
    start: str = ONE_SHOT,
    fitness: Fitness = "kl",
    temperature: float = 1.0,
    generations: int = 30,
    offspring: int = 16,
    seed: int = 0,
    held_out: float = 0.2,
    evaluations: int | None = None,
    minutes: float | None = None,
    healing: str | None = None,
    remove: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    period_aligned: bool = False,
) -> Scores:
    """The best set of an evolution that starts from the best one-shot plan.

    Args:
        offspring: children of each generation.
        evaluations: sets measured at most, in addition to the starts; one measured on a
            fraction of the samples counts as that.
    """
    options = {"generations": generations, "offspring": offspring, "seed": seed}
    return _searched(space, "evolve", start, evolve, options)


def begin(space: SearchSpace, names: Sequence[str]) -> tuple[Found, list[Proposal], list[float]]:
    """The best of what the criteria remove, the first of equals; all of it, and their values."""
    proposals = space.propose(names)
    values = space.measure([one.removed for one in proposals])
    value, place = min(zip(values, range(len(values)), strict=True))
    if math.isinf(value):
        raise CriterionError(
            "no one-shot plan leaves a model whose loss is a number. Try --dtype float32, or "
            "remove fewer blocks"
        )
    found = Found(start=proposals[place], removed=proposals[place].removed, value=value)
    return found, proposals, values


def _swaps(space: SearchSpace, found: Found) -> list[Blocks]:
    """Every set with one unit put back and another taken, the most promising first."""
    removed, kept = _parts(space, found.removed)
    importance = found.start.importance

    def gain(pair: tuple[Unit, Unit]) -> tuple[float, Any]:
        back, taken = pair
        return sum(importance[b] for b in taken) - sum(importance[b] for b in back), pair

    pairs = sorted(((back, taken) for back in removed for taken in kept), key=gain)
    return [found.removed.difference(back).union(taken) for back, taken in pairs]


def _parts(space: SearchSpace, removed: Blocks) -> tuple[list[Unit], list[Unit]]:
    """The units that are removed, and those that are kept."""
    gone = [unit for unit in space.units if removed.issuperset(unit)]
    return gone, [unit for unit in space.units if removed.isdisjoint(unit)]


def _children(space: SearchSpace, parent: Blocks, count: int, random: Random) -> list[Blocks]:
    """Up to `count` different sets, each with `min` of two draws from 1 to 3 pairs flipped."""
    removed, kept = _parts(space, parent)
    children: dict[Blocks, None] = {}
    for _ in range(10 * count):  # where there are few sets, draws repeat
        if len(children) == count or not removed or not kept:
            break
        flips = min(random.randint(1, 3), random.randint(1, 3), len(removed), len(kept))
        back = random.sample(removed, flips)
        taken = random.sample(kept, flips)
        children[parent.difference(*back).union(*taken)] = None
    return list(children)


def _searched(
    space: SearchSpace,
    name: str,
    start: str,
    improve: Callable[[SearchSpace, Found, Mapping[str, Any]], None],
    options: Mapping[str, Any],
) -> Scores:
    """The best start, improved; starts and result are also measured on held-out samples."""
    found, proposals, values = begin(space, names_in(start))
    improve(space, found, options)
    sets = [(one.criterion, one.removed) for one in proposals]
    *candidates, result = space.candidates([*sets, (name, found.removed)], [*values, found.value])
    return scores_of(space, candidates, result, found.start, found)


def scores_of_one(
    space: SearchSpace,
    name: str,
    start: str,
    choose: Callable[[SearchSpace, Found, Mapping[str, Any]], None],
) -> Scores:
    """A set that is found in one go, as scores; the start only gives its size and orders it."""
    found, _, _ = begin(space, [start])
    choose(space, found, {})
    [best] = space.candidates([(name, found.removed)], [found.value])
    return scores_of(space, [best], best, found.start, None)


def scores_of(
    space: SearchSpace,
    candidates: list[CandidateSet],
    chosen: CandidateSet,
    by: Proposal,
    searched: Found | None,
) -> Scores:
    """A searched set as scores: importance is the place in an order of removal.

    First the set, then the other removable blocks, both least important first by the criterion of
    the proposal, then the protected ones. The values are that criterion's.
    """
    removed = frozenset(chosen.removed)
    free = frozenset(block for unit in space.units for block in unit)
    protected = frozenset(range(space.blocks)) - free

    def ordered(blocks: Iterable[int]) -> list[int]:
        return sorted(blocks, key=lambda b: (by.importance[b], -b))

    order = ordered(removed)
    rest = [*ordered(free - removed), *sorted(protected, reverse=True)]
    place = {b: float(i) for i, b in enumerate([*order, *rest])}
    return Scores(
        importance=[place[b] for b in range(space.blocks)],
        values=by.importance,
        order=order,
        removed=sorted(removed),
        search=space.record(
            candidates=candidates,
            found=chosen,
            start=searched.start.criterion if searched else None,
            ordered_by=by.criterion,
            rounds=searched.rounds if searched else [],
            stopped=searched.stopped if searched else None,
        ),
    )
