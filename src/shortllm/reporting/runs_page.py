"""The page of several runs, and what it shares with other pages of several models.

Only comparable measurements share a column or a plot: perplexities of the same tokens, latencies of
the same batch size and length. Speed-ups are relative to the original of the same run, since runs
are measured at different times.

    shortllm compare runs/ppl runs/taylor
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from shortllm import __version__
from shortllm.benchmark.options import Benchmark
from shortllm.evaluation.options import Difference, EvaluatedModel, Perplexity, TaskPrompts
from shortllm.files import fingerprint
from shortllm.format import (
    counted,
    listed,
    model_name,
    number,
    percent,
    short_bytes,
    short_count,
    with_error,
)
from shortllm.quantizing.options import QUANTIZED
from shortllm.records import Record
from shortllm.reporting import parts, protocol
from shortllm.reporting.charts import Kind, Point, TradePlot
from shortllm.reporting.load import Protocol, RunResults, protocol_of, same_text
from shortllm.reporting.measurements import cell_phrase, errors_note
from shortllm.reporting.parts import Cell, Column, Page, Paragraph, Part, Section, Table
from shortllm.run_directory import HEALED, PRUNED
from shortllm.shown import Shown, data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

BenchmarkCell = tuple[int, int]
"""Batch size and new tokens."""


class ComparedModel(Record):
    """One model of one run; an original that several runs share is listed once."""

    run: str | None = Field(description="name of the run; null for an original")
    name: str
    original: str
    criterion: str | None
    healed_by: str | None = Field(default=None, description="without training, by this method")
    retrained_by: str | None = None
    quantized_by: str | None = None
    blocks: int
    parameters: int
    bytes: int
    perplexity: dict[str, float] = Field(description="by text")
    stderr: dict[str, float | None] = Field(
        default_factory=dict, description="standard error of the perplexity over segments, by text"
    )
    above_lowest: dict[str, Difference] = Field(
        default_factory=dict,
        description="from the shortened model with the lowest perplexity, by text; paired by "
        "segment",
    )
    zeroshot_mean: float | None = None
    latency_s: float | None = Field(default=None, description="median, of one cell of the sweep")
    speedup: float | None = Field(default=None, description="over the original, in the same run")
    removed: list[int] = Field(default_factory=list)
    front: dict[str, list[str]] = Field(
        default_factory=dict,
        description="the costs with which it is on the Pareto front, by quality: perplexity, tasks",
    )

    @property
    def kind(self) -> Kind:
        """How it was changed."""
        if self.run is None:
            return "original"
        if self.quantized_by is not None:
            return "quantized"
        if self.retrained_by is not None:
            return "retrained"
        return "pruned" if self.healed_by is None else "healed"

    @property
    def relative_latency(self) -> float | None:
        """Latency over that of the original, in the same run."""
        return None if self.speedup is None else 1 / self.speedup

    @property
    def full_name(self) -> str:
        """Its run and its name; of an original the model's name."""
        return self.original if self.run is None else f"{self.run}: {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ComparedRuns(Shown):
    """The models of several runs."""

    models: list[ComparedModel]
    page: Path
    plots: dict[str, TradePlot]
    """Quality against cost, by name."""

    def __str__(self) -> str:
        """'5 models of 2 runs'."""
        runs = len({one.run for one in self.models if one.run is not None})
        return f"{counted(len(self.models), 'model')} of {counted(runs, 'run')}"

    def to_dataframe(self) -> DataFrame:
        """A row for each model.

        Columns: the fields of `ComparedModel` but those by text or quality; `kind`; for each text T
        `perplexity T`, its `stderr T`, and `above T`, the difference in nats per token from the
        shortened model with the lowest perplexity. What was not measured is none.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        by_text = ("perplexity", "stderr", "above_lowest", "front")
        return data_frame(
            {
                **one.model_dump(exclude={*by_text}),
                "kind": one.kind,
                **{f"perplexity {text}": value for text, value in one.perplexity.items()},
                **{f"stderr {text}": value for text, value in one.stderr.items()},
                **{f"above {text}": found.nll for text, found in one.above_lowest.items()},
            }
            for one in self.models
        )


def compared_model(
    entry: EvaluatedModel,
    labels: Mapping[Protocol, str],
    benchmark: Benchmark | None,
    cell: BenchmarkCell | None,
    timed_as: Sequence[str],
    **fields: object,
) -> ComparedModel:
    """A model with its size, quality, and speed in this cell; `fields` say what it is.

    The speed is that of the first of the names `timed_as`: neither healing nor retraining changes
    the shape.
    """
    found = [benchmark.find(name, *cell) for name in timed_as] if benchmark and cell else []
    measured = next(filter(None, found), None)
    return ComparedModel.model_validate({
        **entry.model.model_dump(include={"blocks", "parameters", "bytes"}),
        "perplexity": {labels[protocol_of(one)]: one.perplexity for one in entry.perplexity},
        "stderr": {labels[protocol_of(one)]: one.stderr for one in entry.perplexity},
        "zeroshot_mean": entry.zeroshot_mean,
        "latency_s": measured.latency_median_s if measured else None,
        "speedup": benchmark.speedup(measured) if benchmark and measured else None,
        **fields,
    })  # fmt: skip


def against_lowest(
    models: Sequence[tuple[ComparedModel, EvaluatedModel]], labels: Mapping[Protocol, str]
) -> list[ComparedModel]:
    """The models with their differences from the lowest perplexity of a shortened one."""
    by_text: dict[str, dict[int, Perplexity]] = {text: {} for text in labels.values()}
    for place, (one, entry) in enumerate(models):
        for measured in entry.perplexity if one.run is not None else ():
            by_text[labels[protocol_of(measured)]][place] = measured
    lowest = {
        text: min(found.values(), key=lambda one: one.nll)
        for text, found in by_text.items()
        if found
    }
    compared = []
    for place, (one, _) in enumerate(models):
        above = {
            text: found[place].difference_from(lowest[text])
            for text, found in by_text.items()
            if place in found and found[place] is not lowest[text]
        }
        known = {text: difference for text, difference in above.items() if difference}
        compared.append(one.model_copy(update={"above_lowest": known}))
    return compared


def common_cell(*benchmarks: Benchmark | None) -> BenchmarkCell | None:
    """The smallest batch size and length that most benchmarks have measured."""
    cells: list[BenchmarkCell] = []
    for one in benchmarks:
        measured = one.measurements if one else ()
        cells += {(each.batch, each.new_tokens) for each in measured if each.status == "ok"}
    return max(cells, key=lambda cell: (cells.count(cell), -cell[0], -cell[1]), default=None)


# ---- the table of models


class ModelRow(NamedTuple):
    """A row of the table of models: a model, and the same model healed or retrained."""

    name: Cell
    model: ComparedModel
    after: ComparedModel | None = None


def measured_columns(rows: Sequence[ModelRow]) -> list[Column[ModelRow]]:
    """Quality and speed; columns of what was not measured for any model are left out."""
    models = [model for one in rows for model in (one.model, one.after) if model]
    columns = [_perplexity(text) for text in dict.fromkeys(t for m in models for t in m.perplexity)]
    if any(one.zeroshot_mean is not None for one in models):
        columns.append(_quality("mean of tasks", lambda one: percent(one.zeroshot_mean)))
    if any(one.latency_s is not None for one in models):
        columns += [
            ("median latency [s]", lambda one: number(one.model.latency_s, 3)),
            ("speed-up", lambda one: Cell(number(one.model.speedup, 3), look="after")),
        ]
    return columns


def _perplexity(text: str) -> Column[ModelRow]:
    def show(one: ComparedModel) -> str:
        return with_error(one.perplexity.get(text), one.stderr.get(text))

    def cell(row: ModelRow) -> Cell:
        above = (row.after or row.model).above_lowest.get(text)
        return replace(_before_and_after(row, show), detail=str(above or ""))

    return f"perplexity, {text}", cell


def _quality(heading: str, show: Callable[[ComparedModel], str]) -> Column[ModelRow]:
    return heading, lambda row: _before_and_after(row, show)


def _before_and_after(row: ModelRow, show: Callable[[ComparedModel], str]) -> Cell:
    """'18.2 → 13.1', or one value where there is no model after it."""
    if row.after is None:
        return Cell(show(row.model), look="after")
    return Cell(show(row.after), "", f"{show(row.model)} → ", "after")


# ---- trade-off


def main_text(models: Sequence[ComparedModel]) -> str | None:
    """The text that most models were measured on; None where no two models share one."""
    texts = [text for one in models for text in one.perplexity]
    best = max(dict.fromkeys(texts), key=texts.count, default=None)
    return best if best is not None and texts.count(best) > 1 else None


def _points(
    models: Sequence[ComparedModel],
    x: str,
    text: str | None,
    scale: float = 1.0,
    others: Collection[str] = (),
) -> tuple[list[Point], dict[str, list[str]]]:
    """A point for each model that has both: `x`, and perplexity on a text or else task scores; and
    the names of the others by what they lack.

    Args:
        others: names of the same text cut into other segments, for models not measured on `text`.
    """
    points: list[Point] = []
    missing: dict[str, list[str]] = {}
    no_quality = f"not measured on {text}" if text else "no comparable task scores"
    no_cost = "no comparable latency"  # sizes are always known
    for place, one in enumerate(models, start=1):
        own = next((name for name in (text, *others) if name in one.perplexity), None)
        across: float | None = getattr(one, x)
        mean = one.zeroshot_mean and 100 * one.zeroshot_mean
        up, error = (mean, None) if text is None else (None, None)
        if own is not None:
            up, error = one.perplexity[own], one.stderr.get(own)
        if across is not None and up is not None:
            point = Point(
                number=place, name=one.name, group=one.run, kind=one.kind, x=scale * across, y=up,
                error=error, rough=own != text,
            )  # fmt: skip
            points.append(point)
        else:
            missing.setdefault(no_quality if up is None else no_cost, []).append(one.full_name)
    return points, missing


def trade_plots(
    models: Sequence[ComparedModel],
    cell: BenchmarkCell | None,
    *,
    of_runs: bool = True,
    others: Collection[str] = (),
) -> dict[str, TradePlot]:
    """Every plot of quality against cost that has two models, by name.

    `cell` is the batch size and length of the latencies. Models of runs differ in size, and their
    points have the numbers of a table's rows. `others` are names of the main text cut into other
    segments.
    """
    axes = [("parameters", "parameters [millions]", 1e-6)] if of_runs else []
    if any(one.quantized_by for one in models):
        axes.append(("bytes", "bytes on disk [MB]", 1e-6))
    if cell is not None and len({one.original for one in models}) == 1:
        label = f"latency relative to the original ({cell_phrase(*cell)})"
        axes.append(("relative_latency", label, 1.0))
    elif cell is not None:
        axes.append(("latency_s", f"latency [s] ({cell_phrase(*cell)})", 1.0))
    text = main_text(models)
    qualities = [(text, "perplexity", f"perplexity, {text}")] if text is not None else []
    plots = {}
    for of_text, quality, y_label in [*qualities, (None, "tasks", "mean task score [%]")]:
        for x, x_label, scale in axes:
            points, missing = _points(models, x, of_text, scale, others if of_text else ())
            if len(points) > 1:
                name = f"{quality}-{x.removeprefix('relative_').removesuffix('_s')}"
                plots[name] = TradePlot(
                    points=points, x_label=x_label, y_label=y_label, numbered=of_runs,
                    higher_is_better=quality == "tasks", missing=missing,
                )  # fmt: skip
    return plots


def with_fronts(
    models: Sequence[ComparedModel], plots: Mapping[str, TradePlot]
) -> list[ComparedModel]:
    """The models with the plots on whose Pareto front they are."""
    fronts: list[dict[str, list[str]]] = [{} for _ in models]
    for name, plot in plots.items():
        quality, cost = name.split("-")
        for point in plot.front:
            fronts[point.number - 1].setdefault(quality, []).append(cost)
    return [
        one.model_copy(update={"front": front}) for one, front in zip(models, fronts, strict=True)
    ]


def trade_section(
    heading: str, plots: Mapping[str, TradePlot], note: str = "", warning: str = ""
) -> list[Section]:
    """The plots with a note, and a warning before them; no section without plots."""
    note += (
        "Bars are one standard error. Open marks are neither healed, retrained nor quantized. The "
        "dashed line is the Pareto front: no other model is at least as good at a lower cost, or "
        "better at the same cost. A healed or retrained model is as fast as the shortened model it "
        "started from."
    )
    found: list[Part] = [Paragraph(warning, "")] if warning else []
    for plot in plots.values():
        caption = f"On the Pareto front: {plot.best}."
        reasons = [f"{listed(names)} ({reason})" for reason, names in plot.missing.items()]
        if reasons:
            caption += f" Not in this plot: {'; '.join(reasons)}."
        found.append(plot.figure(caption))
    return [Section("trade", heading, [*found, Paragraph(note)])] if plots else []


# ---- several runs


def compared_models(runs: Mapping[str, RunResults]) -> list[ComparedModel]:
    """Every model of every run: the originals first, then run by run."""
    labels = _protocol_labels(runs)
    cell = common_cell(*(run.benchmark for run in runs.values()))
    originals: dict[str, ComparedModel] = {}
    models: list[tuple[ComparedModel, EvaluatedModel]] = []
    asked = {run: _tasks_asked(results) for run, results in runs.items()}
    counts = Counter(filter(None, asked.values()))
    usual = counts.most_common(1)[0][0] if counts else None
    for run, results in runs.items():
        recovered_by, quantization = results.recovered_by, results.quantization
        for name, entry in results.evaluated.items():
            is_original, is_healed = name == "original", name == HEALED
            others = ("original", PRUNED, QUANTIZED)
            way = None if name in others else recovered_by.get(name, name)
            one = compared_model(
                entry,
                labels,
                results.benchmark,
                cell,
                timed_as=[name, PRUNED] if name in recovered_by else [name],
                run=None if is_original else run,
                name=name,
                original=model_name(results.plan.model.id),
                criterion=None if is_original else results.plan.criterion,
                healed_by=way if is_healed else None,
                retrained_by=None if is_healed else way,
                quantized_by=quantization.method if quantization and name == QUANTIZED else None,
                removed=[] if is_original else results.plan.removed,
                zeroshot_mean=entry.zeroshot_mean if asked[run] == usual else None,
            )
            if is_original:
                known = originals.get(entry.model.fingerprint, one)
                originals[entry.model.fingerprint] = _merged(known, one)
            else:
                models.append((one, entry))
    found = [*originals.values(), *against_lowest(models, labels)]
    return with_fronts(found, runs_plots(runs, found))


def runs_plots(
    runs: Mapping[str, RunResults], models: Sequence[ComparedModel]
) -> dict[str, TradePlot]:
    """Quality against cost of the models of several runs."""
    others, _ = _other_segments(runs, main_text(models))
    cell = common_cell(*(run.benchmark for run in runs.values()))
    return trade_plots(models, cell, others=others)


def _tasks_asked(results: RunResults) -> str | None:
    """What a mean over tasks is of: means of the same documents, asked alike, are comparable."""
    found = results.evaluation
    if found is None or not found.models[0].zeroshot:
        return None
    same = ("task", "metric", "documents_fingerprint", "shots")
    tasks = [[getattr(one, name) for name in same] for one in found.models[0].zeroshot]
    return fingerprint([tasks, (found.task_prompts or TaskPrompts()).model_dump()])


def _merged(known: ComparedModel, other: ComparedModel) -> ComparedModel:
    """An original of two runs, which may have measured it on different texts."""
    found = {
        "perplexity": other.perplexity | known.perplexity,
        "stderr": other.stderr | known.stderr,
        "zeroshot_mean": known.zeroshot_mean or other.zeroshot_mean,
        "latency_s": known.latency_s or other.latency_s,
        "speedup": known.speedup or other.speedup,
    }
    return known.model_copy(update=found)


def _protocol_labels(runs: Mapping[str, RunResults]) -> dict[Protocol, str]:
    """A label for each protocol; equal names of different protocols get more detail."""
    examples = {key: one for run in runs.values() for key, one in run.protocols().items()}
    names = [protocol.perplexity_source(one) for one in examples.values()]
    labels: dict[Protocol, str] = {}
    for (key, one), name in zip(examples.items(), names, strict=True):
        if names.count(name) > 1:
            name = f"{name}, {protocol.segments_phrase(one)}, BOS {one.bos}"
        same = sum(label == name for label in labels.values())
        labels[key] = f"{name} ({same + 1})" if same else name
    return labels


def runs_table(models: Sequence[ComparedModel]) -> Table:
    """A numbered row for each model of several runs."""
    rows = [
        ModelRow(Cell(one.full_name, lead=f"{place} "), one)
        for place, one in enumerate(models, start=1)
    ]
    columns: list[Column[ModelRow]] = [
        ("model", lambda one: one.name),
        ("blocks", lambda one: str(one.model.blocks)),
        ("parameters", lambda one: short_count(one.model.parameters)),
        ("bytes", lambda one: short_bytes(one.model.bytes)),
    ]
    for quality in dict.fromkeys(quality for one in models for quality in one.front):
        columns.append((Cell("Pareto front", f"of {quality} and"), partial(_front, quality)))
    return parts.table_of(rows, columns + measured_columns(rows))


def _front(quality: str, row: ModelRow) -> Cell:
    return Cell(", ".join(row.model.front.get(quality, ())), look="words")


def runs_page(runs: Mapping[str, RunResults], models: Sequence[ComparedModel]) -> Page:
    """Every model of each run: quality against size and latency, table, removed blocks."""
    originals = list(dict.fromkeys(one.original for one in models))
    errors = errors_note(one for run in runs.values() for one in run.protocols().values())
    note = (
        "A column contains only comparable measurements. Below a perplexity: how much it is above "
        "the lowest of a shortened model. Speed-ups are relative to the original in the same run; "
        "latencies of different runs were measured at different times."
    )
    shown = [runs_table(models), Paragraph(note), *([Paragraph(errors)] if errors else [])]
    _, differing = _other_segments(runs, main_text(models))
    plots = runs_plots(runs, models)
    removed = [part for name, results in runs.items() for part in _removed_by(name, results)]
    return Page(
        name=originals[0] if len(originals) == 1 else counted(len(originals), "model"),
        title=f"{counted(len(models), 'model')} of {counted(len(runs), 'run')}",
        version=__version__,
        verdict=_runs_verdict(models),
        sections=[
            *trade_section(
                "Quality against cost", plots, "Numbers are rows of the table below. ", differing
            ),
            Section("models", "All models", shown),
            Section("removals", "Removed blocks", removed),
        ],
    )


def _other_segments(runs: Mapping[str, RunResults], text: str | None) -> tuple[list[str], str]:
    """Names of a text where it was cut into other segments, and a sentence that says so."""
    labels = _protocol_labels(runs)
    own = next((key for key, label in labels.items() if label == text), None)
    measured: dict[str, list[str]] = {}
    for name, run in runs.items():
        for key in run.protocols():
            if own is not None and same_text(key, own):
                measured.setdefault(labels[key], []).append(name)
    others = [label for label in measured if label != text]
    if not others:
        return [], ""
    said = "; ".join(f"{listed(names)} on {label}" for label, names in measured.items())
    return others, (
        f"Runs were measured on different segments: {said}. Perplexities of different segments "
        "compare only roughly: marks with a ring are of other segments than most, and are not part "
        "of the Pareto front."
    )


def _runs_verdict(models: Sequence[ComparedModel]) -> str:
    """The Pareto front of perplexity on the most common text and size."""
    text = main_text(models)
    if text is None:
        return "No two models were measured on the same text, so their quality is not comparable."
    named = [
        f"{one.full_name} ({number(one.perplexity[text])}, {short_count(one.parameters)})"
        for one in sorted(models, key=lambda one: one.parameters)
        if "parameters" in one.front.get("perplexity", ())
    ]
    return f"Pareto front of perplexity on {text} and number of parameters: {'; '.join(named)}."


def _removed_by(name: str, results: RunResults) -> list[Part]:
    plan = results.plan
    after = [f"healed by {results.healing.method}"] if results.healing else []
    after += [
        f"retrained by {one.method}, {one.steps:,} steps" for one in results.retraining.values()
    ]
    removed = f"removed: {', '.join(map(str, plan.removed))}" if plan.removed else "none removed"
    return [
        parts.Heading(name),
        parts.Strip(results.statuses, ends=False),
        Paragraph(
            f"{model_name(plan.model.id)}; {plan.criterion or 'blocks given by hand'}; "
            f"{removed}; {'; '.join(after) or 'neither healed nor retrained'}."
        ),
    ]
