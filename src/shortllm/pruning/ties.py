"""Which removed blocks scored like some that were kept: the choice between them is one of noise.

Scores hold one number per block, without its error. Another computation type or attention kernel
moves a perplexity by some tenths of a percent, so blocks closer than `NEAR` are called alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from shortllm.format import listed, spans

NEAR = 0.005
"""Relative difference of two scores up to which their order may be another on another machine."""

Unit = tuple[int, ...]
"""Blocks that go together: one, a period, or a span."""


def near_ties(importance: Mapping[Unit, float], removed: Collection[Unit]) -> str:
    """A sentence that names the removed units and the kept ones which score alike; else empty."""
    gone = [unit for unit in importance if unit in removed]
    left = [unit for unit in importance if unit not in removed]
    if not gone or not left:
        return ""
    highest = max(importance[unit] for unit in gone)
    lowest = min(importance[unit] for unit in left)
    over = [unit for unit in left if _apart(importance[unit], highest) <= NEAR]
    chosen = [unit for unit in gone if _apart(importance[unit], lowest) <= NEAR]
    if not over or not chosen:
        return ""
    gaps = [_apart(importance[one], importance[other]) for one in chosen for other in over]
    single = sum(map(len, chosen)) == 1
    return (
        f"{'Block' if single else 'Blocks'} {_named(chosen)} {'was' if single else 'were'} chosen "
        f"over {_named(over)}, which {_alike(max(gaps), len(over))}."
    )


def _apart(one: float, other: float) -> float:
    """The relative difference."""
    return abs(one - other) / (max(abs(one), abs(other)) or 1.0)


def _alike(gap: float, count: int) -> str:
    if gap == 0:
        return f"{'scores' if count == 1 else 'score'} the same: of equals the later goes"
    return f"{'scores' if count == 1 else 'score'} alike (within {math.ceil(1000 * gap) / 10:g} %)"


def _named(units: Sequence[Unit]) -> str:
    """'5, 6 and 9', or spans: '4–6 and 5–7'."""
    return listed([spans(unit) for unit in sorted(units)])
