"""What each section of the page shows: a function per section, from results to plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shortllm.pruning.planning import removal_order
from shortllm.pruning.records import BlockScores
from shortllm.reporting.healing import healing
from shortllm.reporting.loading import RunResults
from shortllm.reporting.names import model_name
from shortllm.reporting.plots.sensitivity import SensitivityPlot
from shortllm.reporting.protocol import (
    calibration_phrase,
    describe_protocol,
    perplexity_source,
    segments_phrase,
)
from shortllm.reporting.published import published_section
from shortllm.reporting.selection import selection
from shortllm.reporting.speed import speed_context
from shortllm.reporting.verdict import verdict
from shortllm.reporting.wording import (
    MOST_SIDE_BY_SIDE,
    NONE,
    change,
    counted,
    number,
    short_bytes,
    short_count,
    signed,
)
from shortllm.reporting.zeroshot import zeroshot
from shortllm.run_directory import PRUNED

Context = dict[str, Any]

LONG_TABLE = 16
"""A table of more blocks than this is folded away until asked for."""

PLACE = "place in the order of removal (1 = goes first)"

IMPORTANCE_LABELS = {
    "ppl": "perplexity without the block",
    "kl": "KL divergence from the intact model [nats per token]",
    "taylor": "estimated change of the loss, |weight × gradient|",
    "magnitude": "size of the weights, |weight|",
    "influence": "block influence, 1 − cos [no unit]",
    "relative": "relative size of the block's update [no unit]",
    "angular": "angular distance [fraction of π]",
    "greedy": PLACE,
    "local": PLACE,
    "evolve": PLACE,
    "auto": PLACE,
    "last": PLACE,
    "random": PLACE,
    "even": PLACE,
}
"""What the axis of a criterion says; any other: 'importance (NAME)'. Of those whose importance is a
place, places are shown."""


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
    sizes.setdefault(PRUNED, (len(plan.kept), original.parameters - plan.reached.parameters, None))
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
    return {
        "models": list(sizes),
        "rows": rows + _perplexity_rows(results, list(sizes)),
        "stacked": len(sizes) > MOST_SIDE_BY_SIDE,
    }


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
    increase = scores.criterion == "ppl" and scores.intact is not None
    heights, label = _heights(scores)
    calibration = results.calibration if scores.calibration is not None else None
    span = _span(results)
    plot = SensitivityPlot(
        heights=heights,
        statuses=[results.status(block) for block in range(len(heights))],
        y_label=label,
        below_label="no increase" if increase else "too small for the axis",
        span=(span["first"], span["last"]) if span else None,
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
        "place": label == PLACE,
        "inner": scores.options.get("inner"),
        "order": _order(results),
        "searched": scores.search.ordered_by if scores.search else None,
        "span": span,
    }


def _heights(scores: BlockScores) -> tuple[list[float], str]:
    """What is drawn for each block, and what the axis says."""
    if scores.criterion == "ppl" and scores.intact is not None:
        label = f"increase in perplexity (intact: {number(scores.intact)})"
        return [value - scores.intact for value in scores.values], label
    label = IMPORTANCE_LABELS.get(scores.criterion, f"importance ({scores.criterion})")
    if label == PLACE:
        rank = _ranks(scores)
        return [float(rank[block]) for block in range(len(rank))], label
    if scores.intact is not None:
        label += f"; intact: {number(scores.intact)}"
    return scores.importance, label


def _ranks(scores: BlockScores) -> dict[int, int]:
    """The place of each block in the order in which blocks go, from 1."""
    order = removal_order(scores.importance, protected=[])
    return {block: place for place, block in enumerate(order, start=1)}


def _order(results: RunResults) -> list[int] | None:
    """The removed blocks in order, where each was chosen with the ones before it gone."""
    scores = results.scores
    by_rounds = scores is not None and scores.order is not None and scores.removed is None
    return results.plan.order if by_rounds and results.plan.criterion else None


def _span(results: RunResults) -> Context | None:
    """The removed blocks as a span, where the criterion scores spans and one span went."""
    scores, removed = results.scores, results.plan.removed
    if scores is None or scores.spans is None or not results.plan.criterion or not removed:
        return None
    first, last = removed[0], removed[-1]
    if last - first + 1 != len(removed):
        return None
    alike = scores.spans[len(removed) - 1]
    protected = set(results.plan.protected)
    free = [
        distance
        for start, distance in enumerate(alike)
        if not protected & set(range(start, start + len(removed)))
    ]
    return {
        "first": first,
        "last": last,
        "count": len(removed),
        "distance": number(alike[first]),
        "least": alike[first] <= min(free, default=alike[first]),
        "free": len(free),
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
        "order": _order(results),
        "span": _span(results),
        "protected": sorted(plan.protected),
        "target": results.target.described if results.target else None,
        "short": bool(results.target and not results.target.is_met),
    }


def block_table(results: RunResults) -> Context | None:
    """Every number behind the plot."""
    scores = results.scores
    if scores is None:
        return None
    count = len(scores.importance)
    rank, new_index = _ranks(scores), results.new_index
    searched = scores.removed is not None
    unscored = results.plan.protected if scores.order is not None and not searched else []
    return {
        "rows": [
            {
                "block": block,
                "importance": number(scores.importance[block], 5),
                "value": NONE if block in unscored else number(scores.values[block], 5),
                "delta_nll": signed(scores.delta_nll[block], 3) if scores.delta_nll else None,
                "rank": rank[block],
                "status": results.status(block),
                "new": new_index.get(block),
            }
            for block in range(count)
        ],
        "place": IMPORTANCE_LABELS.get(scores.criterion) == PLACE,
        "inner": scores.options.get("inner"),
        "perplexity": scores.criterion == "ppl",
        "same": searched or scores.values == scores.importance,
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


def speed(results: RunResults) -> Context | None:
    """Latency, throughput and memory, where they were measured."""
    return speed_context(results.benchmark) if results.benchmark else None


SECTIONS: tuple[tuple[str, str, Callable[[RunResults], Context | None]], ...] = (
    ("figures", "Key figures", key_figures),
    ("sensitivity", "What each block is worth", sensitivity),
    ("selection", "Which removal won", selection),
    ("strip", "What remains", strip),
    ("blocks", "Every block", block_table),
    ("healing", "What came back", healing),
    ("zeroshot", "What it can answer", zeroshot),
    ("speed", "What it gained", speed),
    ("published", "Beside the published", published_section),
    ("samples", "What it writes", samples),
    ("protocol", "How this was measured", describe_protocol),
)
"""Name of the partial (also the anchor in the page), heading, and what the partial shows."""
