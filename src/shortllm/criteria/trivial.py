"""Baselines that any criterion must beat: they look at neither weights nor text."""

from __future__ import annotations

import random

from shortllm.criteria import PLACE, criterion


@criterion("last", needs="nothing", label=PLACE, paper="baseline")
def last_first(blocks: int) -> list[float]:
    """The last block goes first."""
    return [float(blocks - b) for b in range(blocks)]


@criterion("random", needs="nothing", label=PLACE, paper="baseline", compared=False)
def random_order(blocks: int, *, seed: int = 0) -> list[float]:
    """A seeded permutation."""
    ranks = list(range(blocks))
    random.Random(seed).shuffle(ranks)
    return [float(rank) for rank in ranks]


@criterion("even", needs="nothing", label=PLACE, paper="baseline")
def evenly_spaced(blocks: int) -> list[float]:
    """Removed blocks lie nearly evenly spaced.

    Each next block is the farthest from the ones gone and from both ends.
    """
    gone: list[int] = []
    for _ in range(blocks):
        left = [b for b in range(blocks) if b not in gone]
        fixed = [-1, blocks, *gone]
        gone.append(max(left, key=lambda b: (min(abs(b - other) for other in fixed), b)))
    return [float(gone.index(b)) for b in range(blocks)]
