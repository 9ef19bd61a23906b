"""Who wins a comparison of criteria, budget by budget: plain numbers from its record alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shortllm.comparison.options import Comparison, Contender
from shortllm.format import counted, listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One budget: what criteria and random draws reach. Infinity where there was no perplexity."""

    name: str
    """The requested ratios, e.g. '10 %', or '10/20 %' where both come to the same blocks."""
    blocks: int
    perplexities: list[float]
    """One for each criterion."""
    best: list[str]
    """The criteria with the lowest perplexity; several where they remove the same blocks."""
    random: list[float]
    """One for each draw."""
    beat_mean: int
    """Criteria below the mean of the draws."""
    beat_all: int
    """Criteria below every draw."""

    @property
    def random_mean(self) -> float:
        """Mean perplexity of the random removals."""
        return sum(self.random) / len(self.random)


def standings(comparison: Comparison) -> list[Standing]:
    """One for each budget."""
    return [_standing(comparison, place) for place in range(len(comparison.budgets))]


def _standing(comparison: Comparison, place: int) -> Standing:
    found = _perplexities(comparison.criteria, place)
    drawn = _perplexities(comparison.random, place)
    least, mean = min(found), sum(drawn) / len(drawn)
    budget = comparison.budgets[place]
    return Standing(
        name=f"{'/'.join(f'{100 * ratio:.4g}' for ratio in budget.ratios)} %",
        blocks=budget.blocks,
        perplexities=found,
        best=[
            one.criterion
            for one, value in zip(comparison.criteria, found, strict=True)
            if value == least and math.isfinite(value)
        ],
        random=drawn,
        beat_mean=sum(value < mean for value in found),
        beat_all=sum(value < min(drawn) for value in found),
    )


def _perplexities(contenders: Sequence[Contender], place: int) -> list[float]:
    values = [one.sets[place].perplexity for one in contenders]
    return [math.inf if value is None else value for value in values]


def verdict(comparison: Comparison) -> str:
    """Which criteria win most often, and whether they are better than chance, in two sentences."""
    columns, count = standings(comparison), len(comparison.criteria)
    best = [name for column in columns for name in column.best]
    wins: dict[int, list[str]] = {}
    for name in sorted(set(best), key=lambda name: (-best.count(name), best.index(name))):
        wins.setdefault(best.count(name), []).append(name)
    won = [f"{listed(names)} at {number}" for number, names in wins.items()][:2]
    won[:1] = [f"{text} of {counted(len(columns), 'budget')}" for text in won[:1]]
    beat = sorted({column.beat_mean for column in columns})
    some = str(beat[0]) if len(beat) == 1 else f"{beat[0]} to {beat[-1]}"
    return (
        f"Lowest perplexity: {'; '.join(won) or 'none could be measured'}. At each budget {some} "
        f"of {count} criteria are better than the mean of {len(comparison.random)} random removals."
    )
