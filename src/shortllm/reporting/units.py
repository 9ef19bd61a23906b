"""The page that sets width beside depth at the same number of parameters."""

from __future__ import annotations

from typing import Any

from shortllm import __version__
from shortllm.benchmark.options import Benchmark
from shortllm.comparison.options import Candidate
from shortllm.reporting.loading import UnitsResults
from shortllm.reporting.names import flattened, model_name
from shortllm.reporting.protocol import describe_units, perplexity_source
from shortllm.reporting.runs import ComparedModel, main_text, trade
from shortllm.reporting.speed import speed_context
from shortllm.reporting.wording import NONE, THIN, number, percent, short_bytes, short_count, signed

Context = dict[str, Any]


def head(results: UnitsResults) -> Context:
    """Title and verdict."""
    units = results.units
    return {
        "name": model_name(units.model.id),
        "revision": (units.model.revision or "")[:12],
        "version": __version__,
        "before": short_count(units.model.parameters),
        "after": short_count(units.candidates[0].parameters),
        "verdict": verdict(results),
    }


def verdict(results: UnitsResults) -> str:
    """Which is best, which is fastest, in two sentences."""
    units, models = results.units, compared(results)
    saved = 1 - units.candidates[0].parameters / units.model.parameters
    sentence = f"With {percent(saved)} of the parameters gone"
    text = main_text(models)
    shown = [one for one in models if one.run is not None]
    last = [one for one in shown if one.healed_by] or shown
    if text is not None:
        best = min(last, key=lambda one: one.perplexity.get(text, float("inf")))
        when = " after healing" if best.healed_by else ""
        sentence += (
            f", {best.run} leads to the lowest perplexity{when}: "
            f"{number(best.perplexity[text])} on {text}"
        )
    timed = [one for one in shown if one.speedup is not None]
    if timed:
        fastest = max(timed, key=lambda one: one.speedup or 0.0)
        sentence += (
            f". The fastest is {fastest.run}, {number(fastest.speedup, 3)} times as fast as the "
            "original"
        )
    return sentence + "."


def compared(results: UnitsResults) -> list[ComparedModel]:
    """The original, and each candidate before and after healing, as points of a trade-off."""
    models = [_compared(results, "original", None)]
    for candidate in results.units.candidates:
        for name in (candidate.name, candidate.healed):
            if name in results.evaluated:
                models.append(_compared(results, name, candidate))
    return models


def _compared(results: UnitsResults, name: str, candidate: Candidate | None) -> ComparedModel:
    entry, cell = results.evaluated[name], smallest_cell(results.benchmark)
    timed = candidate.name if candidate else name
    measured = results.benchmark.find(timed, *cell) if cell else None
    healed = candidate is not None and name == candidate.healed
    retraining = results.units.retraining or {}
    return ComparedModel(
        run=f"{candidate.name} ({candidate.unit})" if candidate else None,
        name=name,
        original=model_name(results.units.model.id),
        criterion=candidate.name if candidate else None,
        healed_by=retraining.get("method", "lora") if healed else None,
        blocks=entry.model.blocks,
        parameters=entry.model.parameters,
        bytes=entry.model.bytes,
        perplexity={perplexity_source(one): one.perplexity for one in entry.perplexity},
        zeroshot_mean=entry.zeroshot_mean,
        latency_s=measured.latency_median_s if measured else None,
        speedup=results.benchmark.speedup(measured) if measured else None,
    )


def smallest_cell(benchmark: Benchmark) -> tuple[int, int] | None:
    """Batch size and new tokens of the first cell that was measured."""
    cells = [(one.batch, one.new_tokens) for one in benchmark.measurements if one.status == "ok"]
    return min(cells, default=None)


def table(results: UnitsResults) -> Context:
    """The paper's kind of table: a row per method, before and after healing."""
    evaluated, benchmark = results.evaluated, results.benchmark
    cell = smallest_cell(benchmark)
    texts = [perplexity_source(one) for one in evaluated["original"].perplexity]
    tasks = evaluated["original"].zeroshot_mean is not None
    rows = [_row(results, None, cell)]
    rows += [_row(results, one, cell) for one in results.units.candidates]
    batch, new_tokens = cell or (0, 0)
    return {
        "texts": texts,
        "tasks": tasks,
        "healed": any(one.healed for one in results.units.candidates),
        "rows": rows,
        "cell": f"batch {batch}, {new_tokens} new tokens" if cell else "",
        "retraining": ", ".join(
            f"{name} {value}" for name, value in flattened(results.units.retraining or {})
        ),
    }


def _row(
    results: UnitsResults, candidate: Candidate | None, cell: tuple[int, int] | None
) -> Context:
    name = candidate.name if candidate else "original"
    entry = results.evaluated[name]
    healed = results.evaluated.get(candidate.healed or "") if candidate else None
    measured = results.benchmark.find(name, *cell) if cell else None
    memory = measured.memory if measured else None
    peak = (memory.allocated_bytes or memory.process_bytes) if memory else None
    speedup = results.benchmark.speedup(measured) if measured else None
    return {
        "name": name,
        "unit": candidate.unit if candidate else "",
        "parameters": f"{entry.model.parameters:,}",
        "missed": _missed(candidate),
        "before": [number(one.perplexity) for one in entry.perplexity],
        "after": [number(one.perplexity) for one in healed.perplexity] if healed else [],
        "task": percent(entry.zeroshot_mean) if entry.zeroshot_mean is not None else NONE,
        "task_after": (
            percent(healed.zeroshot_mean)
            if healed is not None and healed.zeroshot_mean is not None
            else ""
        ),
        "latency": number(measured.latency_median_s, 3) if measured else NONE,
        "speedup": number(speedup, 3),
        "memory": short_bytes(peak),
    }


def _missed(candidate: Candidate | None) -> str:
    """'+0.42 %', and nothing for the first, which sets the number."""
    if candidate is None or not candidate.missed:
        return ""
    return f"{signed(100 * candidate.missed, 2)}{THIN}%"


def terminal_table(results: UnitsResults) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the same table for a terminal."""
    shown = table(results)
    columns = ["method", "unit", "parameters", *(f"ppl {text}" for text in shown["texts"])]
    if shown["healed"]:
        columns += [f"healed {text}" for text in shown["texts"]]
    columns += ["tasks", "healed"] if shown["tasks"] and shown["healed"] else []
    columns += ["tasks"] if shown["tasks"] and not shown["healed"] else []
    columns += ["median latency s", "speed-up", "peak"]
    rows = []
    for row in shown["rows"]:
        cells = [row["name"], row["unit"], row["parameters"], *row["before"]]
        if shown["healed"]:
            cells += row["after"] or [""] * len(shown["texts"])
        cells += [row["task"]] if shown["tasks"] else []
        cells += [row["task_after"]] if shown["tasks"] and shown["healed"] else []
        rows.append((*cells, row["latency"], row["speedup"], row["memory"]))
    return tuple(columns), rows


def sections(results: UnitsResults) -> list[tuple[str, str, Context | None]]:
    """Name of the partial, heading and content of each section."""
    cell = smallest_cell(results.benchmark)
    quality = trade(compared(results), cell, size=False, numbered=False)
    return [
        ("units", "At the same number of parameters", table(results)),
        ("trade", "Quality against latency", quality),
        ("speed", "How fast they are", speed_context(results.benchmark)),
        ("protocol", "How this was measured", describe_units(results)),
    ]
