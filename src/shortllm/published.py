"""Published figures of shortened models, next to ours.

A recipe can contain what was published about its model. Only figures of the same protocol are
compared: the same text, 128 tokens per segment and the same BOS for perplexity; whole tasks by the
same metric. Published memory is kept but not compared, because it was not measured as here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from shortllm.evaluation.options import EvaluatedModel, Evaluation, TaskPrompts
from shortllm.format import counted, named_blocks
from shortllm.records import Record

if TYPE_CHECKING:
    from shortllm.evaluation.options import EvaluationOptions

Bos = Literal["first", "every"]

LENGTH = 128
"""Tokens per segment of every published perplexity."""

PARAMETERS = "parameters"
MEAN = "mean of tasks [%]"


class PublishedFigures(Record):
    """The published figures of one model."""

    perplexity: dict[Bos, dict[str, float]] = Field(
        default_factory=dict,
        description="by position of BOS, then by text, e.g. 'wikitext2:test'; 128 tokens each",
    )
    tasks: dict[str, float] = Field(default_factory=dict, description="zero-shot scores in percent")
    tasks_mean: float | None = Field(default=None, description="their mean, in percent")
    parameters: int | None = None
    memory_mib: dict[Bos, float] = Field(
        default_factory=dict, description="on the device during these evaluations"
    )


class Published(Record):
    """What was published about a model, a criterion, and the resulting checkpoint."""

    source: str = Field(description="where, e.g. 'arXiv:2402.02834'")
    checkpoint: str | None = Field(default=None, description="Hub id of the released checkpoint")
    criterion: str
    order: list[int] = Field(description="all blocks, least important first, before protection")
    values: list[float | None] = Field(
        default_factory=list,
        description="the criterion's number for each block; null: too large to state",
    )
    removed: list[int] = Field(
        default_factory=list, description="blocks the published model lacks, ascending"
    )
    original: PublishedFigures | None = Field(default=None, description="of the intact model")
    released: PublishedFigures | None = Field(
        default=None, description="of the shortened and retrained model"
    )


class PublishedComparison(Record):
    """One of our figures and the published one."""

    model: str = Field(description="what the evaluation calls the model")
    quantity: str
    ours: float
    published: float


def published_comparison(
    published: Published, evaluation: Evaluation, options: EvaluationOptions
) -> list[PublishedComparison]:
    """Our figures and the published ones, where both have the same protocol.

    The original is compared with the published original, and each retrained model with the
    released one, which was retrained as well. Under `options` that measure only a part of a text or
    task, that text or task is not compared.
    """
    rows: list[PublishedComparison] = []
    for model in evaluation.models:
        if model.name == "original" and published.original is not None:
            theirs = published_numbers(published.original)
        elif model.name.startswith("retrained") and published.released is not None:
            theirs = published_numbers(published.released)
        else:
            continue
        rows += side_by_side(model.name, our_numbers(model, options), theirs)
    return rows


def side_by_side(
    model: str, ours: Mapping[str, float], theirs: Mapping[str, float]
) -> list[PublishedComparison]:
    """The quantities that both sides have."""
    return [
        PublishedComparison(model=model, quantity=quantity, ours=value, published=theirs[quantity])
        for quantity, value in ours.items()
        if quantity in theirs
    ]


def published_numbers(figures: PublishedFigures) -> dict[str, float]:
    """The published figures of a model by quantity; the protocol is part of a quantity's name."""
    from shortllm.evaluation.task_names import METRICS

    numbers: dict[str, float] = {}
    if figures.parameters is not None:
        numbers[PARAMETERS] = figures.parameters
    for bos, by_text in figures.perplexity.items():
        numbers |= {perplexity_of(text, bos): value for text, value in by_text.items()}
    numbers |= {task_of(task, METRICS[task]): value for task, value in figures.tasks.items()}
    if figures.tasks_mean is not None:
        numbers[MEAN] = figures.tasks_mean
    return numbers


def our_numbers(model: EvaluatedModel, options: EvaluationOptions) -> dict[str, float]:
    """Our figures of a model by quantity, as far as the protocol is that of the paper."""
    from shortllm.evaluation.task_names import METRICS

    numbers: dict[str, float] = {PARAMETERS: model.model.parameters}
    if options.max_segments is None:
        numbers |= {
            perplexity_of(entry.source, entry.bos): entry.perplexity
            for entry in model.perplexity
            if entry.length == LENGTH and entry.split is None
        }
    if options.limit is None and options.task_prompts == TaskPrompts():
        numbers |= {
            task_of(score.task, score.metric): 100 * score.score
            for score in model.zeroshot
            if not score.shots
        }
        if model.zeroshot_mean is not None and {s.task for s in model.zeroshot} == set(METRICS):
            numbers[MEAN] = 100 * model.zeroshot_mean
    return numbers


def perplexity_of(text: str, bos: str) -> str:
    """Name of a perplexity in a table."""
    return f"perplexity {text}, BOS {bos}"


def task_of(task: str, metric: str) -> str:
    """Name of a task's score in a table."""
    return f"{task} {metric} [%]"


def compared_blocks(published: Published, removed: Sequence[int]) -> str:
    """Which blocks were removed here and there, in one sentence."""
    theirs, ours = set(published.removed), set(removed)
    if ours == theirs:
        return f"{named_blocks(published.removed, 'were').capitalize()} removed, as published."
    return (
        f"The published model lacks {named_blocks(published.removed)}; {len(ours & theirs)} of "
        f"these were removed here as well, and {counted(len(ours - theirs), 'other')}."
    )
