"""Several runs on one page: every model of each, quality against size and against latency.

Only what was measured alike stands in one column: perplexities of the same tokens, tasks of the
same documents, latencies of one cell of the sweep. Speed-ups are against the original in the same
run, since runs are measured at different times.

    shortllm compare runs/ppl runs/taylor runs/half
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from shortllm import __version__
from shortllm.benchmark.options import Measurement
from shortllm.errors import ResultFileError
from shortllm.evaluation.options import EvaluatedModel, Perplexity
from shortllm.quantizing.options import QUANTIZED
from shortllm.records import Record
from shortllm.reporting.loading import RunResults, load_results
from shortllm.reporting.names import model_name
from shortllm.reporting.plots.pareto import Kind, ParetoPlot, Point, front
from shortllm.reporting.protocol import perplexity_source, segments_phrase
from shortllm.reporting.wording import NONE, counted, number, percent, short_bytes, short_count
from shortllm.run_directory import PRUNED

Context = dict[str, Any]
Key = tuple[object, ...]


class ComparedModel(Record):
    """One model of one run; an original that several runs share stands there once."""

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
        """What happened to it."""
        if self.run is None:
            return "original"
        if self.quantized_by is not None:
            return "quantized"
        return "pruned" if self.healed_by is None else "retrained"


def load_runs(directories: Sequence[Path]) -> dict[str, RunResults]:
    """The results of each run, by the shortest end of its path that no other has.

    Raises:
        ResultFileError: a directory that holds no finished run, or the same twice.
    """
    places = [Path(one).resolve() for one in directories]
    if len(set(places)) != len(places):
        raise ResultFileError("a run was given twice. Name each run directory once")
    if not places:
        raise ResultFileError("no run to compare. Give run directories, e.g. runs/a runs/b")
    runs = {}
    for place in places:
        results = load_results(place)
        if results.evaluation is None:
            raise ResultFileError(
                f"{place} holds no evaluation, so that there is nothing to compare. Finish it: the "
                "command that began it stands in its run.json"
            )
        runs[_name_among(place, places)] = results
    return runs


def _name_among(place: Path, places: Sequence[Path]) -> str:
    """As much of the end of a path as tells it from the others."""
    for depth in range(1, len(place.parts)):
        end = place.parts[-depth:]
        if sum(other.parts[-depth:] == end for other in places) == 1:
            return "/".join(end)
    return str(place)


def compared_models(runs: Mapping[str, RunResults]) -> list[ComparedModel]:
    """Every model of every run: the originals first, then run by run."""
    labels = protocol_labels(runs)
    cell = common_cell(runs)
    originals: dict[str, ComparedModel] = {}
    models = []
    for run, results in runs.items():
        for name, entry in results.evaluated.items():
            one = _compared(results, name, entry, labels, cell)
            if name != "original":
                models.append(one.model_copy(update={"run": run}))
                continue
            held = originals.get(entry.model.fingerprint)
            if held is not None:  # other runs may have measured it on other texts
                latency = held.latency_s if held.latency_s is not None else one.latency_s
                one = held.model_copy(
                    update={
                        "perplexity": one.perplexity | held.perplexity,
                        "zeroshot_mean": held.zeroshot_mean or one.zeroshot_mean,
                        "latency_s": latency,
                        "speedup": 1.0 if latency is not None else None,
                    }
                )
            originals[entry.model.fingerprint] = one
    return [*originals.values(), *models]


def protocol_labels(runs: Mapping[str, RunResults]) -> dict[Key, str]:
    """What each protocol is called; equal names of different protocols are told apart."""
    examples: dict[Key, Perplexity] = {}
    for results in runs.values():
        examples |= results.protocols()
    names = [perplexity_source(one) for one in examples.values()]
    labels: dict[Key, str] = {}
    for key, one in examples.items():
        name = perplexity_source(one)
        if names.count(name) > 1:
            name += f", {segments_phrase(one)}, BOS {one.bos}"
        same = sum(label == name for label in labels.values())
        labels[key] = f"{name} ({same + 1})" if same else name
    return labels


def common_cell(runs: Mapping[str, RunResults]) -> tuple[int, int] | None:
    """Batch size and new tokens of the smallest cell that most benchmarks have."""
    cells: list[tuple[int, int]] = []
    for results in runs.values():
        if results.benchmark is not None:
            measured = results.benchmark.measurements
            cells += {(one.batch, one.new_tokens) for one in measured if one.status == "ok"}
    return max(cells, key=lambda cell: (cells.count(cell), -cell[0], -cell[1]), default=None)


def _compared(
    results: RunResults,
    name: str,
    entry: EvaluatedModel,
    labels: Mapping[Key, str],
    cell: tuple[int, int] | None,
) -> ComparedModel:
    measured = _measured(results, name, cell)
    benchmark, method = results.benchmark, results.healed_by.get(name)
    is_original = name == "original"
    quantization = results.quantization
    unhealed = ("original", PRUNED, QUANTIZED)
    return ComparedModel(
        run=None,
        name=name,
        original=model_name(results.plan.model.id),
        criterion=None if is_original else results.plan.criterion,
        healed_by=method or (None if name in unhealed else name),
        quantized_by=quantization.method if quantization and name == QUANTIZED else None,
        blocks=entry.model.blocks,
        parameters=entry.model.parameters,
        bytes=entry.model.bytes,
        perplexity={labels[key]: one.perplexity for key, one in results.perplexities(name).items()},
        zeroshot_mean=entry.zeroshot_mean,
        latency_s=measured.latency_median_s if measured else None,
        speedup=benchmark.speedup(measured) if benchmark and measured else None,
        removed=[] if is_original else results.plan.removed,
    )


def _measured(results: RunResults, name: str, cell: tuple[int, int] | None) -> Measurement | None:
    """The speed of a model; that of a healed one is the shortened one's, which has its shape."""
    if results.benchmark is None or cell is None:
        return None
    own = results.benchmark.find(name, *cell)
    if own is None and name in results.healed_by:
        own = results.benchmark.find(PRUNED, *cell)
    return own


def head(runs: Mapping[str, RunResults], models: Sequence[ComparedModel]) -> Context:
    """Title and verdict."""
    originals = list(dict.fromkeys(one.original for one in models))
    return {
        "name": originals[0] if len(originals) == 1 else counted(len(originals), "model"),
        "revision": "",
        "runs": len(runs),
        "models": len(models),
        "version": __version__,
        "verdict": verdict(models),
    }


def verdict(models: Sequence[ComparedModel]) -> str:
    """Which shortened models none beats in both perplexity and size, on the most common text."""
    text = main_text(models)
    if text is None:
        return "No two models were measured on the same text: their quality cannot be compared."
    points = _points(models, "parameters", text)
    best = [models[point.number - 1] for point in front(points, higher_is_better=False)]
    named = [
        f"{one.name if one.run is None else f'{one.run}, {one.name}'} "
        f"({number(one.perplexity[text])} with {short_count(one.parameters)})"
        for one in best
    ]
    return (
        f"By perplexity on {text} and number of parameters, no model is better in both than: "
        f"{'; '.join(named)}."
    )


def main_text(models: Sequence[ComparedModel]) -> str | None:
    """The text that most models were measured on; None where no two were."""
    texts = [text for one in models for text in one.perplexity]
    best = max(dict.fromkeys(texts), key=texts.count, default=None)
    return best if best is not None and texts.count(best) > 1 else None


def _points(models: Sequence[ComparedModel], x: str, y: str) -> list[Point]:
    """A point for each model that has both; `y` is a text, or `zeroshot_mean`."""
    points = []
    for place, one in enumerate(models, start=1):
        across = getattr(one, x)
        up = 100 * (one.zeroshot_mean or 0) if y == "zeroshot_mean" else one.perplexity.get(y)
        if y == "zeroshot_mean" and one.zeroshot_mean is None:
            up = None
        if across is not None and up is not None:
            points.append(Point(number=place, group=one.run, kind=one.kind, x=across, y=up))
    return points


def trade(
    models: Sequence[ComparedModel],
    cell: tuple[int, int] | None,
    *,
    size: bool = True,
    numbered: bool = True,
) -> Context | None:
    """Quality against size, unless all are of one size, and against latency.

    Args:
        numbered: points have the numbers of a table's rows.
    """
    plots = trade_plots(models, cell, size=size, numbered=numbered).values()
    shown = [{"wide": plot.svg("wide"), "narrow": plot.svg("narrow")} for plot in plots]
    return {"plots": shown, "numbered": numbered} if shown else None


def trade_plots(
    models: Sequence[ComparedModel],
    cell: tuple[int, int] | None,
    *,
    size: bool = True,
    numbered: bool = True,
) -> dict[str, ParetoPlot]:
    """Every plot of quality against cost there are two models for, by name.

    Args:
        cell: batch size and new tokens that latencies are of.
        size: also against the number of parameters.
    """
    text = main_text(models)
    axes = [("parameters", "parameters [millions]", 1e-6)] if size else []
    if any(one.quantized_by for one in models):
        axes.append(("bytes", "bytes on disk [MB]", 1e-6))
    if cell is not None:
        batch, new_tokens = cell
        how = f"batch {batch}, {new_tokens} new tokens"
        if len({one.original for one in models}) == 1:
            axes.append(("relative_latency", f"latency, part of the original's ({how})", 1.0))
        else:
            axes.append(("latency_s", f"latency [s] ({how})", 1.0))
    qualities = [(text, f"perplexity, {text}", False)] if text is not None else []
    qualities.append(("zeroshot_mean", "mean task score [%]", True))
    plots = {}
    for y, y_label, higher in qualities:
        for x, x_label, scale in axes:
            points = [
                Point(number=p.number, group=p.group, kind=p.kind, x=scale * p.x, y=p.y)
                for p in _points_against(models, x, y)
            ]
            if len(points) > 1:
                quality = "tasks" if higher else "perplexity"
                plots[f"{quality}-{x.removeprefix('relative_').removesuffix('_s')}"] = ParetoPlot(
                    points=points,
                    x_label=x_label,
                    y_label=y_label,
                    higher_is_better=higher,
                    numbered=numbered,
                )
    return plots


def _points_against(models: Sequence[ComparedModel], x: str, y: str) -> list[Point]:
    if x != "relative_latency":
        return _points(models, x, y)
    return [
        Point(number=p.number, group=p.group, kind=p.kind, x=1 / p.x, y=p.y)
        for p in _points(models, "speedup", y)
    ]


def table(models: Sequence[ComparedModel]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: one row per model, numbered."""
    texts = list(dict.fromkeys(text for one in models for text in one.perplexity))
    tasks = any(one.zeroshot_mean is not None for one in models)
    speed = any(one.latency_s is not None for one in models)
    columns = ["", "model", "blocks", "parameters", "bytes", *(f"ppl {text}" for text in texts)]
    columns += ["tasks"] * tasks + ["median latency [s]", "speed-up"] * speed
    rows = []
    for place, one in enumerate(models, start=1):
        name = one.original if one.run is None else f"{one.run}: {one.name}"
        row = [
            str(place), name, str(one.blocks), short_count(one.parameters), short_bytes(one.bytes)
        ]  # fmt: skip
        row += [number(one.perplexity.get(text)) for text in texts]
        if tasks:
            row.append(percent(one.zeroshot_mean) if one.zeroshot_mean is not None else NONE)
        if speed:
            row += [number(one.latency_s, 3), number(one.speedup, 3)]
        rows.append(tuple(row))
    return tuple(columns), rows


def removals(runs: Mapping[str, RunResults]) -> Context:
    """What each run has removed, and how it has healed."""
    rows = []
    for name, results in runs.items():
        plan = results.plan
        healed: list[str] = [results.healing.method] if results.healing else []
        healed += [
            f"{record.method}, {record.steps:,} steps" for record in results.retraining.values()
        ]
        rows.append(
            {
                "name": name,
                "model": model_name(plan.model.id),
                "criterion": plan.criterion or "given by hand",
                "cells": [
                    {"block": block, "status": results.status(block)}
                    for block in range(plan.model.blocks)
                ],
                "removed": ", ".join(map(str, plan.removed)) or "none",
                "healed": "; ".join(healed) or "not healed",
            }
        )
    return {"rows": rows}


def write_runs(directories: Sequence[Path], out: Path) -> list[ComparedModel]:
    """Write the page of several runs to the file `out`, and return what stands in its table.

    Raises:
        ResultFileError: a directory that holds no finished run.
        OutputError: the file cannot be written.
    """
    from shortllm.files import require_file_target, write_text
    from shortllm.reporting.rendering import render_runs

    require_file_target(out)
    runs = load_runs(directories)
    models = compared_models(runs)
    write_text(out, render_runs(runs, models))
    return models
