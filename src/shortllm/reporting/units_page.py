"""The page of width against depth: each method before and after the same healing.

shortllm compare-units embedded
"""

from __future__ import annotations

from shortllm import __version__
from shortllm.comparison.options import Candidate
from shortllm.format import THIN, counted, number, percent, short_count, signed
from shortllm.reporting.comparison import (
    ComparedModel,
    ModelRow,
    common_cell,
    compared_model,
    main_text,
    models_table,
    trade_plots,
    trade_section,
)
from shortllm.reporting.load import UnitsResults, protocol_of
from shortllm.reporting.measurements import peak_bytes, speed_section
from shortllm.reporting.parts import Cell, Head, Paragraph, Section, Table
from shortllm.reporting.protocol import flattened, model_name, perplexity_source, units_protocol
from shortllm.retraining.options import RetrainOptions


def units_head(results: UnitsResults) -> Head:
    """Title and verdict."""
    units = results.units
    before, after = units.model.parameters, units.candidates[0].parameters
    return Head(
        name=model_name(units.model.id),
        revision=(units.model.revision or "")[:12],
        title=f"{short_count(before)} → {short_count(after)} parameters, by width and by depth",
        version=__version__,
        verdict=units_verdict(results),
    )


def units_verdict(results: UnitsResults) -> str:
    """The best and the fastest method, in two sentences."""
    units = results.units
    models = units_models(results)
    shown = [one for one in models if one.run is not None]
    sentence = f"With {percent(1 - units.candidates[0].parameters / units.model.parameters)} of "
    sentence += "the parameters removed"
    text = main_text(models)
    if text is not None:
        healed = [one for one in shown if one.healed_by]
        best = min(healed or shown, key=lambda one: one.perplexity.get(text, float("inf")))
        sentence += (
            f", {best.run} has the lowest perplexity{' after healing' if healed else ''}: "
            f"{number(best.perplexity.get(text))} on {text}"
        )
    timed = [one for one in shown if one.speedup is not None]
    if timed:
        fastest = max(timed, key=lambda one: one.speedup or 0.0)
        sentence += (
            f". The fastest is {fastest.run}, {number(fastest.speedup, 3)} times as fast as the "
            "original"
        )
    return sentence + "."


def units_models(results: UnitsResults) -> list[ComparedModel]:
    """The original, and each candidate before and after healing."""
    models = [_candidate(results, "original", None)]
    for candidate in results.units.candidates:
        for name in (candidate.name, candidate.healed):
            if name in results.evaluated:
                models.append(_candidate(results, name, candidate))
    return models


def _candidate(results: UnitsResults, name: str, candidate: Candidate | None) -> ComparedModel:
    entry, benchmark = results.evaluated[name], results.benchmark
    cell = common_cell(benchmark)
    measured = benchmark.find(candidate.name if candidate else name, *cell) if cell else None
    is_healed = candidate is not None and name == candidate.healed
    method = RetrainOptions.model_validate(results.units.retraining or {}).method
    return compared_model(
        entry,
        {protocol_of(one): perplexity_source(one) for one in entry.perplexity},
        benchmark,
        measured,
        run=f"{candidate.name} ({candidate.unit})" if candidate else None,
        name=name,
        original=model_name(results.units.model.id),
        criterion=candidate.name if candidate else None,
        healed_by=method if is_healed else None,
    )


def units_table(results: UnitsResults) -> Table:
    """A row per method, before and after healing."""
    rows = [_units_row(results, None), *(_units_row(results, c) for c in results.units.candidates)]
    return models_table(
        rows, ("exact parameters", "perplexity", "tasks", "latency", "speedup", "memory")
    )


def _units_row(results: UnitsResults, candidate: Candidate | None) -> ModelRow:
    name, cell = candidate.name if candidate else "original", common_cell(results.benchmark)
    measured = results.benchmark.find(name, *cell) if cell else None
    healed = candidate.healed if candidate and candidate.healed in results.evaluated else None
    missed = candidate.missed if candidate else 0
    return ModelRow(
        name=Cell(name, candidate.unit if candidate else ""),
        model=_candidate(results, name, candidate),
        healed=_candidate(results, healed, candidate) if healed else None,
        deviation=f"{signed(100 * missed, 2)}{THIN}%" if missed else "",
        peak_bytes=peak_bytes(measured.memory) if measured else None,
    )


def units_sections(results: UnitsResults) -> list[Section]:
    """Table, trade-off, speed and protocol of width against depth."""
    cell = common_cell(results.benchmark)
    how = f"batch {cell[0]}, {counted(cell[1], 'new token')}" if cell else "not measured"
    retraining = ", ".join(f"{k} {v}" for k, v in flattened(results.units.retraining or {}))
    note = (
        f"Speed and memory: {how}, alternating between the models. Below the parameters: "
        "deviation from the first method, because only whole units can be removed."
    )
    if any(one.healed for one in results.units.candidates):
        note = f"Before → after the same retraining of each ({retraining}). {note}"
    plots = trade_plots(units_models(results), cell, size=False, numbered=False)
    return [
        Section("units", "Width against depth", [units_table(results), Paragraph(note)]),
        *trade_section("Quality against latency", plots, ""),
        speed_section(results.benchmark),
        units_protocol(results),
    ]
