"""The section on healing: what came back, and how each way of healing went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shortllm.evaluation.options import Perplexity
from shortllm.healing.options import Healing
from shortllm.quantizing.options import QUANTIZED
from shortllm.reporting.loading import RunResults
from shortllm.reporting.names import model_name
from shortllm.reporting.plots.dots import DotPlot
from shortllm.reporting.protocol import perplexity_source
from shortllm.reporting.retraining import retraining_section
from shortllm.reporting.wording import NONE, counted, number, percent
from shortllm.run_directory import HEALED, PRUNED

Context = dict[str, Any]


def healing(results: RunResults) -> Context | None:
    """A row per model with its perplexities and what came back, the maps folded in, and the curves
    of each retraining.

    None where nothing was healed.
    """
    if not results.healed_by:
        return None
    names = [name for name in results.evaluated if name not in ("original", PRUNED, QUANTIZED)]
    protocols = list(results.protocols().items())
    rows = [_row(results, name, protocols) for name in ("original", PRUNED, *names)]
    plot = _plot(results, ["original", PRUNED, *names]) if names else None
    return {
        "texts": [perplexity_source(example) for _, example in protocols],
        "rows": rows if names else [],
        "tasks": any(entry.zeroshot_mean is not None for entry in results.evaluated.values()),
        "plot": plot and {"wide": plot.svg("wide"), "narrow": plot.svg("narrow")},
        "maps": _maps(results.healing) if results.healing else None,
        "retrained": bool(results.retraining),
        "curves": [
            {"name": name, "several": len(results.retraining) > 1, **retraining_section(record)}
            for name, record in results.retraining.items()
        ],
    }


def came_back(before: Perplexity, removed: Perplexity, healed: Perplexity) -> float | None:
    """Part of the loss in NLL through the removal that healing has won back; None without a loss.

    Above 1 where the healed model is better than the original was.
    """
    lost = removed.nll - before.nll
    return (removed.nll - healed.nll) / lost if lost > 0 else None


def _row(
    results: RunResults, name: str, protocols: Sequence[tuple[tuple[object, ...], Perplexity]]
) -> Context:
    """A model's perplexity on each text, what came back of it, and its mean task score."""
    before, removed = results.perplexities("original"), results.perplexities(PRUNED)
    own = results.perplexities(name)
    cells = []
    for key, _ in protocols:
        share = None
        if name in results.healed_by and key in before and key in removed and key in own:
            share = came_back(before[key], removed[key], own[key])
        perplexity = number(own[key].perplexity) if key in own else NONE
        cells.append((perplexity, percent(share) if share is not None else ""))
    mean = results.evaluated[name].zeroshot_mean if name in results.evaluated else None
    return {
        "name": name,
        "detail": _detail(results, name),
        "cells": cells,
        "mean": percent(mean) if mean is not None else NONE,
    }


def _detail(results: RunResults, name: str) -> str:
    """What healing has done, in a few words."""
    trained = results.retraining.get(name)
    if trained is not None:
        return f"{trained.steps} steps, {trained.trained_parameters:,} parameters trained"
    if name == HEALED and results.healing is not None:
        folded = sum(gap.ridge is not None for gap in results.healing.gaps)
        return f"{counted(folded, 'linear map')} folded in, nothing trained"
    return ""


def _maps(record: Healing) -> Context:
    """A row per gap: what was removed, what it was folded into, and the error before and after."""
    return {
        "summary": f"Linear maps from {record.samples} samples of {record.length} tokens of "
        f"{model_name(record.data)}",
        "rows": [
            (
                ", ".join(map(str, gap.removed)),
                "none is before it" if gap.block is None else f"{gap.block}, {gap.projection}",
                number(gap.ridge) if gap.ridge is not None else NONE,
                number(gap.error_before) if gap.error_before is not None else NONE,
                number(gap.error_after) if gap.error_after is not None else NONE,
            )
            for gap in record.gaps
        ],
    }


def _plot(results: RunResults, names: Sequence[str]) -> DotPlot | None:
    """Perplexity of each model on the first text that all were measured on."""
    by_name = {name: results.perplexities(name) for name in names}
    for key, example in results.protocols().items():
        if all(key in found for found in by_name.values()):
            return DotPlot(
                names=list(names),
                values=[by_name[name][key].perplexity for name in names],
                colours=["protected", "removed", *["kept"] * (len(names) - 2)],
                label=f"perplexity on {perplexity_source(example)}",
            )
    return None
