"""The page of several runs, and what it shares with other pages of several models.

Only comparable measurements share a column or a plot: perplexities of the same tokens, latencies of
the same batch size and length. Speed-ups are relative to the original of the same run, since runs
are measured at different times.

    shortllm compare runs/ppl runs/taylor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from shortllm import __version__
from shortllm.benchmark.options import Benchmark, Measurement
from shortllm.evaluation.options import EvaluatedModel
from shortllm.format import counted, number, percent, short_bytes, short_count
from shortllm.quantizing.options import QUANTIZED
from shortllm.records import Record
from shortllm.reporting import parts, protocol
from shortllm.reporting.load import Protocol, RunResults, protocol_of
from shortllm.reporting.parts import Cell, Column, Page, Paragraph, Part, Section, Table
from shortllm.reporting.plots.points import Kind, Point, TradePlot, front
from shortllm.run_directory import PRUNED

BenchmarkCell = tuple[int, int]
"""Batch size and new tokens."""


class ComparedModel(Record):
    """One model of one run; an original that several runs share is listed once."""

    run: str | None = Field(description="name of the run; null for an original")
    name: str
    original: str
    criterion: str | None
    healed_by: str | None = None
    quantized_by: str | None = None
    blocks: int
    parameters: int
    bytes: int
    perplexity: dict[str, float] = Field(description="by text")
    zeroshot_mean: float | None = None
    latency_s: float | None = Field(default=None, description="median, of one cell of the sweep")
    speedup: float | None = Field(default=None, description="over the original, in the same run")
    removed: list[int] = Field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """How it was changed."""
        if self.run is None:
            return "original"
        if self.quantized_by is not None:
            return "quantized"
        return "pruned" if self.healed_by is None else "retrained"

    @property
    def relative_latency(self) -> float | None:
        """Latency over that of the original, in the same run."""
        return None if self.speedup is None else 1 / self.speedup

    @property
    def full_name(self) -> str:
        """Its run and its name; of an original the model's name."""
        return self.original if self.run is None else f"{self.run}: {self.name}"


def compared_model(
    entry: EvaluatedModel,
    labels: Mapping[Protocol, str],
    benchmark: Benchmark | None,
    measured: Measurement | None,
    **fields: object,
) -> ComparedModel:
    """A model with its size, quality and speed; `fields` say what it is."""
    size = entry.model.model_dump(include={"blocks", "parameters", "bytes"})
    found = {
        "perplexity": {labels[protocol_of(one)]: one.perplexity for one in entry.perplexity},
        "zeroshot_mean": entry.zeroshot_mean,
        "latency_s": measured.latency_median_s if measured else None,
        "speedup": benchmark.speedup(measured) if benchmark and measured else None,
    }
    return ComparedModel.model_validate(size | found | fields)


def common_cell(*benchmarks: Benchmark | None) -> BenchmarkCell | None:
    """The smallest batch size and length that most benchmarks have measured."""
    cells: list[BenchmarkCell] = []
    for one in benchmarks:
        measured = one.measurements if one else ()
        cells += {(each.batch, each.new_tokens) for each in measured if each.status == "ok"}
    return max(cells, key=lambda cell: (cells.count(cell), -cell[0], -cell[1]), default=None)


def cell_phrase(cell: BenchmarkCell) -> str:
    """'batch 1, 128 new tokens'."""
    return f"batch {cell[0]}, {counted(cell[1], 'new token')}"


# ---- the table of models


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A row of the table of models: a model, and the same model after healing."""

    name: Cell
    model: ComparedModel
    healed: ComparedModel | None = None
    deviation: str = ""
    """How far the number of parameters is from the requested one."""
    peak_bytes: int | None = None


def _before_after(before: str, after: str | None) -> Cell:
    """'18.2 → 13.1', or the one value."""
    return Cell(before, look="after") if after is None else Cell(after, "", f"{before} → ", "after")


def _perplexity(text: str) -> Column[ModelRow]:
    def show(one: ModelRow) -> Cell:
        after = number(one.healed.perplexity.get(text)) if one.healed else None
        return _before_after(number(one.model.perplexity.get(text)), after)

    return f"perplexity, {text}", show


def _score(one: ModelRow) -> Cell:
    after = percent(one.healed.zeroshot_mean) if one.healed else None
    return _before_after(percent(one.model.zeroshot_mean), after)


COLUMNS: dict[str, Column[ModelRow]] = {
    "blocks": ("blocks", lambda one: str(one.model.blocks)),
    "parameters": ("parameters", lambda one: short_count(one.model.parameters)),
    "exact": ("parameters", lambda one: Cell(f"{one.model.parameters:,}", one.deviation)),
    "bytes": ("bytes", lambda one: short_bytes(one.model.bytes)),
    "tasks": ("mean of tasks", _score),
    "latency": ("median latency [s]", lambda one: number(one.model.latency_s, 3)),
    "speedup": ("speed-up", lambda one: Cell(number(one.model.speedup, 3), look="after")),
    "memory": ("peak memory", lambda one: short_bytes(one.peak_bytes)),
}
"""The columns that are not about one text."""


def models_table(rows: Sequence[ModelRow], columns: Sequence[str]) -> Table:
    """The table of models with these columns; `perplexity` becomes one for each text.

    Columns of what was not measured for any model are left out.
    """
    models = [model for one in rows for model in (one.model, one.healed) if model]
    texts = dict.fromkeys(text for one in models for text in one.perplexity)
    missing = set()
    if all(one.zeroshot_mean is None for one in models):
        missing.add("tasks")
    if all(one.latency_s is None for one in models):
        missing |= {"latency", "speedup"}
    shown: list[Column[ModelRow]] = [("model", lambda one: one.name)]
    for name in columns:
        if name == "perplexity":
            shown += map(_perplexity, texts)
        elif name not in missing:
            shown.append(COLUMNS[name])
    return parts.table_of(rows, shown)


# ---- trade-off


def main_text(models: Sequence[ComparedModel]) -> str | None:
    """The text that most models were measured on; None where no two models share one."""
    texts = [text for one in models for text in one.perplexity]
    best = max(dict.fromkeys(texts), key=texts.count, default=None)
    return best if best is not None and texts.count(best) > 1 else None


def _points(
    models: Sequence[ComparedModel], x: str, text: str | None, scale: float = 1.0
) -> list[Point]:
    """A point for each model that has both: `x`, and perplexity on a text or else task scores."""
    points = []
    for place, one in enumerate(models, start=1):
        across: float | None = getattr(one, x)
        up = one.zeroshot_mean and 100 * one.zeroshot_mean
        if text is not None:
            up = one.perplexity.get(text)
        if across is not None and up is not None:
            points.append(Point(number=place, group=one.run, kind=one.kind, x=scale * across, y=up))
    return points


def trade_plots(
    models: Sequence[ComparedModel], cell: BenchmarkCell | None, *, of_runs: bool = True
) -> dict[str, TradePlot]:
    """Every plot of quality against cost that has two models, by name.

    `cell` is the batch size and length of the latencies. Models of runs differ in size, and their
    points have the numbers of a table's rows.
    """
    axes = [("parameters", "parameters [millions]", 1e-6)] if of_runs else []
    if any(one.quantized_by for one in models):
        axes.append(("bytes", "bytes on disk [MB]", 1e-6))
    if cell is not None and len({one.original for one in models}) == 1:
        label = f"latency relative to the original ({cell_phrase(cell)})"
        axes.append(("relative_latency", label, 1.0))
    elif cell is not None:
        axes.append(("latency_s", f"latency [s] ({cell_phrase(cell)})", 1.0))
    text = main_text(models)
    qualities = [(text, "perplexity", f"perplexity, {text}")] if text is not None else []
    plots = {}
    for of_text, quality, y_label in [*qualities, (None, "tasks", "mean task score [%]")]:
        for x, x_label, scale in axes:
            points = _points(models, x, of_text, scale)
            if len(points) > 1:
                name = f"{quality}-{x.removeprefix('relative_').removesuffix('_s')}"
                plots[name] = TradePlot(
                    points=points, x_label=x_label, y_label=y_label, numbered=of_runs,
                    higher_is_better=quality == "tasks",
                )  # fmt: skip
    return plots


def trade_section(heading: str, plots: Mapping[str, TradePlot], note: str = "") -> list[Section]:
    """The plots with a note; no section without plots."""
    note += (
        "Open marks are neither retrained nor quantized. The dashed line connects the models that "
        "no other model beats in both. A retrained model is as fast as the shortened model it "
        "started from."
    )
    found: list[Part] = [plot.figure() for plot in plots.values()]
    return [Section("trade", heading, [*found, Paragraph(note)])] if found else []


# ---- several runs


def compared_models(runs: Mapping[str, RunResults]) -> list[ComparedModel]:
    """Every model of every run: the originals first, then run by run."""
    labels = _protocol_labels(runs)
    cell = common_cell(*(run.benchmark for run in runs.values()))
    originals: dict[str, ComparedModel] = {}
    models = []
    for run, results in runs.items():
        for name, entry in results.evaluated.items():
            one = _of_run(run, results, name, entry, labels, cell)
            if one.run is None:
                known = originals.get(entry.model.fingerprint, one)
                originals[entry.model.fingerprint] = _merged(known, one)
            else:
                models.append(one)
    return [*originals.values(), *models]


def _merged(known: ComparedModel, other: ComparedModel) -> ComparedModel:
    """An original of two runs, which may have measured it on different texts."""
    latency = known.latency_s if known.latency_s is not None else other.latency_s
    return known.model_copy(
        update={
            "perplexity": other.perplexity | known.perplexity,
            "zeroshot_mean": known.zeroshot_mean or other.zeroshot_mean,
            "latency_s": latency,
            "speedup": 1.0 if latency is not None else None,
        }
    )


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


def _of_run(
    run: str,
    results: RunResults,
    name: str,
    entry: EvaluatedModel,
    labels: Mapping[Protocol, str],
    cell: BenchmarkCell | None,
) -> ComparedModel:
    benchmark, quantization = results.benchmark, results.quantization
    measured = None
    if benchmark is not None and cell is not None:
        measured = benchmark.find(name, *cell)
        if measured is None and name in results.healed_by:  # same shape as the shortened model
            measured = benchmark.find(PRUNED, *cell)
    is_original, unhealed = name == "original", name in ("original", PRUNED, QUANTIZED)
    return compared_model(
        entry,
        labels,
        benchmark,
        measured,
        run=None if is_original else run,
        name=name,
        original=protocol.model_name(results.plan.model.id),
        criterion=None if is_original else results.plan.criterion,
        healed_by=results.healed_by.get(name) or (None if unhealed else name),
        quantized_by=quantization.method if quantization and name == QUANTIZED else None,
        removed=[] if is_original else results.plan.removed,
    )


def runs_table(models: Sequence[ComparedModel]) -> Table:
    """A numbered row for each model of several runs."""
    rows = [
        ModelRow(name=Cell(one.full_name, lead=f"{place} "), model=one)
        for place, one in enumerate(models, start=1)
    ]
    columns = ("blocks", "parameters", "bytes", "perplexity", "tasks", "latency", "speedup")
    return models_table(rows, columns)


def runs_page(runs: Mapping[str, RunResults], models: Sequence[ComparedModel]) -> Page:
    """Every model of each run: quality against size and latency, table, removed blocks."""
    originals = list(dict.fromkeys(one.original for one in models))
    note = (
        "A column contains only comparable measurements. Speed-ups are relative to the original in "
        "the same run; latencies of different runs were measured at different times."
    )
    plots = trade_plots(models, common_cell(*(run.benchmark for run in runs.values())))
    removed = [part for name, results in runs.items() for part in _removed_by(name, results)]
    return Page(
        name=originals[0] if len(originals) == 1 else counted(len(originals), "model"),
        title=f"{counted(len(models), 'model')} of {counted(len(runs), 'run')}",
        version=__version__,
        verdict=_runs_verdict(models),
        sections=[
            *trade_section("Quality against cost", plots, "Numbers are rows of the table below. "),
            Section("models", "All models", [runs_table(models), Paragraph(note)]),
            Section("removals", "Removed blocks", removed),
        ],
    )


def _runs_verdict(models: Sequence[ComparedModel]) -> str:
    """The models that none beats in both perplexity and size, on the most common text."""
    text = main_text(models)
    if text is None:
        return "No two models were measured on the same text, so their quality is not comparable."
    best = front(_points(models, "parameters", text), higher_is_better=False)
    named = [
        f"{one.full_name} ({number(one.perplexity[text])}, {short_count(one.parameters)})"
        for one in (models[point.number - 1] for point in best)
    ]
    return f"Best trade-offs of perplexity on {text} and number of parameters: {'; '.join(named)}."


def _removed_by(name: str, results: RunResults) -> list[Part]:
    """What a run removed, and how it healed."""
    plan = results.plan
    healed: list[str] = [results.healing.method] if results.healing else []
    healed += [f"{one.method}, {one.steps:,} steps" for one in results.retraining.values()]
    removed = f"removed: {', '.join(map(str, plan.removed))}" if plan.removed else "none removed"
    return [
        parts.Heading(name),
        parts.Strip(results.statuses, ends=False),
        Paragraph(
            f"{protocol.model_name(plan.model.id)}; {plan.criterion or 'blocks given by hand'}; "
            f"{removed}; {'healed by ' if healed else 'not healed'}{'; '.join(healed)}."
        ),
    ]
