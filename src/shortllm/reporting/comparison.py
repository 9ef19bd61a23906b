"""The pages of the comparisons: criteria on one model, and width against depth at the same size.

shortllm compare-criteria embedded
shortllm compare-units embedded
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from shortllm import __version__
from shortllm.comparison.options import (
    Candidate,
    Comparison,
    Contender,
    Standing,
    UnitsComparison,
    standings,
    verdict,
)
from shortllm.format import (
    NONE,
    THIN,
    counted,
    listed,
    model_name,
    number,
    percent,
    short_count,
    signed,
    spans,
)
from shortllm.reporting import parts, protocol, runs_page
from shortllm.reporting.charts import Band, Line, LinePlot
from shortllm.reporting.load import ComparisonResults, UnitsResults, protocol_of
from shortllm.reporting.measurements import cell_phrase, errors_note, peak_memory, speed_section
from shortllm.reporting.parts import Cell, Column, Page, Paragraph, Row, Section, Table, row
from shortllm.reporting.plots import COLOURS, DASHES, line_style
from shortllm.reporting.runs_page import ComparedModel, ModelRow, common_cell

LOG_SPREAD = 4.0
"""Highest over lowest perplexity from which its axis is logarithmic."""


# ---- criteria


def criteria_page(results: ComparisonResults) -> Page:
    """What each criterion removes, and the perplexity that is left."""
    found = results.comparison
    count, blocks = len(found.criteria), counted(found.model.blocks, "block")
    return protocol.page_about(
        found.model,
        title=f"{count} {'criterion' if count == 1 else 'criteria'} compared on {blocks}",
        version=results.run.shortllm,
        verdict=verdict(found),
        sections=[
            _curves(results),
            _perplexities(found),
            _removed_sets(found),
            protocol.criteria_protocol(results),
        ],
    )


def criteria_plot(found: Comparison) -> LinePlot:
    """Perplexity against removed blocks: a line per criterion, a band of random removals."""
    columns = standings(found)
    intact, total = found.intact.perplexity, found.model.blocks
    places = [0, *(budget.blocks for budget in found.budgets)]

    def line(name: str, heights: Sequence[float], style: dict[str, object]) -> Line:
        points = list(zip(map(float, places), [intact, *heights], strict=True))
        return Line(name=name, points=points, style=style)

    muted = {"color": COLOURS["muted"]}
    style = {**muted, "linestyle": DASHES[3], "linewidth": 1.6, "zorder": 2}
    lines = [line("random, mean", [column.random_mean for column in columns], style)]
    coloured, baselines = itertools.count(), itertools.cycle([(1, "<"), (2, ">")])
    for i, one in enumerate(found.criteria):
        if one.source == "baseline":
            dashes, marker = next(baselines)
            style = {**muted, "linestyle": DASHES[dashes], "linewidth": 1.2, "markersize": 4.5}
            style["marker"] = marker
        else:
            style = {"zorder": 4, **line_style(next(coloured))}
        lines.append(line(one.name, [column.perplexities[i] for column in columns], style))
    return LinePlot(
        lines=lines,
        x_label=f"blocks removed, of {total}",
        y_label=f"perplexity, {protocol.perplexity_source(found.intact)}",
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
    found, plot = results.comparison, criteria_plot(results.comparison)
    scored = ""
    if results.calibration:
        scored = f"; blocks were scored on {protocol.calibration_phrase(results.calibration)}"
    caption = (
        "Perplexity of the shortened models without retraining; lower is better. All lines start "
        f"at the intact model, {number(found.intact.perplexity)}. The band is the range of "
        f"{counted(len(found.random), 'random removal')} of the same size. A criterion is useful "
        "where its line is below the band. Lines of criteria that remove the same blocks coincide. "
        f"Measured on {protocol.segments_phrase(found.intact)} from "
        f"{protocol.perplexity_source(found.intact)}{scored}."
        f"{' The axis is logarithmic.' if plot.is_log else ''}"
    )
    return Section("curves", "Perplexity against removed blocks", [plot.figure(caption)])


def perplexity_table(found: Comparison) -> Table:
    """Every perplexity behind the plot: a column per budget."""
    columns, total = standings(found), len(found.criteria)
    summaries: dict[str, Callable[[Standing], str]] = {
        f"random, mean of {len(found.random)}": lambda c: number(c.random_mean),
        "random, range": lambda c: f"{number(min(c.random))} – {number(max(c.random))}",
        "criteria below the random mean": lambda c: f"{c.beat_mean} of {total}",
        "criteria below every random removal": lambda c: f"{c.beat_all} of {total}",
    }
    rows = [
        row(one.name, *(_perplexity(one, *column) for column in enumerate(columns)))
        for one in found.criteria
    ]
    for name, show in summaries.items():
        look = "" if len(rows) > total else "floor"
        rows.append(row(name, *map(show, columns), look=look))
    return Table(_head(found), rows)


def _perplexity(one: Contender, place: int, column: Standing) -> Cell:
    """A perplexity, marked where none is clearly lower, or where it is not better than chance."""
    found = one.sets[place]
    value = math.inf if found.perplexity is None else found.perplexity
    look = "" if value < column.random_mean else "worse"
    is_best = one.name in column.best or (found.behind and not found.behind.is_clear)
    error = "" if found.stderr is None else f"± {number(found.stderr, 2)}"
    return Cell(number(value), error, look="best" if is_best else look)


def _head(found: Comparison) -> Row:
    cells = [Cell(one.name, f"{one.blocks} of {found.model.blocks}") for one in standings(found)]
    return row("criterion", *cells)


def _perplexities(found: Comparison) -> Section:
    note = (
        "Marked: the lowest of a column, and those that are not clearly above it (two standard "
        "errors of the difference, paired by segment). Grey italics: not below the random mean. "
        f"{errors_note([found.intact])}"
    ).rstrip()
    if found.left_out:
        reasons = [f"{percent(left.ratio)} ({left.reason})" for left in found.left_out]
        note += f" Left out: {listed(reasons)}."
    shown = [perplexity_table(found), Paragraph(note)]
    return Section("perplexities", "Perplexity at each budget", shown)


def _removed_sets(found: Comparison) -> Section:
    rows = [row(one.name, *(spans(each.order) for each in one.sets)) for one in found.criteria]
    note = (
        f"Of {counted(found.model.blocks, 'block')}, counted from 0; protected: "
        f"{spans(found.protected) or NONE}. The random removals are in comparison.json."
    )
    return Section("sets", "Removed blocks", [Table(_head(found), rows), Paragraph(note)])


# ---- width against depth


def units_models(results: UnitsResults) -> list[ComparedModel]:
    """The original, and each candidate as it is, healed and retrained."""
    benchmark, cell = results.benchmark, common_cell(results.benchmark)
    owners: dict[str, Candidate | None] = {"original": None}
    for one in results.units.candidates:
        names = (one.name, one.healed, one.retrained)
        owners |= {name: one for name in names if name in results.evaluated}
    models = []
    for name, candidate in owners.items():
        entry = results.evaluated[name]
        models.append(
            runs_page.compared_model(
                entry,
                {protocol_of(one): protocol.perplexity_source(one) for one in entry.perplexity},
                benchmark,
                cell,
                timed_as=[candidate.name if candidate else name],
                run=f"{candidate.name} ({candidate.unit})" if candidate else None,
                name=name,
                original=model_name(results.units.model.id),
                criterion=candidate.name if candidate else None,
                healed_by=name if candidate and name == candidate.healed else None,
                retrained_by=name if candidate and name == candidate.retrained else None,
            )
        )
    return models


def units_table(results: UnitsResults) -> Table:
    """A row per method and way to recover quality, before and after it."""
    models = {one.name: one for one in units_models(results)}
    candidates = {one.name: one for one in results.units.candidates}
    cell = common_cell(results.benchmark)

    def parameters(one: ModelRow) -> Cell:
        missed = candidates[one.model.name].missed if one.model.name in candidates else 0
        by = f"{signed(100 * missed, 2)}{THIN}%" if missed else ""
        return Cell(f"{one.model.parameters:,}", by)

    def memory(one: ModelRow) -> str:
        return peak_memory(results.benchmark.find(one.model.name, *cell) if cell else None)

    rows = [ModelRow(Cell("original"), models["original"])]
    for name, one in candidates.items():
        ways = {"healed": one.healed, "retrained": one.retrained}
        after = {way: models[made] for way, made in ways.items() if made in models}
        rows += [
            ModelRow(Cell(name, f"{one.unit}, {way}"), models[name], model)
            for way, model in after.items()
        ] or [ModelRow(Cell(name, one.unit), models[name])]
    columns: list[Column[ModelRow]] = [
        ("model", lambda one: one.name),
        ("parameters", parameters),
        *runs_page.measured_columns(rows),
        ("peak memory", memory),
    ]
    return parts.table_of(rows, columns)


def units_page(results: UnitsResults) -> Page:
    """Each method before and after healing and retraining: table, plots and protocol."""
    units, models, cell = results.units, units_models(results), common_cell(results.benchmark)
    note = (
        f"Speed and memory: {cell_phrase(*cell) if cell else 'not measured'}, alternating "
        "between the models. Below the parameters: deviation from the first method, because only "
        "whole units can be removed."
    )
    if units.retraining is not None:
        retraining = ", ".join(f"{k} {v}" for k, v in protocol.flattened(units.retraining))
        note = f"Retrained: all alike ({retraining}). {note}"
    if units.healing is not None:
        note = (
            "Healed: without training, depth by the requested method, width by refitting "
            f"its output projections. {note}"
        )
    plots = runs_page.trade_plots(models, cell, of_runs=False)
    before, after = units.model.parameters, units.candidates[0].parameters
    return protocol.page_about(
        units.model,
        title=f"{short_count(before)} → {short_count(after)} parameters, by width and by depth",
        version=__version__,
        verdict=_units_verdict(units, models),
        sections=[
            Section("units", "Width against depth", [units_table(results), Paragraph(note)]),
            *runs_page.trade_section("Quality against latency", plots),
            speed_section(results.benchmark),
            protocol.units_protocol(results),
        ],
    )


def _units_verdict(units: UnitsComparison, models: Sequence[ComparedModel]) -> str:
    shown = [one for one in models if one.run is not None]
    saved = percent(1 - units.candidates[0].parameters / units.model.parameters)
    sentence = f"With {saved} of the parameters removed"
    text = runs_page.main_text(models)
    if text is not None:
        best = min(shown, key=lambda one: one.perplexity.get(text, float("inf")))
        way = "" if best.kind == "pruned" else best.kind
        sentence += (
            f", {best.run}{f', {way},' if way else ''} has the lowest perplexity: "
            f"{number(best.perplexity.get(text))} on {text}"
        )
    timed = [one for one in shown if one.speedup is not None]
    if timed:
        fastest = max(timed, key=lambda one: one.speedup or 0.0)
        speed = number(fastest.speedup, 3)
        sentence += f". The fastest is {fastest.run}, {speed} times as fast as the original"
    return f"{sentence}."
