"""Tasks that lm-evaluation-harness runs on a loaded model, one score of each, and zeroshot.csv."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shortllm.errors import CheckpointError, ShortLLMError
from shortllm.evaluation.options import Evaluation, TaskScore
from shortllm.evaluation.tasks import METRICS, TaskSet, quiet_harness
from shortllm.files import fingerprint, write_text
from shortllm.runtime import progress

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of right answers: shown in percent, and a mean of them makes sense."""

BOOTSTRAPS = 1000
"""Draws for the standard error of a metric that is not a mean."""

log = logging.getLogger(__name__)


def is_share(score: TaskScore) -> bool:
    """Whether a score is a share of right answers, in [0, 1]."""
    return score.metric.partition(",")[0] in SHARES


def mean_score(scores: Sequence[TaskScore]) -> float | None:
    """The plain mean over tasks, in [0, 1]; None where a score is not a share."""
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


def table_path(evaluation_file: Path) -> Path:
    """zeroshot.csv next to eval.json, NAME-zeroshot.csv next to NAME.json."""
    stem = evaluation_file.stem
    return evaluation_file.with_name("zeroshot.csv" if stem == "eval" else f"{stem}-zeroshot.csv")


def measure_tasks(model: Any, tokenizer: Any, tasks: TaskSet, *, name: str) -> list[TaskScore]:
    """A score of each task, or of each group that has a metric of its own; `name` is shown on the
    progress bar."""
    import torch
    from lm_eval.evaluator import evaluate

    with progress(f"tasks of {name}", 1.0) as advance, quiet_harness():
        harness_model = _harness_model(model, tokenizer, tasks.batch_size, advance)
        try:
            found = evaluate(
                lm=harness_model,
                task_dict=tasks.loaded,
                limit=tasks.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        except torch.OutOfMemoryError as error:
            raise ShortLLMError(
                f"{tasks.batch_size} sequences at once do not fit into the memory of "
                f"{model.device}. Give a smaller --batch-size"
            ) from error
    return [
        _task_score(entry, found, tasks)
        for requested, members in tasks.members.items()
        for entry in ([requested] if _metrics(found["results"].get(requested, {})) else members)
    ]


def _harness_model(
    model: Any, tokenizer: Any, batch_size: int, advance: Callable[[float], None]
) -> Any:
    """The harness's own model class around a loaded model; `advance` gets the share of work."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):  # type: ignore[misc]
        """Reports progress, and stops at logits that are NaN."""

        share = 0.0

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            if override_bs is None:  # else these are only a part of the work
                read = {(*context, *answer[:-1]) for _, context, answer in requests}
                self.share = 1.0 / len(read)  # equal requests are computed once
            room = self.max_length + 1  # the last token is only predicted
            longer = sum(len(context) + len(answer) > room for _, context, answer in requests)
            if longer:
                message = "%d of %d prompts with answer exceed %d tokens: their beginning is cut"
                log.info(message, longer, len(requests), room)
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits_BTV = super()._model_call(inps, *args, **kwargs)
            if logits_BTV.isnan().any():
                raise CheckpointError("the model's logits are NaN. Try --dtype float32")
            advance(len(inps) * self.share)
            return logits_BTV

    return Watched(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task by metric, without its filter where that is the plain one."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in measured.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _task_score(task: str, found: Mapping[str, Any], tasks: TaskSet) -> TaskScore:
    """One line of the result from what the harness returned."""
    measured = found["results"][task]
    metrics = _metrics(measured)
    if not metrics:
        raise ShortLLMError(f"task '{task}' has no metric. Leave it out")
    metric = METRICS.get(task) or next(iter(metrics))
    name, _, rule = metric.partition(",")
    stderr = measured.get(f"{name}_stderr,{rule or 'none'}")
    members = tasks.members.get(task, [task])
    version = found["versions"].get(task)
    return TaskScore(
        task=task,
        metric=metric,
        score=metrics.pop(metric),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        others=metrics,
        documents=sum(found["n-samples"][member]["effective"] for member in members),
        documents_fingerprint=fingerprint([tasks.documents[member] for member in members]),
        shots=found["n-shot"].get(task),
        version=None if version is None else str(version),
    )
