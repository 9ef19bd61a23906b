"""Which removed blocks scored like some that were kept: the choice between them is one of noise.

Two blocks score alike if they differ by less than two standard errors over the calibration samples,
where scores have a number per sample, or by less than `NEAR`: another computation type or attention
kernel moves a perplexity by some tenths of a percent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shortllm.evaluation.options import paired_difference
from shortllm.format import listed, spans

SAME = 1e-6
"""Relative difference of two scores that is one of rounding."""

NEAR = 0.005
"""Relative difference of two scores up to which their order may be another on another machine."""

Unit = tuple[int, ...]
"""Blocks that go together: one, a period, or a span."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What a plan chose among, with the score of each."""

    importance: Mapping[Unit, float]
    samples: Mapping[Unit, Sequence[float]]
    """The same for each sample; empty where that is not known."""

    def apart(self, one: Unit, other: Unit) -> float:
        """The relative difference."""
        first, second = self.importance[one], self.importance[other]
        return abs(first - second) / (max(abs(first), abs(second)) or 1.0)

    def alike(self, one: Unit, other: Unit) -> bool:
        """Whether the order of two may be chance."""
        if self.apart(one, other) <= NEAR:
            return True
        found = paired_difference(self.samples.get(one, ()), self.samples.get(other, ()))
        return found is not None and found.stderr is not None and not found.is_clear


@dataclass(frozen=True, slots=True)
class Ties:
    """What a plan must say of scores that are alike."""

    sentence: str = ""
    """Empty where there is nothing to say."""
    chosen: Sequence[Unit] = ()
    over: Sequence[Unit] = ()
    """The removed units, and the kept ones, whose order may be chance."""

    @property
    def blocks(self) -> list[int]:
        """The blocks that are removed and may as well be kept, or the reverse."""
        gone, left = ({b for unit in units for b in unit} for units in (self.chosen, self.over))
        return sorted(gone ^ left)


def near_ties(compared: Compared, removed: Collection[Unit]) -> Ties:
    """A sentence that names the removed units and the kept ones which score alike, else one that
    names units with the same score; else empty."""
    found = _at_the_border(compared, removed)
    return found if found.sentence else Ties(_the_same(compared))


def _at_the_border(compared: Compared, removed: Collection[Unit]) -> Ties:
    importance = compared.importance
    gone = [unit for unit in importance if unit in removed]
    left = [unit for unit in importance if unit not in removed]
    if not gone or not left:
        return Ties()
    last, first = max(gone, key=importance.__getitem__), min(left, key=importance.__getitem__)
    over = [unit for unit in left if compared.alike(unit, last)]
    chosen = [unit for unit in gone if compared.alike(unit, first)]
    if not over or not chosen:
        return Ties()
    gap = max(compared.apart(one, other) for one in chosen for other in over)
    were = "Block {} was" if sum(map(len, chosen)) == 1 else "Blocks {} were"
    score = "scores" if sum(map(len, over)) == 1 else "score"
    how = "the same: of equals the later goes"
    if gap:
        noise = "" if gap <= NEAR else ", the noise of the samples"
        how = f"alike (within {math.ceil(1000 * gap) / 10:g} %{noise})"
    sentence = f"{were.format(_named(chosen))} chosen over {_named(over)}, which {score} {how}."
    return Ties(sentence, chosen, over)


def _the_same(compared: Compared) -> str:
    """The largest group of units whose scores are equal."""
    found: list[list[Unit]] = []
    for unit in sorted(compared.importance, key=compared.importance.__getitem__):
        if found and compared.apart(found[-1][-1], unit) <= SAME:
            found[-1].append(unit)
        else:
            found.append([unit])
    largest = max(found, key=len, default=[])
    if len(largest) < 2:
        return ""
    return f"Blocks {_named(largest)} score the same: of equals the later goes first."


def undecided(removed: Collection[int], near: Sequence[int], by_samples: bool) -> str:
    """A line that says which blocks the scores do not tell apart; empty if they do."""
    if not near:
        return ""
    chosen, over = ([b for b in near if (b in removed) == gone] for gone in (True, False))
    more = "; more --samples would decide" if by_samples else ""
    return (
        f"blocks {listed(list(map(str, chosen)))} (removed) and {listed(list(map(str, over)))} "
        f"(kept) are within noise{more}"
    )


def _named(units: Sequence[Unit]) -> str:
    """'5, 6 and 9', or spans: '4–6 and 5–7'."""
    return listed([spans(unit) for unit in sorted(units)])
