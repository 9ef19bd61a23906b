"""Published figures of shortened models, next to ours.

A recipe can contain what was published about its model. Only figures of the same protocol are
compared: the same text, 128 tokens per segment and the same BOS for perplexity; whole tasks by the
same metric. Published memory is kept but not compared, because it was not measured as here.

`measure_released` evaluates and benchmarks the released checkpoints themselves, each in a directory
of its own, `runs/published/<recipe>/`. What is up to date is skipped, and a checkpoint that cannot
be measured does not stop the others.

    shortllm recipes run published --device cuda
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from shortllm.errors import ShortLLMError
from shortllm.evaluation.options import EvaluatedModel, Evaluation
from shortllm.files import releasing, write_text
from shortllm.records import Record

if TYPE_CHECKING:
    from shortllm.benchmark.options import Benchmark
    from shortllm.checkpoint.source import Checkpoint
    from shortllm.evaluation.options import EvaluationOptions
    from shortllm.evaluation.perplexity import EvaluationText
    from shortllm.recipe import Recipe

log = logging.getLogger(__name__)

Bos = Literal["first", "every"]

LENGTH = 128
"""Tokens per segment of every published perplexity."""

PARAMETERS = "parameters"
MEAN = "mean of tasks [%]"

DIRECTORY = Path("runs") / "published"
TABLE = "published.csv"
MODES: tuple[Bos, ...] = ("first", "every")


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
        default=None, description="of the shortened and healed model"
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

    The original is compared with the published original, and each healed model with the released
    one, which was healed as well. Under `options` that measure only a part of a text or task,
    that text or task is not compared.
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
    from shortllm.evaluation.tasks import METRICS

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
    from shortllm.evaluation.tasks import METRICS

    numbers: dict[str, float] = {PARAMETERS: model.model.parameters}
    if options.max_segments is None:
        numbers |= {
            perplexity_of(entry.source, entry.bos): entry.perplexity
            for entry in model.perplexity
            if entry.length == LENGTH and entry.split is None
        }
    if options.limit is None:
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
    blocks = ", ".join(map(str, published.removed))
    if ours == theirs:
        return f"Blocks {blocks} were removed, as published."
    return (
        f"The published model lacks blocks {blocks}; {len(ours & theirs)} of these were removed "
        f"here as well, and {len(ours - theirs)} others."
    )


# ---- released checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One released checkpoint, measured here."""

    checkpoint: str
    directory: Path
    evaluated: EvaluatedModel
    benchmark: Benchmark | None
    ours: dict[str, float]
    """By quantity."""
    theirs: dict[str, float]
    """The published figures by quantity; may be empty."""

    @property
    def comparison(self) -> list[PublishedComparison]:
        """The quantities that both sides have."""
        return side_by_side(self.checkpoint, self.ours, self.theirs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """All released checkpoints by the names of their recipes."""

    measured: dict[str, Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Reasons of those that could not be measured."""
    table: Path


def released_recipes(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes whose checkpoint was released."""
    return {
        name: recipe
        for name, recipe in recipes.items()
        if recipe.published is not None and recipe.published.checkpoint is not None
    }


def measure_released(
    recipes: Mapping[str, Recipe],
    *,
    out: Path | str = DIRECTORY,
    command: list[str] | None = None,
) -> Released:
    """Evaluate and benchmark the released checkpoints of recipes, one after the other.

    Each is measured as its recipe says under `evaluation` and `benchmark`. `out` gets a table of
    every figure next to the published one; `command` is stored in run.json.
    """
    out = Path(out)
    measured: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    for name, recipe in released_recipes(recipes).items():
        try:
            measured[name] = _measure(recipe, out / name, command)
        except ShortLLMError as error:
            log.warning("%s cannot be measured, continuing with the others", name)
            failed[name] = str(error)
    _write_table(out / TABLE, measured)
    return Released(measured=measured, failed=failed, table=out / TABLE)


@releasing()
def _measure(recipe: Recipe, directory: Path, command: list[str] | None) -> Measured:
    from shortllm import pipeline, stages
    from shortllm.checkpoint.source import open_checkpoint
    from shortllm.data.texts import Texts
    from shortllm.run_directory import claim_directory, write_run_file

    published = recipe.published
    assert published is not None and published.checkpoint is not None
    hub_id, figures = published.checkpoint, published.released
    checkpoint = open_checkpoint(hub_id, special_tokens=recipe.special_tokens)
    recipe = recipe.model_copy(update={"model": hub_id, "revision": None})
    recipe = recipe.filled(checkpoint.model_type)
    session = pipeline.session_of(recipe)
    claim_directory(directory, checkpoint)
    tasks = stages.prepare_tasks([checkpoint], recipe.evaluation, session)
    if recipe.benchmark is not None:
        from shortllm.benchmark.bench import check_speed

        check_speed({hub_id: checkpoint}, recipe.benchmark, session)
    texts = Texts(calibration=None, evaluation=_texts(checkpoint, recipe))
    write_run_file(directory, recipe.model_dump(mode="json"), checkpoint, command)
    models = {Path(hub_id).name: checkpoint}
    evaluation = pipeline.evaluate_in(directory, models, recipe, texts, tasks, session)
    session.release()
    benchmark = None
    if recipe.benchmark is not None:
        benchmark = pipeline.bench_in(directory, models, recipe.benchmark, session)
    [evaluated] = evaluation.models
    return Measured(
        checkpoint=hub_id,
        directory=directory,
        evaluated=evaluated,
        benchmark=benchmark,
        ours=our_numbers(evaluated, recipe.evaluation),
        theirs=published_numbers(figures) if figures else {},
    )


def _texts(checkpoint: Checkpoint, recipe: Recipe) -> list[EvaluationText]:
    """Each text twice: with BOS before the first segment, and before every one."""
    from shortllm.checkpoint.tokenizer import load_tokenizer
    from shortllm.data.sources import load_rows
    from shortllm.data.texts import check_length, evaluation_segments_of
    from shortllm.evaluation.perplexity import EvaluationText

    check_length(checkpoint, recipe.evaluation.length, "--eval-length")
    tokenizer = load_tokenizer(checkpoint)
    rows = [load_rows(source, role="evaluation") for source in recipe.evaluation.data]
    return [
        EvaluationText(
            rows=source,
            held_out=False,
            segments=evaluation_segments_of(
                checkpoint, source, tokenizer, recipe.evaluation.model_copy(update={"bos": bos})
            ),
        )
        for bos in MODES
        for source in rows
    ]


def _write_table(path: Path, measured: Mapping[str, Measured]) -> None:
    """A row for every figure that has a published one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("recipe", "checkpoint", "quantity", "ours", "published"))
    for name, one in measured.items():
        for row in one.comparison:
            writer.writerow((name, one.checkpoint, row.quantity, row.ours, row.published))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
