"""What was measured: sections of a page, tables of a terminal, files of a benchmark.

Evaluation ─► evaluation_table  a row per model
           ─► task_table        a row per task
Benchmark  ─► benchmark_table   a row per model, batch size and length
           ─► drafted_table     a row per draft, kind of prompts and number of drafted tokens
           ─► write_benchmark   bench*.csv, bench-*.svg and bench.json in a directory
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shortllm.benchmark.options import (
    COLUMNS,
    DRAFTED_COLUMNS,
    UNFINISHED_BENCHMARK,
    Benchmark,
    Drafted,
    DraftedMeasurement,
    Measurement,
)
from shortllm.evaluation.options import FEW_SEGMENTS, EvaluatedModel, Evaluation, Perplexity
from shortllm.files import write_text
from shortllm.format import (
    NONE,
    change,
    counted,
    figure,
    fixed,
    listed,
    number,
    percent,
    point_change,
    short_bytes,
    without_directories,
)
from shortllm.published import PublishedComparison, compared_blocks, published_comparison
from shortllm.reporting import parts
from shortllm.reporting.charts import DASHED, DotPlot, Line, LinePlot, marked
from shortllm.reporting.load import RunResults, protocol_of
from shortllm.reporting.parts import Cell, Column, Paragraph, Part, Row, Section, Table, row
from shortllm.reporting.plots import standalone
from shortllm.reporting.protocol import perplexity_source
from shortllm.run_directory import PRUNED

DRAFTED_CSV = "bench-drafts.csv"

LOG_SPREAD = 10.0
"""Highest over lowest point from which the speed axis is logarithmic."""
MAX_LINES = 4
"""Most batch sizes that the plot of speed-ups shows."""
NOISY = 0.3
"""Standard deviation over mean of a latency from which a speed-up is not stated."""


# ---- evaluation


def evaluation_table(evaluation: Evaluation) -> Table:
    """A row per model: blocks, parameters, bytes, and a perplexity for each text, with the paired
    difference from the first model."""
    texts = [without_directories(entry.source) for entry in evaluation.models[0].perplexity]
    rows = [
        row(
            one.name,
            str(one.model.blocks),
            f"{one.model.parameters:,}",
            f"{one.model.bytes:,}",
            *(Cell(str(entry), str(entry.difference or "")) for entry in one.perplexity),
        )
        for one in evaluation.models
    ]
    return Table(row("model", "blocks", "parameters", "bytes", *(f"ppl {t}" for t in texts)), rows)


def perplexity_plot(models: Sequence[EvaluatedModel]) -> DotPlot | None:
    """Perplexity of each model on the first text that all of them were measured on."""
    by_model = [{protocol_of(entry): entry for entry in one.perplexity} for one in models]
    for key, example in by_model[0].items():
        if all(key in found for found in by_model):
            return DotPlot(
                names=[one.name for one in models],
                values=[found[key].perplexity for found in by_model],
                colours=["protected", "removed", *["kept"] * len(models)][: len(models)],
                label=f"perplexity on {perplexity_source(example)}",
            )
    return None


def perplexity_change(before: Perplexity | None, after: Perplexity | None) -> str:
    """The change of a perplexity; paired, where the NLL of each segment is known."""
    if before is None or after is None:
        return NONE
    paired = after.difference_from(before)
    return str(paired) if paired else change(before.perplexity, after.perplexity)


def errors_note(measured: Iterable[Perplexity]) -> str:
    """What ± means, and which texts are short; empty where errors are not known."""
    known = [one for one in measured if one.segment_nlls]
    few = {perplexity_source(one): one.segments for one in known if one.segments < FEW_SEGMENTS}
    note = (
        "± is one standard error over segments; changes are paired, on the same segments."
        if known
        else ""
    )
    if few:
        which = listed([f"{counted(count, 'segment')} of {text}" for text, count in few.items()])
        note += (
            f" Only {which} {'was' if list(few.values()) == [1] else 'were'} measured: below "
            f"{FEW_SEGMENTS}, perplexities and their errors are rough."
        )
    return note


def task_table(models: Sequence[EvaluatedModel]) -> Table:
    """A row per task: each model's score ± standard error, and its change from the first model."""
    rows = []
    for scores in zip(*(entry.zeroshot for entry in models), strict=False):
        task = scores[0]
        metric = f"{task.metric} [%]" if task.is_share else task.metric
        asked = f"{metric}, {counted(task.documents, 'document')}"
        asked += f" after {counted(task.shots, 'example')}" if task.shots else ""
        difference = point_change if task.is_share else change
        cells = [(str(one), difference(task.score, one.score)) for one in scores]
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


def prompts_phrase(evaluation: Evaluation) -> str:
    """How tasks were put to chat models: 'in the chat template, with examples as turns'."""
    prompts = evaluation.task_prompts
    if prompts is None:
        return ""
    said = ["in the chat template"] if prompts.apply_chat_template else []
    if prompts.fewshot_as_multiturn and any(one.shots for one in evaluation.models[0].zeroshot):
        said.append("with examples as earlier turns")
    if prompts.system_instruction:
        said.append(f"after the system message “{prompts.system_instruction}”")
    return ", ".join(said)


def tasks_section(results: RunResults) -> Section | None:
    """Scores of tasks; None where none was measured."""
    models = [entry for entry in results.evaluated.values() if entry.zeroshot]
    if not models or results.evaluation is None:
        return None
    version = results.evaluation.versions.get("lm_eval", "")
    prompts = prompts_phrase(results.evaluation)
    note = (
        f"Scores ± standard error, measured by lm-evaluation-harness{version and f' {version}'} "
        f"with its own prompts{prompts and f', {prompts}'}. Differences of one or two standard "
        "errors may be chance."
    )
    return Section("tasks", "Tasks", [task_table(models), Paragraph(note)])


# ---- published figures and generated text


def published_section(results: RunResults) -> Section | None:
    """Our figures next to the published ones; None where the recipe has none."""
    if not results.run.recipe.get("published"):
        return None
    from shortllm.recipe import Recipe

    recipe = Recipe.model_validate(results.run.recipe)
    source = recipe.published
    assert source is not None
    text = f"Published in {source.source}"
    text += (
        f"; the retrained model was released as {source.checkpoint}." if source.checkpoint else "."
    )
    if source.removed:
        text += f" {compared_blocks(source, results.plan.removed)}"
    rows = []
    if results.evaluation is not None:
        rows = published_comparison(source, results.evaluation, recipe.evaluation)
    note = "No published figure was measured here by the same protocol."
    if rows:
        note = (
            "Only figures of the same protocol are compared: 128 tokens per segment, the same BOS, "
            "whole texts and tasks. The published shortened model was retrained with LoRA and "
            "is compared with retrained models."
        )
    found = [Paragraph(text, ""), *([published_table(rows)] if rows else []), Paragraph(note)]
    return Section("published", "Against published results", found)


def published_table(rows: Sequence[PublishedComparison]) -> Table:
    """Our figures next to the published ones."""
    columns: list[Column[PublishedComparison]] = [
        ("quantity", lambda one: Cell(one.quantity, one.model)),
        ("published", lambda one: figure(one.published)),
        ("here", lambda one: Cell(figure(one.ours), look="after")),
        ("change", lambda one: Cell(change(one.published, one.ours), look="change")),
    ]
    return parts.table_of(rows, columns)


def samples_section(results: RunResults) -> Section | None:
    """Continuations of the same prompt by each model, or answers to it, side by side."""
    columns = [(entry, entry.samples) for entry in results.evaluated.values() if entry.samples]
    samples = list(zip(*(found.texts for _, found in columns), strict=False))
    if not samples:
        return None
    names = [f"{entry.name}, {counted(entry.model.blocks, 'block')}" for entry, _ in columns]
    rows = []
    for place, texts in enumerate(samples, start=1):
        which = f", sample {place}" if len(samples) > 1 else ""
        rows.append(
            [(name + which, text.lstrip(" ")) for name, text in zip(names, texts, strict=True)]
        )
    first = columns[0][1]
    chat = ""
    if first.apply_chat_template:
        system = first.system_instruction
        after = f" after the system message “{system}”" if system else ""
        chat = f"Answers in the chat template{after}. "
    note = (
        f"{chat}Sampled with up to {counted(first.new_tokens, 'new token')}, top-k {first.top_k}, "
        f"top-p {first.top_p:g}, temperature {first.temperature:g}, seed {first.seed}. All samples "
        "are shown."
    )
    return Section(
        "samples", "Generated text", [parts.Samples(first.prompt, rows), Paragraph(note)]
    )


# ---- speed


def speed_section(found: Benchmark) -> Section:
    """Plots and table of a benchmark, and how it was measured."""
    plots: list[Part] = [plot.figure() for plot in all_plots(found).values()]
    table, note = benchmark_table(found), Paragraph(_speed_note(found))
    return Section("speed", "Speed and memory", [*plots, table, note])


def drafted_section(found: Benchmark | None) -> Section | None:
    """Text of the first model with drafts; None where none was measured."""
    if found is None or found.drafted is None:
        return None
    note = Paragraph(drafted_note(found.drafted))
    return Section("drafts", "Speed with a draft", [drafted_table(found.drafted), note])


def drafted_note(found: Drafted) -> str:
    """How text with a draft was measured, and whether it was the same as without."""
    templates = {one.template for one in found.measurements}
    texts = sum(one.texts for one in found.measurements)
    ties = sum(one.near_ties for one in found.measurements)
    if found.temperature:
        said = f"The text is sampled with temperature {found.temperature:g}."
    elif ties:
        said = (
            f"{counted(ties, 'near tie')}: {ties} of {texts} texts differ with the draft, from a "
            "place where the likeliest tokens are equal up to rounding; the others are the same."
        )
    else:
        said = "The text is the same as without the draft, token by token."
    alpaca = " Requests are in the format of Alpaca: there is no chat template."
    slower = " No draft makes it faster." if found.best.speedup <= 1 else ""
    return (
        f"{said} The speed-up is the median over neighbouring runs. Tokens per step are those that "
        "the intact model adds in one forward; the part accepted is that of the drafted tokens."
        f"{alpaca if 'alpaca' in templates else ''}{slower}"
    )


def drafted_table(found: Drafted) -> Table:
    """A row per draft, kind of prompts, length, and number of drafted tokens."""
    blocks = {one.name: one.model.blocks for one in found.drafts}
    columns: list[Column[DraftedMeasurement]] = [
        ("draft", lambda one: one.draft),
        ("blocks", lambda one: str(blocks[one.draft])),
        ("prompts", lambda one: Cell(one.prompts, one.source)),
        ("new tokens", lambda one: f"{one.new_tokens:,}"),
        ("drafted", lambda one: str(one.draft_tokens)),
        ("alone [tokens/s]", lambda one: number(one.alone_tokens_per_s)),
        ("with it", lambda one: Cell(number(one.drafted_tokens_per_s), look="after")),
        ("speed-up", _drafted_speedup),
        ("tokens per step", _tokens_per_step),
        ("accepted", lambda one: percent(one.acceptance)),
        ("near ties", lambda one: str(one.near_ties)),
    ]
    return parts.table_of(found.measurements, columns)


def _drafted_speedup(one: DraftedMeasurement) -> Cell:
    return Cell(fixed(one.speedup), "slower" if one.speedup < 1 else "", look="after")


def _tokens_per_step(one: DraftedMeasurement) -> Cell:
    error = one.tokens_per_step_stderr
    return Cell(fixed(one.tokens_per_step), "" if error is None else f"± {number(error, 2)}")


def _speed_note(found: Benchmark) -> str:
    setup = [
        found.device_name,
        counted(found.threads, "thread") if found.device == "cpu" else "",
        " and ".join(dict.fromkeys(one.dtype for one in found.models)),
        "static cache and torch.compile" if found.compiled else "",
        f"attention {found.attention}" if found.attention else "",
        f"load average {number(found.load_average, 3)} at the start" if found.load_average else "",
    ]
    turns = paired = ""
    if len(found.models) > 1:
        turns = " of each model, alternating between the models"
        paired = (
            " The speed-up is the median over pairs of consecutive runs. Ideal is the speed-up if "
            "only blocks and head took time."
        )
    return (
        f"“{found.prompt}” is continued by sampling (top-k {found.top_k}, top-p {found.top_p:g}, "
        f"temperature {found.temperature:g}) to exactly the stated length; "
        f"{counted(found.warmup, 'warm-up run')} and {counted(found.runs, 'measured run')}{turns}. "
        f"{', '.join(filter(None, setup))}. Latency is the mean ± standard deviation.{paired}"
    )


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
        ("peak memory", peak_memory),
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


def peak_memory(one: Measurement | None) -> str:
    """Peak memory in one figure: torch's allocator, or the process on a CPU."""
    memory = one and one.memory
    if not memory:
        return NONE
    on_device = memory.allocated_bytes
    return short_bytes(memory.process_bytes if on_device is None else on_device)


def cell_phrase(batch: int, new_tokens: int) -> str:
    """'batch 1, 128 new tokens'."""
    return f"batch {batch}, {counted(new_tokens, 'new token')}"


def speed_sentence(found: Benchmark | None) -> str:
    """How much faster the shortened model generates; empty where it was not measured."""
    if found is None:
        return ""
    for one in found.measurements:
        speedup = found.speedup(one)
        first = found.find(found.models[0].name, one.batch, one.new_tokens)
        if one.model != PRUNED or first is None or speedup is None:
            continue
        cell = cell_phrase(one.batch, one.new_tokens)
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
            plots[name] = LinePlot(
                lines=lines, x_label="batch size", y_label=label, doubling=True,
                ticks=marked([x for line in lines for x, _ in line.points]), log_spread=LOG_SPREAD,
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
        cells = {name: found.find(name, batch, new_tokens) for name in removed}
        speedups = {name: found.speedup(one) for name, one in cells.items() if one}
        points = [(removed[name], gain) for name, gain in speedups.items() if gain is not None]
        if points:
            lines.append(Line(name=f"batch {batch}", points=sorted([(0.0, 1.0), *points])))
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
    lengths = dict.fromkeys(one.new_tokens for one in found.measurements)
    plots = {f"{name}-{n}": plot for n in lengths for name, plot in batch_plots(found, n).items()}
    speedups = speedup_plot(found)
    return plots if speedups is None else {**plots, "speedup": speedups}


# ---- files


def benchmark_csv(found: Benchmark) -> str:
    """One row per measurement; what was not measured is empty."""
    return _csv(COLUMNS, found.rows())


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_benchmark(directory: Path, found: Benchmark) -> None:
    """The tables, a file per plot, and last bench.json, which marks the rest as complete."""
    write_text(directory / "bench.csv", benchmark_csv(found))
    if found.drafted:
        write_text(directory / DRAFTED_CSV, _csv(DRAFTED_COLUMNS, found.drafted.rows()))
    else:
        (directory / DRAFTED_CSV).unlink(missing_ok=True)
    plots = all_plots(found)
    for name, plot in plots.items():
        write_text(directory / f"bench-{name}.svg", standalone(plot.figure().svg))
    for stale in directory.glob("bench-*.svg"):
        if stale.stem.removeprefix("bench-") not in plots:
            stale.unlink()
    found.save(directory / "bench.json")
    (directory / UNFINISHED_BENCHMARK).unlink(missing_ok=True)
