"""The span of neighbouring blocks without which the model is best; all spans in one walk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortllm.criteria import PLACE, Scores, SearchMethod, criterion
from shortllm.criteria.search import Blocks, Fitness, Found, SearchSpace, scores_of_one
from shortllm.errors import CriterionError


def scan(space: SearchSpace, found: Found, options: Mapping[str, Any]) -> None:
    """Measure every span of the set's size, and take the best one."""
    spans = spans_of(space, len(found.removed))
    if not spans:
        raise CriterionError(
            f"no {len(found.removed)} neighbouring blocks are unprotected. Remove fewer, or pass "
            "--protect-first 0 --protect-last 0"
        )
    values = space.measure(spans)
    # of equals the later one, as in all plans
    found.value, _, found.removed = min(
        (value, -min(span), span) for value, span in zip(values, spans, strict=True)
    )


def spans_of(space: SearchSpace, size: int) -> list[Blocks]:
    """The spans of `size` blocks that whole units make."""
    unit = len(space.units[0])
    spans = []
    for start in range(len(space.units) - size // unit + 1):
        blocks = [block for one in space.units[start : start + size // unit] for block in one]
        if blocks[-1] - blocks[0] == size - 1:
            spans.append(frozenset(blocks))
    return spans


@criterion(
    "span",
    needs="sets",
    label=PLACE,
    paper="every span by perplexity",
    search=SearchMethod(scan, lambda options, removed, kept: kept + 1.0),
)
def best_span(
    space: SearchSpace,
    *,
    start: str = "influence",
    fitness: Fitness = "ppl",
    temperature: float = 1.0,
    held_out: float = 0.2,
    evaluations: int | None = None,
    minutes: float | None = None,
    healing: str | None = None,
    remove: int | None = None,
    protect_first: int | None = None,
    protect_last: int | None = None,
    period_aligned: bool = False,
) -> Scores:
    """The best span of neighbouring blocks; all spans of its size are measured.

    Args:
        start: criterion whose scores order the blocks within the span.
    """
    return scores_of_one(space, "span", start, scan)
