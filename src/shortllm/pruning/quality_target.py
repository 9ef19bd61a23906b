"""The most blocks that targets of quality allow: which numbers are tried, what was measured.

Quality falls, as a rule, with every block that goes, so the numbers are bisected: above the first
one that fails, none is tried. Where several numbers cost little more than one (blocks bypassed in
memory, in one walk), several are tried at once. Where each one costs a healing or a retraining, the
search begins at a number that is known from there, and continues in steps of 1, 2, 4, ... Pure, no
torch.

    shortllm run MODEL --max-ppl-increase 5% --heal regression
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from shortllm.errors import TargetMissedError
from shortllm.evaluation.quality import QualityTargets, Requirement, option_of
from shortllm.format import counted
from shortllm.pruning.budget import Budget, free_units
from shortllm.records import ModelInfo, Record, ResultFile

TOGETHER = 4
"""Numbers of blocks that one walk measures."""

BYPASSED = "bypassed"
"""Stands for the name of a model that was not written: its blocks were bypassed in memory."""


def sizes_of(budget: Budget, model: ModelInfo) -> list[int]:
    """Every number of blocks that can be removed, ascending."""
    units = free_units(budget, model)
    return [len(units[0]) * number for number in range(1, len(units) + 1)]


def most_that_meet(
    meet: Callable[[Sequence[int]], Sequence[bool]],
    sizes: Sequence[int],
    *,
    start: int | None = None,
    together: int = 1,
) -> int | None:
    """A size that meets a target while the next larger one does not; None if the smallest fails.

    It is the largest one that meets it where all up to it do.

    Args:
        meet: for some sizes, ascending, whether each meets the target.
        sizes: ascending.
        start: the size to try first, if one is known to be near.
        together: how many sizes are tried at once.
    """
    low, high = -1, len(sizes)  # places of a size that meets it, and of one that fails
    guess, step = None if start is None else sizes.index(start), 1
    while high - low > 1:
        if guess is not None:
            tried = [min(max(guess, low + 1), high - 1)]
        else:
            count = min(together, high - low - 1)
            tried = [low + (high - low) * i // (count + 1) for i in range(1, count + 1)]
        met = [*meet([sizes[place] for place in tried]), False]
        first = met.index(False)  # of the tried ones that fail
        low = tried[first - 1] if first else low
        high = tried[first] if first < len(tried) else high
        if guess is not None:  # on in the same direction, until the other bound is found
            up = bool(first)
            open_ended = high == len(sizes) if up else low == -1
            guess = (low + step if up else high - step) if open_ended else None
            step *= 2
    return None if low < 0 else sizes[low]


class SizeTried(Record):
    """A number of blocks, and what was measured without them."""

    remove: int
    removed: list[int] = Field(description="ascending")
    model: str = Field(
        description="the one that was measured, e.g. 'healed'; 'bypassed': in memory, without "
        "healing or retraining"
    )
    requirements: list[Requirement] = Field(description="none if its loss was not finite")

    @property
    def passed(self) -> bool:
        """Whether all targets are met."""
        return bool(self.requirements) and all(one.passed for one in self.requirements)

    @property
    def said(self) -> str:
        """'+4.3 % (perplexity on c4)'."""
        if not self.requirements:
            return "a loss that is not finite"
        return ", ".join(f"{one.measured} ({one.of})" for one in self.requirements)


class QualityTarget(ResultFile):
    """quality.json: the number of blocks that targets of quality allow, and all that was tried."""

    FILE: ClassVar[str] = "quality.json"
    PLANNED: ClassVar[str] = "quality-plan.json"
    """The file of `plan`, which leaves that of a run as it is."""

    model: ModelInfo
    asked: dict[str, str] = Field(description="e.g. {'max_ppl_increase': '5%'}")
    at_least: int | None = Field(
        default=None, description="blocks that a target of size or speed next to it needs"
    )
    tried: list[SizeTried] = Field(default_factory=list, description="in the order of trying")
    remove: int | None = Field(default=None, description="blocks to remove; null: none yet")

    @field_validator("asked")
    @classmethod
    def _are_targets(cls, asked: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in asked if name not in QualityTargets.model_fields]:
            raise ValueError(f"'{unknown[0]}' is not a target of quality")
        return asked

    def find(self, remove: int, *, bypassed: bool) -> SizeTried | None:
        """What was measured without this many blocks."""
        same = (one for one in self.tried if one.remove == remove)
        return next((one for one in same if (one.model == BYPASSED) == bypassed), None)

    @property
    def reached(self) -> SizeTried | None:
        """What was measured of the number of blocks that was chosen: written, if it was."""
        if self.remove is None:
            return None
        return self.find(self.remove, bypassed=False) or self.find(self.remove, bypassed=True)

    @property
    def described(self) -> str:
        """One line for a reader."""
        asked = ", ".join(f"{option_of(name)} {value}" for name, value in self.asked.items())
        if (reached := self.reached) is None:
            least = min(self.tried, key=lambda one: one.remove, default=None)
            said = f"; without {counted(least.remove, 'block')} it is {least.said}" if least else ""
            return f"{asked}: no number of blocks that meets it was found{said}"
        state = "" if reached.model == BYPASSED else f" {reached.model}:"
        return (
            f"{asked}: {self.remove} of {self.model.blocks} blocks removed,{state} {reached.said}"
        )


def require_found(target: QualityTarget, *, hints: Sequence[str]) -> int:
    """The number of blocks that was found, if it is enough.

    Args:
        hints: what may help, e.g. '--heal regression'.
    """
    asked = " ".join(f"{option_of(name)} {value}" for name, value in target.asked.items())
    help_by = f". What may help: {', '.join(hints)}" if hints else ""
    if target.remove is None:
        enough = [one for one in target.tried if one.remove >= (target.at_least or math.inf)]
        least = min(enough or target.tried, key=lambda one: (one.remove, one.model == BYPASSED))
        why = "which the target of size or speed needs" if enough else "the fewest that can go"
        state = "" if least.model == BYPASSED else f" ({least.model})"
        raise TargetMissedError(
            f"no removal meets {asked}: without {counted(least.remove, 'block')}{state}, {why}, "
            f"it is {least.said}. Ask for no more than that{help_by}"
        )
    if target.at_least is not None and target.remove < target.at_least:
        raise TargetMissedError(
            f"the target of size or speed needs {target.at_least} blocks removed or more, and "
            f"{asked} allows {target.remove}. Ask for less of one of them{help_by}"
        )
    return target.remove
