"""What was published about a shortened model, as data in its recipe, and ours beside it.

Only numbers of one protocol stand side by side: the same text, 128 tokens per segment and the same
BOS for perplexity; whole tasks by the same metric. Memory is carried and not compared, since what
an evaluation held on a device then is not what a benchmark measures here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from shortllm.results import EvaluatedModel, Evaluation, Record

if TYPE_CHECKING:
    from shortllm.recipe import EvaluationOptions

Bos = Literal["first", "every"]

LENGTH = 128
"""Tokens per segment of every published perplexity."""


class PublishedFigures(Record):
    """What was published about one model."""

    perplexity: dict[Bos, dict[str, float]] = Field(
        default_factory=dict,
        description="by where BOS stood, then by text, e.g. 'wikitext2:test'; 128 tokens each",
    )
    tasks: dict[str, float] = Field(default_factory=dict, description="zero-shot scores in percent")
    tasks_mean: float | None = Field(default=None, description="their mean, in percent")
    parameters: int | None = None
    memory_mib: dict[Bos, float] = Field(
        default_factory=dict, description="on the device, while these perplexities were measured"
    )


class Published(Record):
    """What was published about a model, a criterion, and the checkpoint made by both."""

    source: str = Field(description="where, e.g. 'arXiv:2402.02834'")
    checkpoint: str | None = Field(default=None, description="Hub id of the released checkpoint")
    criterion: str
    order: list[int] = Field(description="all blocks, least important first, before protection")
    values: list[float | None] = Field(
        default_factory=list,
        description="the criterion's number for each block; null: beyond all measure",
    )
    removed: list[int] = Field(
        default_factory=list, description="blocks the published model lacks, ascending"
    )
    original: PublishedFigures | None = Field(default=None, description="of the intact model")
    released: PublishedFigures | None = Field(
        default=None, description="of the model that was shortened and healed"
    )


class Beside(Record):
    """One of our numbers and the published one."""

    model: str = Field(description="what the evaluation calls the model")
    quantity: str
    ours: float
    published: float


def beside(
    published: Published, evaluation: Evaluation, options: EvaluationOptions
) -> list[Beside]:
    """Our numbers beside the published ones, where both were got by one protocol.

    The original stands beside the original, and each healed model beside the released one, which
    was healed too.

    Args:
        options: by which the evaluation was made; part of a text or of a task is not compared.
    """
    rows: list[Beside] = []
    for model in evaluation.models:
        figures = None
        if model.name == "original":
            figures = published.original
        elif model.name.startswith("retrained"):
            figures = published.released
        if figures is not None:
            rows += beside_figures(figures, model, options)
    return rows


def beside_figures(
    figures: PublishedFigures, model: EvaluatedModel, options: EvaluationOptions
) -> list[Beside]:
    """The numbers of one model beside those that were published."""
    pairs: list[tuple[str, float, float]] = []
    if figures.parameters is not None:
        pairs.append(("parameters", model.model.parameters, figures.parameters))
    if options.max_segments is None:
        pairs += _perplexities(figures, model)
    if options.limit is None:
        pairs += _tasks(figures, model)
    return [
        Beside(model=model.name, quantity=quantity, ours=ours, published=theirs)
        for quantity, ours, theirs in pairs
    ]


def _perplexities(
    figures: PublishedFigures, model: EvaluatedModel
) -> Iterator[tuple[str, float, float]]:
    for entry in model.perplexity:
        if entry.length != LENGTH or entry.split is not None or entry.bos == "none":
            continue
        theirs = figures.perplexity.get(entry.bos, {}).get(entry.source)
        if theirs is not None:
            yield f"perplexity {entry.source}, BOS {entry.bos}", entry.perplexity, theirs


def _tasks(figures: PublishedFigures, model: EvaluatedModel) -> Iterator[tuple[str, float, float]]:
    from shortllm.zeroshot import METRICS

    for score in model.zeroshot:
        theirs = figures.tasks.get(score.task)
        if theirs is not None and score.metric == METRICS.get(score.task) and not score.shots:
            yield f"{score.task} {score.metric} [%]", 100 * score.score, theirs
    asked = {score.task for score in model.zeroshot}
    if model.zeroshot_mean is not None and figures.tasks_mean is not None:
        if asked == set(figures.tasks):
            yield "mean of tasks [%]", 100 * model.zeroshot_mean, figures.tasks_mean
