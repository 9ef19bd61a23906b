"""What each section of the page shows: a function per section, from results to plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shortllm.reporting.loading import RunResults
from shortllm.reporting.names import model_name
from shortllm.reporting.plots import SensitivityPlot
from shortllm.reporting.protocol import (
    calibration_phrase,
    describe_protocol,
    perplexity_source,
    segments_phrase,
)
from shortllm.reporting.wording import (
    change,
    counted,
    number,
    percent,
    short_bytes,
    short_count,
    signed,
)

Context = dict[str, Any]

LONG_TABLE = 16
"""A table of more blocks than this is folded away until asked for."""

IMPORTANCE_LABELS = {
    "kl": "KL divergence from the intact model [nats per token]",
    "influence": "block influence, 1 − cos [no unit]",
    "angular": "angular distance [fraction of π]",
    "relative": "relative size of the block's update [no unit]",
}
"""What the axis of a criterion says; any other: 'importance (NAME)'."""


def head(results: RunResults) -> Context:
    """Title and the one-sentence verdict."""
    plan = results.plan
    return {
        "name": model_name(plan.model.id),
        "revision": (plan.model.revision or "")[:12],
        "before": plan.model.blocks,
        "after": len(plan.kept),
        "version": results.run.shortllm,
        "verdict": verdict(results),
    }


def verdict(results: RunResults) -> str:
    """What was removed, what it saves, what it costs, in one sentence."""
    plan = results.plan
    if not plan.removed:
        return f"No block was removed: all {plan.model.blocks} remain."
    saved = percent(plan.reached.parameter_ratio)
    sentence = (
        f"Removing {len(plan.removed)} of {counted(plan.model.blocks, 'block')} saves "
        f"{saved} of the parameters"
    )
    pruned = results.evaluated.get("pruned")
    if pruned:
        saved_bytes = percent(1 - pruned.model.bytes / plan.model.bytes)
        sentence += f" and {'' if saved_bytes == saved else f'{saved_bytes} '}of the bytes on disk"
    compared = [
        (source, before, after) for source, (before, after) in _before_and_after(results).items()
    ]
    if not compared:
        return f"{sentence}; the perplexity was not measured."
    source, before, after = compared[0]
    if after == before:
        sentence += f"; perplexity stays at {number(before)} on {source}"
    else:
        verb = "rises" if after > before else "falls"
        sentence += (
            f"; perplexity {verb} from {number(before)} to {number(after)} "
            f"({change(before, after)}) on {source}"
        )
    if len(compared) > 1:
        source, before, after = compared[1]
        move = f"from {number(before)} to" if after != before else "stays at"
        sentence += f", and {move} {number(after)} on {source}"
    return f"{sentence}."


def _before_and_after(results: RunResults) -> dict[str, tuple[float, float]]:
    """Perplexities per text, where original and pruned model saw the same tokens."""
    after = results.perplexities("pruned")
    return {
        perplexity_source(entry): (entry.perplexity, after[key].perplexity)
        for key, entry in results.perplexities("original").items()
        if key in after
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity: that of the original, then value and change for each further model."""

    name: str
    detail: str = ""
    original: str
    cells: Sequence[tuple[str, str]]


def key_figures(results: RunResults) -> Context:
    """Blocks, parameters, bytes and perplexities: original, pruned, change."""
    plan, original = results.plan, results.plan.model
    sizes: dict[str, tuple[int, int, int | None]] = {
        name: (entry.model.blocks, entry.model.parameters, entry.model.bytes)
        for name, entry in results.evaluated.items()
        if name != "original"
    }
    # The plan alone tells all of the pruned model but its bytes.
    sizes.setdefault(
        "pruned", (len(plan.kept), original.parameters - plan.reached.parameters, None)
    )
    show: tuple[Callable[[Any], str], ...] = (str, short_count, short_bytes)
    before = (original.blocks, original.parameters, original.bytes)
    rows = [
        Row(
            name=name,
            original=show[i](before[i]),
            cells=[(show[i](size[i]), change(before[i], size[i])) for size in sizes.values()],
        )
        for i, name in enumerate(("blocks", "parameters", "bytes on disk"))
    ]
    return {"models": list(sizes), "rows": rows + _perplexity_rows(results, list(sizes))}


def _perplexity_rows(results: RunResults, names: Sequence[str]) -> list[Row]:
    """One row per protocol, so that only perplexities of the same tokens stand side by side."""
    by_model = {name: results.perplexities(name) for name in ("original", *names)}
    rows = []
    for key, example in results.protocols().items():
        values = {
            name: entries[key].perplexity if key in entries else None
            for name, entries in by_model.items()
        }
        before = values["original"]
        rows.append(
            Row(
                name=f"perplexity, {perplexity_source(example)}",
                detail=segments_phrase(example),
                original=number(before),
                cells=[(number(values[name]), change(before, values[name])) for name in names],
            )
        )
    return rows


def sensitivity(results: RunResults) -> Context | None:
    """The plot of the criterion, one bar per block."""
    scores = results.scores
    if scores is None:
        return None
    increase = False
    if scores.criterion == "ppl" and scores.intact is not None:
        increase = True
        heights = [value - scores.intact for value in scores.values]
        label = f"increase in perplexity (intact: {number(scores.intact)})"
    else:
        heights = scores.importance
        label = IMPORTANCE_LABELS.get(scores.criterion, f"importance ({scores.criterion})")
        if scores.intact is not None:
            label += f"; intact: {number(scores.intact)}"
    calibration = results.calibration if scores.calibration is not None else None
    plot = SensitivityPlot(
        heights=heights,
        statuses=[results.status(block) for block in range(len(heights))],
        y_label=label,
        below_label="no increase" if increase else "too small for the axis",
    )
    return {
        "wide": plot.svg("wide"),
        "narrow": plot.svg("narrow"),
        "increase": increase,
        "criterion": scores.criterion,
        "intact": number(scores.intact),
        "log": plot.log_floor is not None,
        "foot": f"{plot.linear_floor:,g}" if plot.log_floor is None and plot.linear_floor else None,
        "calibration": calibration_phrase(calibration) if calibration else None,
        "dtype": scores.dtype,
        "helpful": [block for block, height in enumerate(heights) if increase and height < 0],
    }


def strip(results: RunResults) -> Context:
    """The model as a row of cells, the removed ones struck out."""
    plan, new_index = results.plan, results.new_index
    return {
        "cells": [
            {"block": block, "status": results.status(block), "new": new_index.get(block)}
            for block in range(plan.model.blocks)
        ],
        "removed": plan.removed,
        "protected": sorted(plan.protected),
    }


def block_table(results: RunResults) -> Context | None:
    """Every number behind the plot."""
    scores = results.scores
    if scores is None:
        return None
    count = len(scores.importance)
    by_importance = sorted(range(count), key=lambda block: (scores.importance[block], block))
    rank = {block: place for place, block in enumerate(by_importance, start=1)}
    new_index = results.new_index
    return {
        "rows": [
            {
                "block": block,
                "importance": number(scores.importance[block], 5),
                "value": number(scores.values[block], 5),
                "delta_nll": signed(scores.delta_nll[block], 3) if scores.delta_nll else None,
                "rank": rank[block],
                "status": results.status(block),
                "new": new_index.get(block),
            }
            for block in range(count)
        ],
        "perplexity": scores.criterion == "ppl",
        "same": scores.values == scores.importance,
        "delta_nll": scores.delta_nll is not None,
        "folded": count > LONG_TABLE,
    }


def samples(results: RunResults) -> Context | None:
    """Continuations of the same prompt by each model, side by side."""
    columns = [(entry, entry.samples) for entry in results.evaluated.values() if entry.samples]
    if not columns:
        return None
    _, first = columns[0]
    same_prompt = all(written.prompt == first.prompt for _, written in columns)
    return {
        "columns": [
            {
                "name": entry.name,
                "blocks": entry.model.blocks,
                "prompt": written.prompt,
                "texts": written.texts,
            }
            for entry, written in columns
        ],
        "count": max(len(written.texts) for _, written in columns),
        "prompt": first.prompt if same_prompt else None,
        "settings": f"up to {counted(first.new_tokens, 'new token')}, top-k {first.top_k}, "
        f"top-p {first.top_p:g}, temperature {first.temperature:g}, seed {first.seed}",
    }


SECTIONS: tuple[tuple[str, str, Callable[[RunResults], Context | None]], ...] = (
    ("figures", "Key figures", key_figures),
    ("sensitivity", "What each block is worth", sensitivity),
    ("strip", "What remains", strip),
    ("blocks", "Every block", block_table),
    ("samples", "What it writes", samples),
    ("protocol", "How this was measured", describe_protocol),
)
"""Name of the partial (also the anchor in the page), heading, and what the partial shows."""
