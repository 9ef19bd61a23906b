"""The page of a comparison of criteria: what each removes, and the perplexity that is left.

shortllm compare-criteria embedded
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shortllm.comparison.options import Comparison, Contender
from shortllm.comparison.ranking import Standing, standings, verdict
from shortllm.format import NONE, counted, listed, number, percent, spans
from shortllm.reporting.load import ComparisonResults
from shortllm.reporting.parts import Cell, Head, Paragraph, Row, Section, Table, row
from shortllm.reporting.plots import COLOURS, DASHES, line_style
from shortllm.reporting.plots.lines import Band, Line, LinePlot
from shortllm.reporting.protocol import (
    calibration_phrase,
    criteria_protocol,
    model_name,
    perplexity_source,
    segments_phrase,
)

LOG_SPREAD = 4.0
"""Highest over lowest perplexity from which its axis is logarithmic."""


def criteria_head(results: ComparisonResults) -> Head:
    """Title and verdict."""
    found = results.comparison
    count = len(found.criteria)
    return Head(
        name=model_name(found.model.id),
        revision=(found.model.revision or "")[:12],
        title=f"{count} {'criterion' if count == 1 else 'criteria'} compared on "
        f"{counted(found.model.blocks, 'block')}",
        version=results.run.shortllm,
        verdict=verdict(found),
    )


def criteria_sections(results: ComparisonResults) -> list[Section]:
    """Plot, perplexities, removed sets and protocol."""
    return [
        _curves(results),
        _perplexities(results),
        _removed_sets(results),
        criteria_protocol(results),
    ]


def criteria_plot(found: Comparison) -> LinePlot:
    """Perplexity against removed blocks: a line per criterion, a band of random removals."""
    columns = standings(found)
    intact, total = found.intact.perplexity, found.model.blocks
    places = [0, *(budget.blocks for budget in found.budgets)]

    def line(name: str, heights: Sequence[float], style: dict[str, object]) -> Line:
        points = list(zip(map(float, places), [intact, *heights], strict=True))
        return Line(name=name, points=points, style=style)

    lines = [
        line(
            "random, mean",
            [column.random_mean for column in columns],
            {"color": COLOURS["muted"], "linestyle": DASHES[3], "linewidth": 1.6, "zorder": 2},
        )
    ]
    coloured, baselines = 0, 0
    for i, one in enumerate(found.criteria):
        if one.source == "baseline":
            style = {
                "color": COLOURS["muted"], "linestyle": DASHES[1 + baselines % 2],
                "linewidth": 1.2, "marker": "<>"[baselines % 2], "markersize": 4.5,
            }  # fmt: skip
            baselines += 1
        else:
            style = {"zorder": 4, **line_style(coloured)}
            coloured += 1
        lines.append(line(one.criterion, [column.perplexities[i] for column in columns], style))
    return LinePlot(
        lines=lines,
        x_label=f"blocks removed, of {total}",
        y_label=f"perplexity, {perplexity_source(found.intact)}",
        ticks={n: f"{n}\n{100 * n / total:.0f} %" if n else "0" for n in places},
        log_spread=LOG_SPREAD,
        band=Band(
            name="random, range",
            places=places,
            low=[intact, *(min(column.random) for column in columns)],
            high=[intact, *(max(column.random) for column in columns)],
        ),
        listed_by_end=True,
    )


def _curves(results: ComparisonResults) -> Section:
    found = results.comparison
    plot = criteria_plot(found)
    scored = ""
    if results.calibration:
        scored = f"; blocks were scored on {calibration_phrase(results.calibration)}"
    caption = (
        "Perplexity of the shortened models without retraining; lower is better. All lines start "
        f"at the intact model, {number(found.intact.perplexity)}. The band is the range of "
        f"{counted(len(found.random), 'random removal')} of the same size. A criterion is useful "
        "where its line is below the band. Lines of criteria that remove the same blocks coincide. "
        f"Measured on {segments_phrase(found.intact)} from {perplexity_source(found.intact)}"
        f"{scored}.{' The axis is logarithmic.' if plot.is_log else ''}"
    )
    return Section("curves", "Perplexity against removed blocks", [plot.figure(caption)])


def _perplexities(results: ComparisonResults) -> Section:
    """Every perplexity behind the plot."""
    found = results.comparison
    columns, total = standings(found), len(found.criteria)

    def summary(name: str, show: Callable[[Standing], str], look: str = "") -> Row:
        return row(name, *(show(column) for column in columns), look=look)

    rows = [
        row(one.criterion, *(_perplexity(one, i, column) for column in columns))
        for i, one in enumerate(found.criteria)
    ]
    rows += [
        summary(
            f"random, mean of {len(found.random)}", lambda c: number(c.random_mean), look="floor"
        ),
        summary("random, range", lambda c: f"{number(min(c.random))} – {number(max(c.random))}"),
        summary("criteria below the random mean", lambda c: f"{c.beat_mean} of {total}"),
        summary("criteria below every random removal", lambda c: f"{c.beat_all} of {total}"),
    ]
    note = "Marked: the lowest of a column. Grey italics: not below the random mean."
    if found.left_out:
        reasons = [f"{percent(left.ratio)} ({left.reason})" for left in found.left_out]
        note += f" Left out: {listed(reasons)}."
    table = Table(_head(found, columns), rows)
    return Section("perplexities", "Perplexity at each budget", [table, Paragraph(note)])


def _perplexity(one: Contender, i: int, column: Standing) -> Cell:
    """A perplexity, marked where it is the best or not better than chance."""
    value = column.perplexities[i]
    if one.criterion in column.best:
        return Cell(number(value), look="best")
    return Cell(number(value), look="" if value < column.random_mean else "worse")


def _head(found: Comparison, columns: Sequence[Standing]) -> Row:
    """A column per budget."""
    total = found.model.blocks
    return row("criterion", *(Cell(one.name, f"{one.blocks} of {total}") for one in columns))


def _removed_sets(results: ComparisonResults) -> Section:
    """Which blocks each criterion removes."""
    found = results.comparison
    rows = [
        row(one.criterion, *(spans(removed.order) for removed in one.sets))
        for one in found.criteria
    ]
    protected = spans(found.protected) if found.protected else NONE
    note = (
        f"Of {counted(found.model.blocks, 'block')}, counted from 0; protected: {protected}. The "
        "random removals are in comparison.json."
    )
    table = Table(_head(found, standings(found)), rows)
    return Section("sets", "Removed blocks", [table, Paragraph(note)])
