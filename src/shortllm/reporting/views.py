"""What results show in notebooks: tables and plots of the reports, by kind of result.

    scores            _repr_html_ ─► html     a line, the first plot, the tables
    scores.plot()                 ─► plotted  one of the plots, on axes of matplotlib

A new kind of result registers its tables with `tables_of`, and its plots with `plots_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING

from shortllm.benchmark.options import Benchmark
from shortllm.comparison.options import Comparison, UnitsComparison
from shortllm.drafting.options import Drafting
from shortllm.errors import ShortLLMError, did_you_mean
from shortllm.evaluation.options import Evaluation
from shortllm.format import NONE, change, counted, short_count, spans
from shortllm.pipeline import RunResult
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.reporting import parts
from shortllm.reporting.charts import BarPlot, DotPlot
from shortllm.reporting.comparison import criteria_plot, perplexity_table
from shortllm.reporting.draft_page import (
    acceptance_plot,
    gain_plot,
    measured_table,
    size_table,
)
from shortllm.reporting.measurements import (
    all_plots,
    benchmark_table,
    compared_row,
    drafted_table,
    errors_note,
    evaluation_table,
    perplexity_plot,
    task_table,
)
from shortllm.reporting.parts import Cell, Paragraph, Part, Table
from shortllm.reporting.plots import Plot
from shortllm.reporting.probe import probe_plot, probe_table, probed
from shortllm.reporting.run_page import LONG_TABLE, importance_plot, score_table
from shortllm.reporting.runs_page import ComparedRuns, runs_table
from shortllm.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def html(result: Shown) -> str:
    """What a notebook shows of a result."""
    from shortllm.reporting import templates

    images = [plot.image() for plot in list(plots_of(result).values())[:1]]
    shown: list[Part] = [Paragraph(str(result), ""), *images, *tables_of(result)]
    return templates().get_template("notebook.html.j2").render(shown=shown)


def plotted(result: Shown, name: str | None, axes: Axes | None) -> Axes:
    """Draw one of the plots of a result, by default the first."""
    plots = plots_of(result)
    if not plots:
        raise ShortLLMError(f"there is nothing to plot in {result!r}")
    if name is not None and name not in plots:
        raise ShortLLMError(f"unknown plot '{name}'.{did_you_mean(name, plots)}")
    return plots[name or next(iter(plots))].draw_on(axes)


# ---- by kind of result


@singledispatch
def plots_of(result: Shown) -> Mapping[str, Plot]:
    """The plots of a result by name, the most important one first."""
    return {}


@singledispatch
def tables_of(result: Shown) -> Sequence[Part]:
    """The tables of a result."""
    return []


@plots_of.register
def _(scores: BlockScores) -> Mapping[str, Plot]:
    return {"importance": importance_plot(scores, ["kept"] * scores.model.blocks)}


@tables_of.register
def _(scores: BlockScores) -> Sequence[Part]:
    return _folded(score_table(scores), "block", scores.model.blocks)


@plots_of.register
def _(plan: PrunePlan) -> Mapping[str, Plot]:
    sizes = plan.model.parameters_per_block
    if not sizes:
        return {}
    heights = [size / 1e6 for size in sizes]
    return {
        "parameters": BarPlot(
            heights=heights, statuses=plan.statuses, y_label="parameters [millions]"
        )
    }


@tables_of.register
def _(plan: PrunePlan) -> Sequence[Part]:
    before, after = plan.model.blocks, len(plan.kept)
    size = plan.model.parameters
    left = size - plan.reached.parameters
    rows = [
        compared_row(Cell("blocks"), [(str(before), ""), (str(after), change(before, after))]),
        compared_row(
            Cell("parameters"),
            [(short_count(size), ""), (short_count(left), change(size, left))],
        ),
        compared_row(Cell("removed"), [(NONE, NONE), (spans(plan.removed) or NONE, NONE)]),
        compared_row(Cell("protected"), [(NONE, NONE), (spans(plan.protected) or NONE, NONE)]),
    ]
    return [Table(parts.row("", "original", "shortened"), rows), Paragraph(plan.reason)]


@plots_of.register
def _(evaluation: Evaluation) -> Mapping[str, Plot]:
    plot = perplexity_plot(evaluation.models) if len(evaluation.models) > 1 else None
    plots: dict[str, Plot] = {"perplexity": plot} if plot else {}
    if probed(evaluation.models):
        plots["probe"] = probe_plot(evaluation.models)
    return plots


@tables_of.register
def _(evaluation: Evaluation) -> Sequence[Part]:
    note = errors_note(evaluation.models[0].perplexity)
    found: list[Part] = [evaluation_table(evaluation)]
    if evaluation.models[0].zeroshot:
        found.append(task_table(evaluation.models))
    if probed(evaluation.models):
        found.append(probe_table(evaluation.models))
    return [*found, *([Paragraph(note)] if note else [])]


@plots_of.register
def _(found: Benchmark) -> Mapping[str, Plot]:
    first = found.measurements[0]
    cell = [found.find(one.name, first.batch, first.new_tokens) for one in found.models]
    timed = {one.model: one.latency_median_s for one in cell if one and one.latency_median_s}
    plots: dict[str, Plot] = dict(all_plots(found))
    if len(timed) > 1:
        plots["latency"] = DotPlot(
            names=list(timed), values=list(timed.values()),
            colours=["protected", "removed", *["kept"] * len(timed)][: len(timed)],
            label=f"latency of {first.new_tokens} new tokens, batch {first.batch} [s]",
        )  # fmt: skip
    return plots


@tables_of.register
def _(found: Benchmark) -> Sequence[Part]:
    return [benchmark_table(found), *([drafted_table(found.drafted)] if found.drafted else [])]


@plots_of.register
def _(found: Comparison) -> Mapping[str, Plot]:
    return {"perplexity": criteria_plot(found)}


@tables_of.register
def _(found: Comparison) -> Sequence[Part]:
    return [perplexity_table(found), Paragraph(errors_note([found.intact]))]


@plots_of.register
def _(found: Drafting) -> Mapping[str, Plot]:
    if not found.measured:
        return {}
    return {"gain": gain_plot(found), "acceptance": acceptance_plot(found)}


@tables_of.register
def _(found: Drafting) -> Sequence[Part]:
    return [size_table(found), measured_table(found)] if found.measured else []


@tables_of.register
def _(found: UnitsComparison) -> Sequence[Part]:
    columns = ("unit", "parameters", "healed", "retrained")
    rows = [
        parts.row(
            one.name, one.unit, f"{one.parameters:,}", one.healed or NONE, one.retrained or NONE
        )
        for one in found.candidates
    ]
    return [Table(parts.row("method", *columns), rows)]


@plots_of.register
def _(found: ComparedRuns) -> Mapping[str, Plot]:
    return found.plots


@tables_of.register
def _(found: ComparedRuns) -> Sequence[Part]:
    return [runs_table(found.models), Paragraph(f"page: {found.page}")]


@plots_of.register
def _(run: RunResult) -> Mapping[str, Plot]:
    return {**plots_of(run.evaluation), **(plots_of(run.benchmark) if run.benchmark else {})}


@tables_of.register
def _(run: RunResult) -> Sequence[Part]:
    measured = tables_of(run.benchmark) if run.benchmark else []
    where = parts.Terms([(name, str(path)) for name, path in run.checkpoints.items()])
    return [*tables_of(run.evaluation), *measured, where, Paragraph(f"report: {run.report}")]


def _folded(table: Table, word: str, count: int) -> Sequence[Part]:
    """A table, folded where it is long."""
    return (
        [table] if count <= LONG_TABLE else [parts.Details(f"All {counted(count, word)}", [table])]
    )
