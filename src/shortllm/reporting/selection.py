"""The section on a searched set of blocks: what was tried, and what won."""

from __future__ import annotations

from typing import Any

from shortllm.criteria.records import Search
from shortllm.reporting.comparison import spans
from shortllm.reporting.loading import RunResults
from shortllm.reporting.wording import counted, number

Context = dict[str, Any]

VALUES = {"ppl": "perplexity, search text", "kl": "KL from intact, search text"}


def selection(results: RunResults) -> Context | None:
    """A row per candidate; None where blocks were not searched for, or another plan was made."""
    scores = results.scores
    if scores is None or scores.search is None or results.plan.criterion != scores.criterion:
        return None
    search = scores.search
    found, chose = search.found, search.found.criterion != scores.criterion
    rows = [*search.candidates, *([] if chose else [found])]
    return {
        "value": VALUES[search.fitness],
        "held_out": search.held_out_samples > 0,
        "rows": [
            {
                "name": one.criterion,
                "blocks": spans(one.removed),
                "value": number(one.value, 5),
                "held_out": number(one.held_out, 5),
                "won": one.criterion == found.criterion,
            }
            for one in rows
        ],
        "criterion": scores.criterion,
        "chose": chose,
        "winner": found.criterion,
        "start": search.start,
        "searched": _searched(search),
        "samples": counted(search.search_samples, "sample"),
        "apart": counted(search.held_out_samples, "other sample"),
        "left_out": [(one.criterion, one.reason) for one in search.left_out],
    }


def _searched(search: Search) -> str | None:
    """How far the search went; None where there was none."""
    if search.start is None:
        return None
    return (
        f"{counted(len(search.rounds), 'round')}, as much as {number(search.evaluations)} "
        f"measurements of one set; it ended with: {search.stopped}"
    )
