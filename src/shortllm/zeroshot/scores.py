"""Scores of tasks for a reader: which have a mean, how they are written, zeroshot.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from shortllm.files import write_text
from shortllm.results.evaluation import Evaluation, TaskScore

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of right answers: shown in percent, and of which a mean makes sense."""


def is_share(score: TaskScore) -> bool:
    """Whether a score is a share of right answers, in [0, 1]."""
    return score.metric.partition(",")[0] in SHARES


def mean_score(scores: Sequence[TaskScore]) -> float | None:
    """The plain mean over tasks, in [0, 1]; None where a score is no share of right answers."""
    if not scores or not all(map(is_share, scores)):
        return None
    return sum(score.score for score in scores) / len(scores)


def metric_phrase(score: TaskScore) -> str:
    """'acc_norm [%]'."""
    return f"{score.metric} [%]" if is_share(score) else score.metric


def score_phrase(score: TaskScore) -> str:
    """'75.98 ± 0.43': the score and its standard error, in percent where it is a share."""
    scale = 100 if is_share(score) else 1
    error = "" if score.stderr is None else f" ± {scale * score.stderr:.2f}"
    return f"{scale * score.score:.2f}{error}"


def write_table(evaluation: Evaluation, path: Path) -> None:
    """zeroshot.csv as Shortened LLaMA publishes it: rows of tasks, metrics, and scores in percent.

    The last column is the mean. Several models get a row each, and a first column with their names.
    """
    models = evaluation.models
    first = models[0].zeroshot
    rows = [
        [*(score.task for score in first), "AVE"],
        [*(score.metric for score in first), "n/a"],
        *([*map(_cell, model.zeroshot), _percent(model.zeroshot_mean)] for model in models),
    ]
    if len(models) > 1:
        heads = ["model", "metric", *(model.name for model in models)]
        rows = [[head, *row] for head, row in zip(heads, rows, strict=True)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def _cell(score: TaskScore) -> str:
    return _percent(score.score) if is_share(score) else repr(score.score)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else repr(100 * share)


def table_beside(evaluation_file: Path) -> Path:
    """zeroshot.csv beside eval.json; NAME-zeroshot.csv beside a NAME.json."""
    stem = evaluation_file.stem
    return evaluation_file.with_name("zeroshot.csv" if stem == "eval" else f"{stem}-zeroshot.csv")
