"""Speed, memory and task scores: sections of a page, tables of a terminal, files of a benchmark.

Evaluation ─► evaluation_table  a row per model
           ─► task_table        a row per zero-shot task
Benchmark  ─► benchmark_table   a row per model, batch size and length
           ─► write_benchmark   bench.csv, bench-*.svg and bench.json in a directory
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from shortllm.benchmark.options import UNFINISHED_BENCHMARK, Benchmark, Measurement, PeakMemory
from shortllm.evaluation.harness import is_share, metric_phrase, score_phrase
from shortllm.evaluation.options import EvaluatedModel, Evaluation, TaskScore
from shortllm.files import write_text
from shortllm.format import NONE, change, counted, fixed, number, percent, point_change, short_bytes
from shortllm.reporting import parts
from shortllm.reporting.load import RunResults
from shortllm.reporting.parts import Cell, Column, Part, Row, Section, Table, row
from shortllm.reporting.plots import standalone
from shortllm.reporting.plots.lines import DASHED, Line, LinePlot, marked
from shortllm.reporting.protocol import without_directories
from shortllm.run_directory import PRUNED

LOG_SPREAD = 10.0
"""Highest over lowest point from which the speed axis is logarithmic."""
MAX_LINES = 4
"""Most batch sizes that the plot of speed-ups shows."""
NOISY = 0.3
"""Standard deviation over mean of a latency from which a speed-up is not stated."""

CSV_COLUMNS = (
    "model", "blocks", "parameters", "bytes", "dtype", "batch", "new_tokens", "status",
    "latency_mean_s", "latency_std_s", "latency_median_s", "tokens_per_s", "speedup",
    "ideal_speedup", "first_token_s", "per_token_s", *PeakMemory.model_fields, "utilisation_mean",
    "utilisation_max",
)  # fmt: skip


# ---- evaluation


def evaluation_table(evaluation: Evaluation) -> Table:
    """A row per model: blocks, parameters, bytes, and a perplexity for each text."""
    texts = [without_directories(entry.source) for entry in evaluation.models[0].perplexity]
    rows = [
        row(
            one.name,
            str(one.model.blocks),
            f"{one.model.parameters:,}",
            f"{one.model.bytes:,}",
            *(fixed(entry.perplexity, 4) for entry in one.perplexity),
        )
        for one in evaluation.models
    ]
    return Table(row("model", "blocks", "parameters", "bytes", *(f"ppl {t}" for t in texts)), rows)


def task_table(models: Sequence[EvaluatedModel]) -> Table:
    """A row per task: each model's score ± standard error, and its change from the first model."""
    scores = [{score.task: score for score in entry.zeroshot} for entry in models]
    rows = []
    for task in models[0].zeroshot:
        asked = f"{metric_phrase(task)}, {counted(task.documents, 'document')}"
        asked += f" after {counted(task.shots, 'example')}" if task.shots else ""
        cells = [_score(task, of_model.get(task.task)) for of_model in scores]
        rows.append(compared_row(Cell(task.task, asked), cells))
    means = [entry.zeroshot_mean for entry in models if entry.zeroshot_mean is not None]
    if means:
        cells = [(fixed(100 * mean), point_change(means[0], mean)) for mean in means]
        rows.append(compared_row(Cell("mean [%]"), cells))
    return Table(row("task", *(entry.name for entry in models)), rows)


def compared_row(name: Cell, cells: Sequence[tuple[str, str]]) -> Row:
    """A quantity of each model, with its change from the first model below it."""
    (first, _), *others = cells
    changed = [Cell(value, "" if by == NONE else by, look="after") for value, by in others]
    return row(name, first, *changed)


def _score(before: TaskScore, after: TaskScore | None) -> tuple[str, str]:
    """A score, and its change where the same documents were asked."""
    if after is None or before.documents_fingerprint != after.documents_fingerprint:
        return score_phrase(after) if after else NONE, NONE
    difference = point_change if is_share(after) else change
    return score_phrase(after), difference(before.score, after.score)


def tasks_section(results: RunResults) -> Section | None:
    """Zero-shot scores; None where no task was measured."""
    models = [entry for entry in results.evaluated.values() if entry.zeroshot]
    if not models or results.evaluation is None:
        return None
    version = results.evaluation.versions.get("lm_eval", "")
    note = (
        f"Scores ± standard error, measured by lm-evaluation-harness{version and f' {version}'} "
        "with its own prompts. Differences of one or two standard errors may be chance."
    )
    return Section("tasks", "Zero-shot tasks", [task_table(models), parts.Paragraph(note)])


# ---- speed


def speed_section(found: Benchmark) -> Section:
    """Plots and table of a benchmark, and how it was measured."""
    plots: list[Part] = [plot.figure() for plot in all_plots(found).values()]
    table, note = benchmark_table(found), parts.Paragraph(_speed_note(found))
    return Section("speed", "Speed and memory", [*plots, table, note])


def _speed_note(found: Benchmark) -> str:
    """The protocol of a benchmark in sentences."""
    several = len(found.models) > 1
    runs = f"{counted(found.warmup, 'warm-up run')} and {counted(found.runs, 'measured run')}"
    setup = [
        found.device_name,
        counted(found.threads, "thread") if found.device == "cpu" else "",
        " and ".join(dict.fromkeys(one.dtype for one in found.models)),
        "static cache and torch.compile" if found.compiled else "",
        f"attention {found.attention}" if found.attention else "",
        f"load average {number(found.load_average, 3)} at the start" if found.load_average else "",
    ]
    note = (
        f"“{found.prompt}” is continued by sampling (top-k {found.top_k}, top-p {found.top_p:g}, "
        f"temperature {found.temperature:g}) to exactly the stated length; {runs}"
        f"{' of each model, alternating between the models' if several else ''}. "
        f"{', '.join(filter(None, setup))}. Latency is the mean ± standard deviation."
    )
    if several:
        note += (
            " The speed-up is the median over pairs of consecutive runs. Ideal is the speed-up if "
            "only blocks and head took time."
        )
    return note


def benchmark_table(found: Benchmark) -> Table:
    """A row per model, batch size and length; dashes where memory did not suffice."""
    blocks = {one.name: one.model.blocks for one in found.models}
    columns: list[Column[Measurement]] = [
        ("model", lambda one: one.model),
        ("blocks", lambda one: str(blocks[one.model])),
        ("batch", lambda one: f"{one.batch:,}"),
        ("new tokens", lambda one: f"{one.new_tokens:,}"),
        ("latency [s]", _latency),
        ("tokens/s", lambda one: Cell(number(one.tokens_per_s), look="after")),
    ]
    if len(found.models) > 1:
        columns.append(("speed-up", lambda one: _speedup(found, one)))
    columns += [
        ("first token [ms]", _first_token),
        ("peak memory", lambda one: short_bytes(peak_bytes(one.memory))),
        ("utilisation", lambda one: percent(one.utilisation_mean)),
    ]
    return parts.table_of(found.measurements, columns)


def _latency(one: Measurement) -> Cell:
    if one.status != "ok":
        return Cell(one.status, look="change")
    std = f"± {number(one.latency_std_s, 2)}" if one.latency_std_s is not None else ""
    return Cell(number(one.latency_mean_s), std)


def _speedup(found: Benchmark, one: Measurement) -> Cell:
    if one.status != "ok":
        return Cell(NONE)
    ideal = fixed(found.ideal_speedup(one.model))
    return Cell(fixed(found.speedup(one)), f"ideal {ideal}", look="after")


def _first_token(one: Measurement) -> Cell:
    first, each = (number(s and 1000 * s, 3) for s in (one.first_token_s, one.per_token_s))
    return Cell(first, "" if each == NONE else f"then {each} each")


def peak_bytes(memory: PeakMemory | None) -> int | None:
    """Peak memory in one figure: torch's allocator, or the process on a CPU."""
    if memory is None:
        return None
    return memory.process_bytes if memory.allocated_bytes is None else memory.allocated_bytes


def speed_sentence(found: Benchmark | None) -> str:
    """How much faster the shortened model generates; empty where it was not measured."""
    for one in found.measurements if found else ():
        assert found is not None
        speedup = found.speedup(one)
        first = found.find(found.models[0].name, one.batch, one.new_tokens)
        if one.model != PRUNED or speedup is None or first is None:
            continue
        cell = f"batch {one.batch}, {counted(one.new_tokens, 'new token')}"
        spread = max((m.latency_std_s or 0.0) / (m.latency_mean_s or 1.0) for m in (first, one))
        if spread > NOISY:
            return (
                f" The speed-up is not stated because the latencies vary by ± {percent(spread)} "
                f"({cell}). Measure on a quiet machine."
            )
        return f" It generates {number(speedup, 3)} times as fast ({cell})."
    return ""


# ---- plots


def batch_plots(found: Benchmark, new_tokens: int) -> dict[str, LinePlot]:
    """Latency and throughput against batch size; none where only one size was measured."""
    plots = {}
    for name, field, label in (
        ("latency", "latency_median_s", f"latency of {new_tokens} new tokens [s]"),
        ("throughput", "tokens_per_s", "throughput [tokens/s]"),
    ):
        points: dict[str, list[tuple[float, float]]] = {model.name: [] for model in found.models}
        for one in found.measurements:
            if one.new_tokens == new_tokens and one.status == "ok":
                points[one.model].append((float(one.batch), getattr(one, field)))
        lines = [Line(name=model, points=sorted(line)) for model, line in points.items() if line]
        if any(len(line.points) > 1 for line in lines):
            places = [x for line in lines for x, _ in line.points]
            plots[name] = LinePlot(
                lines=lines, x_label="batch size", y_label=label, ticks=marked(places),
                doubling=True, log_spread=LOG_SPREAD,
            )  # fmt: skip
    return plots


def speedup_plot(found: Benchmark) -> LinePlot | None:
    """Speed-up over the first model against removed blocks.

    None where no model has fewer blocks, or several have the same number.
    """
    whole = found.models[0].model.blocks
    removed = {one.name: float(whole - one.model.blocks) for one in found.models}
    removed = {name: blocks for name, blocks in removed.items() if blocks > 0}
    if not removed or len(set(removed.values())) < len(removed):
        return None
    new_tokens = found.measurements[0].new_tokens
    batches = {one.batch for one in found.measurements if one.new_tokens == new_tokens}
    lines = []
    for batch in evenly(sorted(batches), MAX_LINES):
        points = [(0.0, 1.0)]
        for name, blocks in removed.items():
            measured = found.find(name, batch, new_tokens)
            if measured and (speedup := found.speedup(measured)) is not None:
                points.append((blocks, speedup))
        if len(points) > 1:
            lines.append(Line(name=f"batch {batch}", points=sorted(points)))
    if not lines:
        return None
    ideal = [(blocks, found.ideal_speedup(name)) for name, blocks in removed.items()]
    ideal = sorted([(0.0, 1.0), *ideal])
    return LinePlot(
        lines=[*lines, Line(name="ideal (blocks and head)", points=ideal, style=DASHED)],
        ticks=marked([x for x, _ in ideal]),
        x_label=f"blocks removed of {whole}",
        y_label=f"speed-up, {new_tokens} new tokens",
    )


def evenly(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, with both ends."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def all_plots(found: Benchmark) -> dict[str, LinePlot]:
    """Every plot that has enough points, by name."""
    plots = {}
    for new_tokens in dict.fromkeys(one.new_tokens for one in found.measurements):
        for name, plot in batch_plots(found, new_tokens).items():
            plots[f"{name}-{new_tokens}"] = plot
    speedups = speedup_plot(found)
    return plots if speedups is None else {**plots, "speedup": speedups}


# ---- files


def benchmark_csv(found: Benchmark) -> str:
    """One row per measurement; what was not measured is empty."""
    models = {one.name: one for one in found.models}
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for one in found.measurements:
        measured = one.model_dump() | (one.memory or PeakMemory()).model_dump()
        size = models[one.model].model.model_dump(include={"blocks", "parameters", "bytes"})
        gain = {"speedup": found.speedup(one), "ideal_speedup": found.ideal_speedup(one.model)}
        writer.writerow(measured | size | gain | {"dtype": models[one.model].dtype})
    return text.getvalue()


def write_benchmark(directory: Path, found: Benchmark) -> None:
    """bench.csv, a file per plot, and last bench.json, which marks the rest as complete."""
    write_text(directory / "bench.csv", benchmark_csv(found))
    plots = all_plots(found)
    for name, plot in plots.items():
        write_text(directory / f"bench-{name}.svg", standalone(plot.figure().svg))
    for stale in directory.glob("bench-*.svg"):
        if stale.stem.removeprefix("bench-") not in plots:
            stale.unlink()
    found.save(directory / "bench.json")
    (directory / UNFINISHED_BENCHMARK).unlink(missing_ok=True)
