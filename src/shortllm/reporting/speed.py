"""What a benchmark shows: a table, plots against batch and against blocks removed, a CSV file.

Benchmark ─► speed_context    the section `templates/sections/speed.html.j2` of a report
          ─► write_benchmark  bench.csv, bench-*.svg and bench.json in a directory
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortllm.benchmark.options import UNFINISHED_BENCHMARK, Benchmark, Measurement, PeakMemory
from shortllm.files import write_text
from shortllm.reporting.plots.drawing import standalone
from shortllm.reporting.plots.lines import Line, LinePlot
from shortllm.reporting.wording import NONE, counted, number, percent, short_bytes

MOST_LINES = 4
"""Batch sizes that the plot of speed-ups shows at the most."""

CSV_COLUMNS = (
    "model", "blocks", "parameters", "bytes", "dtype", "batch", "new_tokens", "status",
    "latency_mean_s", "latency_std_s", "latency_median_s", "tokens_per_s", "speedup",
    "ideal_speedup", "first_token_s", "per_token_s", *PeakMemory.model_fields, "utilisation_mean",
    "utilisation_max",
)  # fmt: skip


def batch_plots(found: Benchmark, new_tokens: int) -> dict[str, LinePlot]:
    """Latency and throughput against batch size; none where fewer than two sizes were measured."""
    of_length = [one for one in found.measurements if one.new_tokens == new_tokens]
    plots = {}
    for name, field, label in (
        ("latency", "latency_median_s", f"latency of {new_tokens} new tokens [s]"),
        ("throughput", "tokens_per_s", "throughput [tokens/s]"),
    ):
        points = {
            model.name: [
                (float(one.batch), getattr(one, field))
                for one in of_length
                if one.model == model.name and one.status == "ok"
            ]
            for model in found.models
        }
        lines = [Line(name=model, points=sorted(line)) for model, line in points.items() if line]
        if any(len(line.points) > 1 for line in lines):
            plots[name] = LinePlot(lines=lines, x_label="batch size", y_label=label, doubling=True)
    return plots


def speedup_plot(found: Benchmark) -> LinePlot | None:
    """Speed-up of each model over the first against the blocks it has fewer; None without any, or
    where several have as many."""
    whole = found.models[0].model.blocks
    shorter = [one for one in found.models if one.model.blocks < whole]
    if not shorter or len({one.model.blocks for one in shorter}) < len(shorter):
        return None
    new_tokens = found.measurements[0].new_tokens
    batches = [one.batch for one in found.measurements if one.new_tokens == new_tokens]
    lines = []
    for batch in _spread(sorted(set(batches)), MOST_LINES):
        points = [(0.0, 1.0)]
        for one in shorter:
            measured = found.find(one.name, batch, new_tokens)
            speedup = found.speedup(measured) if measured else None
            if speedup is not None:
                points.append((float(whole - one.model.blocks), speedup))
        if len(points) > 1:
            lines.append(Line(name=f"batch {batch}", points=sorted(points)))
    if not lines:
        return None
    ideal = [(0.0, 1.0)] + [
        (float(whole - one.model.blocks), found.ideal_speedup(one.name)) for one in shorter
    ]
    return LinePlot(
        lines=[*lines, Line(name="ideal (blocks and head)", points=sorted(ideal), ideal=True)],
        x_label=f"blocks removed of {whole}",
        y_label=f"speed-up, {new_tokens} new tokens",
    )


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, both ends among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def all_plots(found: Benchmark) -> dict[str, LinePlot]:
    """Every plot there is something for, by name."""
    plots = {}
    for new_tokens in dict.fromkeys(one.new_tokens for one in found.measurements):
        for name, plot in batch_plots(found, new_tokens).items():
            plots[f"{name}-{new_tokens}"] = plot
    speedups = speedup_plot(found)
    return plots if speedups is None else {**plots, "speedup": speedups}


def speed_context(found: Benchmark) -> dict[str, Any]:
    """What the section of a report shows."""
    blocks = {one.name: one.model.blocks for one in found.models}
    return {
        "plots": [
            {"wide": plot.svg("wide"), "narrow": plot.svg("narrow")}
            for plot in all_plots(found).values()
        ],
        "rows": [
            {"name": one.model, "blocks": blocks[one.model], **_cells(found, one)}
            for one in found.measurements
        ],
        "prompt": found.prompt,
        "settings": f"top-k {found.top_k}, top-p {found.top_p:g}, temperature "
        f"{found.temperature:g}",
        "runs": f"{counted(found.warmup, 'warm-up run')} and {counted(found.runs, 'measured run')}",
        "several": len(found.models) > 1,
        "compiled": found.compiled,
        "attention": found.attention,
        "device": found.device_name,
        "cpu": found.device == "cpu",
        "threads": counted(found.threads, "thread"),
        "load": number(found.load_average, 3) if found.load_average is not None else None,
        "dtype": " and ".join(dict.fromkeys(one.dtype for one in found.models)),
    }


def _cells(found: Benchmark, one: Measurement) -> dict[str, str]:
    """The figures of a row in a reader's words."""
    if one.status != "ok":
        return {
            "batch": f"{one.batch:,}",
            "new_tokens": f"{one.new_tokens:,}",
            "status": one.status,
        }
    std = f"± {number(one.latency_std_s, 2)}" if one.latency_std_s is not None else ""
    milli = {
        name: number(1000 * value, 3) if value is not None else NONE
        for name, value in (("first_token", one.first_token_s), ("per_token", one.per_token_s))
    }
    speedup = found.speedup(one)
    return {
        "batch": f"{one.batch:,}",
        "new_tokens": f"{one.new_tokens:,}",
        "status": one.status,
        "latency": number(one.latency_mean_s),
        "std": std,
        "tokens_per_s": number(one.tokens_per_s),
        "speedup": f"{speedup:.2f}" if speedup is not None else NONE,
        "ideal": f"{found.ideal_speedup(one.model):.2f}",
        **milli,
        "memory": short_bytes(peak_bytes(one.memory)),
        "utilisation": percent(one.utilisation_mean) if one.utilisation_mean is not None else NONE,
    }


def table(found: Benchmark) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows for a terminal; the heading of the section's table in fewer words."""
    blocks = {one.name: str(one.model.blocks) for one in found.models}
    columns = {
        "latency": "latency s", "tokens_per_s": "tokens/s", "speedup": "speed-up",
        "ideal": "ideal", "first_token": "first ms", "per_token": "per token ms",
        "memory": "peak", "utilisation": "busy",
    }  # fmt: skip
    rows = []
    for one in found.measurements:
        cells = _cells(found, one)
        figures = [cells.get(name, "") for name in columns]
        figures[0] += f" {cells['std']}" if cells.get("std") else ""
        if one.status != "ok":
            figures[0] = one.status
        rows.append((one.model, blocks[one.model], cells["batch"], cells["new_tokens"], *figures))
    return ("model", "blocks", "batch", "new tokens", *columns.values()), rows


def peak_bytes(memory: PeakMemory | None) -> int | None:
    """The one figure of a table: torch's allocator, or on a CPU the process."""
    if memory is None:
        return None
    return memory.process_bytes if memory.allocated_bytes is None else memory.allocated_bytes


def benchmark_csv(found: Benchmark) -> str:
    """One row per measurement; what was not measured is empty."""
    models = {one.name: one for one in found.models}
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for one in found.measurements:
        described = models[one.model]
        memory = one.memory or PeakMemory()
        writer.writerow(
            {
                **one.model_dump(),
                **memory.model_dump(),
                "blocks": described.model.blocks,
                "parameters": described.model.parameters,
                "bytes": described.model.bytes,
                "dtype": described.dtype,
                "speedup": found.speedup(one),
                "ideal_speedup": found.ideal_speedup(one.model),
            }
        )
    return text.getvalue()


def write_benchmark(directory: Path, found: Benchmark) -> None:
    """bench.csv, a plot per file, and last bench.json, which says that all is there."""
    write_text(directory / "bench.csv", benchmark_csv(found))
    plots = all_plots(found)
    for name, plot in plots.items():
        write_text(directory / f"bench-{name}.svg", standalone(plot.svg("wide")))
    for stale in directory.glob("bench-*.svg"):
        if stale.stem.removeprefix("bench-") not in plots:
            stale.unlink()
    found.save(directory / "bench.json")
    (directory / UNFINISHED_BENCHMARK).unlink(missing_ok=True)
