"""The section on zero-shot tasks: what each model scores, and how far it fell."""

from __future__ import annotations

from typing import Any

from shortllm.evaluation.harness import is_share
from shortllm.evaluation.options import TaskScore
from shortllm.reporting.loading import RunResults
from shortllm.reporting.wording import (
    MOST_SIDE_BY_SIDE,
    NONE,
    THIN,
    change,
    counted,
    number,
    percent,
    signed,
)


def zeroshot(results: RunResults) -> dict[str, Any] | None:
    """A row per task with the score of each model and its difference from the first model's.

    None where no task was measured.
    """
    models = [entry for entry in results.evaluated.values() if entry.zeroshot]
    if not models:
        return None
    scores = [{score.task: score for score in entry.zeroshot} for entry in models]
    rows = [
        {
            "name": example.task,
            "detail": f"{example.metric}, {_asked(example)}",
            "cells": [_cell(example, of_model.get(example.task)) for of_model in scores],
        }
        for example in models[0].zeroshot
    ]
    means = [entry.zeroshot_mean for entry in models if entry.zeroshot_mean is not None]
    if means:
        cells = [(percent(mean), _points(means[0], mean)) for mean in means]
        rows.append({"name": "mean", "detail": "", "cells": cells})
    harness = results.evaluation.versions.get("lm_eval", "") if results.evaluation else ""
    return {
        "models": [entry.name for entry in models],
        "rows": rows,
        "harness": harness,
        "stacked": len(models) - 1 > MOST_SIDE_BY_SIDE,
    }


def _asked(score: TaskScore) -> str:
    """'1,267 documents', '100 documents after 5 examples'."""
    examples = f" after {counted(score.shots, 'example')}" if score.shots else ""
    return f"{counted(score.documents, 'document')}{examples}"


def _cell(before: TaskScore, after: TaskScore | None) -> tuple[str, str]:
    """A score with its standard error, and its difference where the same was asked."""
    if after is None:
        return NONE, NONE
    show = percent if is_share(after) else number
    text = show(after.score) + (f" ± {show(after.stderr)}" if after.stderr is not None else "")
    if before.documents_fingerprint != after.documents_fingerprint:
        return text, NONE
    difference = _points if is_share(after) else change
    return text, difference(before.score, after.score)


def _points(before: float, after: float) -> str:
    """'−3.2 points': the difference of two shares."""
    points = 100 * (after - before)
    return f"{signed(points, 3) if abs(points) >= 0.005 else '±0'}{THIN}points"
