"""Recovery of quality, by healing and by retraining, and quantizing: sections and sentences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from shortllm.evaluation.options import Perplexity
from shortllm.format import (
    NONE,
    counted,
    model_name,
    number,
    percent,
    short_bytes,
    short_count,
    spans,
)  # fmt: skip
from shortllm.healing import methods as healing_methods
from shortllm.healing.options import HealedGap, Healing
from shortllm.quantizing.options import QUANTIZED
from shortllm.reporting import parts
from shortllm.reporting.charts import Line, LinePlot
from shortllm.reporting.load import Protocol, RunResults
from shortllm.reporting.measurements import perplexity_plot
from shortllm.reporting.parts import Cell, Column, Heading, Part, Section, Table
from shortllm.reporting.plots import COLOURS
from shortllm.reporting.protocol import perplexity_source
from shortllm.retraining.methods import METHODS
from shortllm.retraining.options import Retraining
from shortllm.run_directory import HEALED, PRUNED

PACKING = {
    "stream": "documents end to end, no padding",
    "fit": "as many whole documents per window as fit",
    "alone": "one document per window",
}
BOUNDARIES = {
    "apart": "documents of a window do not attend to each other (positions restart)",
    "joined": "documents of a window attend to those before them",
    "alone": "",
}
STOPPED = {
    "steps": "ran to its last step",
    "patience": "stopped early: the held-out loss no longer fell",
    "minutes": "stopped at its time limit",
}
_CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("training", {"color": COLOURS["muted"], "linewidth": 0.8, "alpha": 0.7}),
    "held_out": (
        "held out (best step is kept)",
        {"color": COLOURS["kept"], "linewidth": 1.8, "marker": "o", "markersize": 3.5},
    ),
}
"""Name and look of the curves of every retraining; further curves differ by their dashes."""


def recovered(before: Perplexity, removed: Perplexity, after: Perplexity) -> float | None:
    """Part of the increase in NLL that was reversed; None without an increase.

    Above 1 where the recovered model is better than the original.
    """
    lost = removed.nll - before.nll
    return (removed.nll - after.nll) / lost if lost > 0 else None


def recovery_sentence(results: RunResults) -> str:
    """What the best healed or retrained model recovered, on the first text; empty without one."""
    before, removed = results.perplexities("original"), results.perplexities(PRUNED)
    for key in (key for key in before if key in removed):
        found = {name: results.perplexities(name).get(key) for name in results.recovered_by}
        after = {name: entry for name, entry in found.items() if entry is not None}
        if not after:
            continue
        best = min(after, key=lambda name: after[name].nll)
        share = recovered(before[key], removed[key], after[best])
        registry = METHODS if best in results.retraining else healing_methods.METHODS
        method, reached = registry.get(results.recovered_by[best]).label, after[best].perplexity
        if share is None or share <= 0:
            return f" {method} led to a perplexity of {number(reached)}."
        return (
            f" {method} brought {number(removed[key].perplexity)} down to {number(reached)}, "
            f"{percent(share)} of the increase in loss."
        )
    return ""


def quantized_sentence(results: RunResults) -> str:
    """Bytes and perplexity of the quantized model, on the first text; empty without one."""
    record, found = results.quantization, results.evaluated.get(QUANTIZED)
    if record is None or found is None:
        return ""
    ratio = percent(found.model.bytes / results.plan.model.bytes)
    sentence = (
        f" Quantized to {record.scheme}, it takes {short_bytes(found.model.bytes)} ({ratio} of the "
        "original)"
    )
    if found.perplexity:
        sentence += f" with a perplexity of {number(found.perplexity[0].perplexity)}"
    return f"{sentence}."


def recovery_section(results: RunResults) -> Section | None:
    """What was recovered, the refitted weights, the loss curves; None without either."""
    if not results.recovered_by:
        return None
    others = ("original", PRUNED, QUANTIZED)
    after = [name for name in results.evaluated if name not in others]
    found: list[Part] = []
    if after:
        names = ["original", PRUNED, *after]
        known = all(name in results.evaluated for name in names)
        plot = perplexity_plot([results.evaluated[name] for name in names]) if known else None
        note = "Recovered: part of the increase in loss (nats per token) that was reversed."
        if results.retraining:
            note += " More than 100 % is possible: retraining also learns from its own text."
        found += [plot.figure()] if plot else []
        found += [_recovery_table(results, names), parts.Paragraph(note)]
    if results.healing:
        method = healing_methods.METHODS.get(results.healing.method)
        found += [Heading(f"Healing: {method.label}"), _maps(results.healing)]
    several = len(results.retraining) > 1
    for name, record in results.retraining.items():
        found.append(Heading(f"Retraining: {name}" if several else "Retraining"))
        found += retraining_parts(record, name, open=not several)
    return Section("recovery", "Recovery", found)


def _recovery_table(results: RunResults, names: Sequence[str]) -> Table:
    columns: list[Column[str]] = [("model", lambda name: Cell(name, _summary(results, name)))]
    for key, example in results.protocols().items():
        columns += _recovery_columns(results, key, f"perplexity, {perplexity_source(example)}")
    means = {name: entry.zeroshot_mean for name, entry in results.evaluated.items()}
    if any(mean is not None for mean in means.values()):
        columns.append(("mean of tasks", lambda name: percent(means.get(name))))
    return parts.table_of(names, columns)


def _recovery_columns(results: RunResults, key: Protocol, heading: str) -> list[Column[str]]:
    """The perplexity of each model on one text, and how much of the increase was recovered."""
    found = {name: results.perplexities(name).get(key) for name in results.evaluated}
    before, removed = found.get("original"), found.get(PRUNED)

    def value(name: str) -> Cell:
        own = found.get(name)
        return Cell(str(own or NONE), look="after")

    def share(name: str) -> str:
        own = found.get(name)
        if name not in results.recovered_by or not (before and removed and own):
            return ""
        return percent(recovered(before, removed, own))

    return [(heading, value), ("recovered", share)]


def _summary(results: RunResults, name: str) -> str:
    """How a model was healed or retrained, in a few words."""
    trained = results.retraining.get(name)
    if trained is not None:
        return f"{trained.steps:,} steps, {trained.trained_parameters:,} parameters trained"
    if name == HEALED and results.healing is not None:
        folded = sum(
            bool(gap.removed) and (bool(gap.changed) or gap.gain != 1.0)
            for gap in results.healing.gaps
        )
        return f"{counted(folded, 'gap')} healed, no training"
    return ""


def _maps(record: Healing) -> Part:
    columns: list[Column[HealedGap]] = [
        ("removed", lambda gap: ", ".join(map(str, gap.removed)) or "none"),
        ("changed in block", _target),
        ("factor", lambda gap: f"{gap.gain:.3f}"),
        ("ridge", lambda gap: number(gap.ridge)),
        ("error", lambda gap: number(gap.error_before)),
        ("healed", lambda gap: number(gap.error_after)),
    ]
    note = parts.Paragraph(
        "Error: squared distance to the hidden states of the original after the gap, relative to "
        "their squared size, on held-out samples. Factor: of the whole hidden state behind the "
        "gap. Ridge: how strongly weights are kept near what they were."
    )
    text = f"{counted(record.samples, 'sample')} of {counted(record.length, 'token')}"
    summary = f"Fitted on {text} from {model_name(record.data)}"
    return parts.Details(summary, [parts.table_of(record.gaps, columns), note], open=True)


def _target(gap: HealedGap) -> str:
    return (
        "no block before the gap"
        if gap.block is None
        else f"{spans([*gap.earlier, gap.block])}, {' and '.join(gap.changed) or 'nothing'}"
    )


def retraining_parts(record: Retraining, name: str, *, open: bool = True) -> list[Part]:
    """The loss curves of a retraining, and its key figures."""
    curves = dict(record.curves.get("held_out", ()))
    kept, summary = curves.get(record.best_step), f"{record.steps:,} steps"
    if kept is not None:
        first = next(iter(curves.values()))
        summary += f", held-out loss {number(first, 4)} → {number(kept, 4)}"
    method, data = METHODS.get(record.method).help.rstrip("."), record.data
    documents = f"{counted(data.documents, 'document')}, {data.held_out:,} held out"
    rows = [
        ("method", method),
        ("trained", f"{short_count(record.trained_parameters)} parameters"),
        ("teacher", model_name(record.teacher.id) if record.teacher else ""),
        ("data", f"{model_name(data.source)}, {documents}"),
        ("windows", f"{data.windows:,} of {data.length:,} tokens, {PACKING[data.packing]}"),
        ("boundaries", BOUNDARIES[data.boundaries]),
        ("steps", f"{record.steps:,}, best at {record.best_step:,}; {STOPPED[record.stopped]}"),
        ("tokens seen", short_count(record.tokens_seen)),
    ]
    terms = parts.Terms([(what, how) for what, how in rows if how])
    plot = _loss_plot(record, name)
    details = parts.Details(f"{method}: {summary}", [terms], open=open)
    return [*([plot.figure()] if plot else []), details]


def _loss_plot(record: Retraining, name: str) -> LinePlot | None:
    dashes, lines = itertools.cycle(("--", ":", "-.")), []
    for curve, points in record.curves.items():
        label, style = _CURVES.get(curve, (curve, {"color": COLOURS["removed"], "linewidth": 1.3}))
        if curve not in _CURVES:
            style |= {"linestyle": next(dashes)}
        if points:
            lines.append(Line(name=label, points=points, style=style))
    if not lines:
        return None
    return LinePlot(
        lines=lines,
        x_label="step",
        y_label="loss [nats per token]",
        mark=record.best_step,
        name=f"the retraining {name}, best at step {record.best_step}",
    )
