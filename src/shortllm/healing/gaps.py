"""Gaps: spans of removed blocks, each with the block that is left before it.

kept     0  1        4  5     7        gap (1, [2, 4))   gap (5, [6, 7))
removed        2  3        6
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gap:
    """Removed blocks `[start, stop)`, counted in the original."""

    start: int
    stop: int

    @property
    def before(self) -> int | None:
        """The block before, which is kept; None where the gap is at the very start."""
        return self.start - 1 if self.start else None

    @property
    def blocks(self) -> list[int]:
        """The removed blocks, ascending."""
        return list(range(self.start, self.stop))


def gaps_of(removed: Collection[int]) -> list[Gap]:
    """The gaps that removed blocks leave, in their order."""
    gaps: list[Gap] = []
    for block in sorted(removed):
        if gaps and gaps[-1].stop == block:
            gaps[-1] = Gap(gaps[-1].start, block + 1)
        else:
            gaps.append(Gap(block, block + 1))
    return gaps
