"""What the page of a comparison shows: a function per section, from its record to plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shortllm.comparison.options import Comparison, Contender
from shortllm.comparison.ranking import Standing, standings, verdict
from shortllm.reporting.loading import ComparisonResults
from shortllm.reporting.names import model_name
from shortllm.reporting.plots.criteria import ComparisonPlot, CriterionLine
from shortllm.reporting.protocol import (
    calibration_phrase,
    describe_comparison,
    perplexity_source,
    segments_phrase,
)
from shortllm.reporting.wording import NONE, counted, number, percent

Context = dict[str, Any]


def head(results: ComparisonResults) -> Context:
    """Title and verdict."""
    found = results.comparison
    return {
        "name": model_name(found.model.id),
        "revision": (found.model.revision or "")[:12],
        "criteria": len(found.criteria),
        "blocks": found.model.blocks,
        "version": results.run.shortllm,
        "verdict": verdict(found),
    }


def criteria_plot(found: Comparison) -> ComparisonPlot:
    """Perplexity against what is removed, a line per criterion, random draws as a band."""
    columns = standings(found)
    intact = found.intact.perplexity
    return ComparisonPlot(
        blocks=[0, *(budget.blocks for budget in found.budgets)],
        of=found.model.blocks,
        lines=[
            CriterionLine(
                name=one.criterion,
                baseline=one.source == "baseline",
                heights=[intact, *(column.perplexities[i] for column in columns)],
            )
            for i, one in enumerate(found.criteria)
        ],
        low=[intact, *(min(column.random) for column in columns)],
        mean=[intact, *(column.random_mean for column in columns)],
        high=[intact, *(max(column.random) for column in columns)],
        y_label=f"perplexity, {perplexity_source(found.intact)}",
    )


def curves(results: ComparisonResults) -> Context:
    """The plot of all criteria."""
    found = results.comparison
    intact = found.intact.perplexity
    plot = criteria_plot(found)
    return {
        "wide": plot.svg("wide"),
        "narrow": plot.svg("narrow"),
        "log": plot.is_log,
        "draws": len(found.random),
        "intact": number(intact),
        "source": perplexity_source(found.intact),
        "segments": segments_phrase(found.intact),
        "calibration": calibration_phrase(results.calibration) if results.calibration else None,
    }


def table(results: ComparisonResults) -> Context:
    """Every perplexity behind the plot."""
    found = results.comparison
    columns = standings(found)
    return {
        "columns": _headings(found, columns),
        "rows": [
            {"name": one.criterion, "cells": [_cell(one, i, column) for column in columns]}
            for i, one in enumerate(found.criteria)
        ],
        "mean": [number(column.random_mean) for column in columns],
        "range": [f"{number(min(c.random))} – {number(max(c.random))}" for c in columns],
        "draws": len(found.random),
        "beat_mean": [f"{c.beat_mean} of {len(found.criteria)}" for c in columns],
        "beat_all": [f"{c.beat_all} of {len(found.criteria)}" for c in columns],
        "left_out": [(percent(left.ratio), left.reason) for left in found.left_out],
    }


def _cell(one: Contender, i: int, column: Standing) -> tuple[str, str]:
    """A perplexity, and how it stands: best, or no better than chance."""
    value = column.perplexities[i]
    if one.criterion in column.best:
        return number(value), "best"
    return number(value), "" if value < column.random_mean else "worse"


def _headings(found: Comparison, columns: Sequence[Standing]) -> list[tuple[str, str]]:
    return [(column.name, f"{column.blocks} of {found.model.blocks}") for column in columns]


def sets(results: ComparisonResults) -> Context:
    """Which blocks each criterion removes."""
    found = results.comparison
    return {
        "columns": _headings(found, standings(found)),
        "rows": [
            (one.criterion, [spans(removed.order) for removed in one.sets])
            for one in found.criteria
        ],
        "protected": spans(found.protected) if found.protected else NONE,
        "count": counted(found.model.blocks, "block"),
    }


def spans(blocks: Sequence[int]) -> str:
    """Block numbers with runs of three or more as spans: '2, 3, 7–10'."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(
        f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


SECTIONS: tuple[tuple[str, str, Callable[[ComparisonResults], Context | None]], ...] = (
    ("curves", "What is left when blocks go", curves),
    ("standings", "Perplexity at each budget", table),
    ("sets", "What each criterion removes", sets),
    ("protocol", "How this was measured", describe_comparison),
)
"""Name of the partial (also the anchor in the page), heading, and what the partial shows."""
