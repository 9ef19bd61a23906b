"""What the pages of several models share: one table of models, and quality against cost.

Only comparable measurements share a column or a plot: perplexities of the same tokens, latencies of
the same batch size and length. Speed-ups are relative to the original of the same run, since runs
are measured at different times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from shortllm.benchmark.options import Benchmark, Measurement
from shortllm.evaluation.options import EvaluatedModel
from shortllm.format import counted, number, percent, short_bytes, short_count
from shortllm.records import Record
from shortllm.reporting.load import Protocol, protocol_of
from shortllm.reporting.parts import Cell, Column, Paragraph, Part, Section, Table, table_of
from shortllm.reporting.plots.points import Kind, Point, TradePlot

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
    def zeroshot_percent(self) -> float | None:
        """Mean task score in percent."""
        return None if self.zeroshot_mean is None else 100 * self.zeroshot_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A row of the table of models: a model, and the same model after healing."""

    name: Cell
    model: ComparedModel
    healed: ComparedModel | None = None
    deviation: str = ""
    """How far the number of parameters is from the requested one."""
    peak_bytes: int | None = None


# ---- columns of the table of models


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
    "exact parameters": (
        "parameters",
        lambda one: Cell(f"{one.model.parameters:,}", one.deviation),
    ),
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
    texts = list(dict.fromkeys(text for one in models for text in one.perplexity))
    missing = {
        "tasks": all(one.zeroshot_mean is None for one in models),
        "latency": all(one.latency_s is None for one in models),
        "speedup": all(one.latency_s is None for one in models),
    }
    shown: list[Column[ModelRow]] = [("model", lambda one: one.name)]
    for name in columns:
        if name == "perplexity":
            shown += [_perplexity(text) for text in texts]
        elif not missing.get(name):
            shown.append(COLUMNS[name])
    return table_of(rows, shown)


def common_cell(*benchmarks: Benchmark | None) -> BenchmarkCell | None:
    """The smallest batch size and length that most benchmarks have measured."""
    cells: list[BenchmarkCell] = []
    for one in benchmarks:
        measured = one.measurements if one else ()
        cells += {(each.batch, each.new_tokens) for each in measured if each.status == "ok"}
    return max(cells, key=lambda cell: (cells.count(cell), -cell[0], -cell[1]), default=None)


def compared_model(
    entry: EvaluatedModel,
    labels: Mapping[Protocol, str],
    benchmark: Benchmark | None,
    measured: Measurement | None,
    **fields: object,
) -> ComparedModel:
    """A model with its size, quality and speed; `fields` say what it is."""
    return ComparedModel.model_validate(
        {
            "name": entry.name,
            "blocks": entry.model.blocks,
            "parameters": entry.model.parameters,
            "bytes": entry.model.bytes,
            "perplexity": {labels[protocol_of(one)]: one.perplexity for one in entry.perplexity},
            "zeroshot_mean": entry.zeroshot_mean,
            "latency_s": measured.latency_median_s if measured else None,
            "speedup": benchmark.speedup(measured) if benchmark and measured else None,
            **fields,
        }
    )


# ---- trade-off


def main_text(models: Sequence[ComparedModel]) -> str | None:
    """The text that most models were measured on; None where no two models share one."""
    texts = [text for one in models for text in one.perplexity]
    best = max(dict.fromkeys(texts), key=texts.count, default=None)
    return best if best is not None and texts.count(best) > 1 else None


def points_of(models: Sequence[ComparedModel], x: str, y: str, scale: float = 1.0) -> list[Point]:
    """A point for each model that has both; `y` is a text, or `zeroshot_percent`."""
    points = []
    for place, one in enumerate(models, start=1):
        across: float | None = getattr(one, x)
        up = one.zeroshot_percent if y == "zeroshot_percent" else one.perplexity.get(y)
        if across is not None and up is not None:
            points.append(Point(number=place, group=one.run, kind=one.kind, x=scale * across, y=up))
    return points


def trade_plots(
    models: Sequence[ComparedModel],
    cell: BenchmarkCell | None,
    *,
    size: bool = True,
    numbered: bool = True,
) -> dict[str, TradePlot]:
    """Every plot of quality against cost that has two models, by name.

    `cell` is the batch size and length of the latencies; `size` also plots the number of
    parameters; `numbered` points carry the numbers of a table's rows.
    """
    axes = [("parameters", "parameters [millions]", 1e-6)] if size else []
    if any(one.quantized_by for one in models):
        axes.append(("bytes", "bytes on disk [MB]", 1e-6))
    if cell is not None:
        how = f"batch {cell[0]}, {counted(cell[1], 'new token')}"
        if len({one.original for one in models}) == 1:
            axes.append(("relative_latency", f"latency relative to the original ({how})", 1.0))
        else:
            axes.append(("latency_s", f"latency [s] ({how})", 1.0))
    text = main_text(models)
    qualities = [(text, "perplexity", f"perplexity, {text}")] if text is not None else []
    qualities.append(("zeroshot_percent", "tasks", "mean task score [%]"))
    plots = {}
    for y, quality, y_label in qualities:
        for x, x_label, scale in axes:
            points = points_of(models, x, y, scale)
            if len(points) > 1:
                name = f"{quality}-{x.removeprefix('relative_').removesuffix('_s')}"
                plots[name] = TradePlot(
                    points=points,
                    x_label=x_label,
                    y_label=y_label,
                    higher_is_better=quality == "tasks",
                    numbered=numbered,
                )
    return plots


def trade_section(heading: str, plots: Mapping[str, TradePlot], note: str) -> list[Section]:
    """The plots with a note; no section without plots."""
    note += (
        " Open marks are neither retrained nor quantized. The dashed line connects the models that "
        "no other model beats in both. A retrained model is as fast as the shortened model it "
        "started from."
    )
    parts: list[Part] = [plot.figure() for plot in plots.values()]
    return [Section("trade", heading, [*parts, Paragraph(note.strip())])] if parts else []
