"""Measure the released checkpoints of a paper, next to its published figures.

Each gets a directory of its own, `runs/published/<recipe>/`. What is up to date is skipped, and a
checkpoint that cannot be measured does not stop the others.

    shortllm recipes run published --device cuda
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shortllm import pipeline
from shortllm.benchmark.bench import check_speed
from shortllm.benchmark.options import Benchmark
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.tokenizer import load_tokenizer
from shortllm.data.calibration import check_length
from shortllm.data.sources import load_rows
from shortllm.errors import ShortLLMError
from shortllm.evaluation.evaluate import prepare_tasks
from shortllm.evaluation.options import EvaluatedModel
from shortllm.evaluation.texts import EvaluationText, Texts, evaluation_segments_of
from shortllm.files import releasing, write_text
from shortllm.measure import bench_in, evaluate_in
from shortllm.progress import numbered_stages, stage
from shortllm.published import (
    Bos,
    PublishedComparison,
    our_numbers,
    published_numbers,
    side_by_side,
)
from shortllm.recipe import Recipe
from shortllm.run_directory import claim_directory, write_run_file

log = logging.getLogger(__name__)

DIRECTORY = Path("runs") / "published"
TABLE = "published.csv"
MODES: tuple[Bos, ...] = ("first", "every")


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
    command: Sequence[str] = (),
) -> Released:
    """Evaluate and benchmark the released checkpoints of recipes, one after the other.

    Each is measured as its recipe says under `evaluation` and `benchmark`. `out` gets a table of
    every figure next to the published one; `command` is stored in run.json.
    """
    out = Path(out)
    measured: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    released = released_recipes(recipes)
    with numbered_stages(len(released)):
        for name, recipe in released.items():
            try:
                with stage(name):
                    measured[name] = _measure(recipe, out / name, command)
            except ShortLLMError as error:
                log.warning("%s cannot be measured, continuing with the others", name)
                failed[name] = str(error)
    _write_table(out / TABLE, measured)
    return Released(measured=measured, failed=failed, table=out / TABLE)


@releasing()
def _measure(recipe: Recipe, directory: Path, command: Sequence[str]) -> Measured:
    published = recipe.published
    assert published is not None and published.checkpoint is not None
    hub_id, figures = published.checkpoint, published.released
    checkpoint = open_checkpoint(hub_id, special_tokens=recipe.special_tokens)
    recipe = recipe.model_copy(update={"model": hub_id, "revision": None})
    recipe = recipe.resolved(checkpoint.model_type)
    session = pipeline.session_of(recipe)
    claim_directory(directory, checkpoint)
    tasks = prepare_tasks([checkpoint], recipe.evaluation, session)
    if recipe.benchmark is not None:
        check_speed({hub_id: checkpoint}, recipe.benchmark, session)
    texts = Texts(calibration=None, evaluation=_texts(checkpoint, recipe))
    write_run_file(directory, recipe.model_dump(mode="json"), checkpoint, command)
    models = {Path(hub_id).name: checkpoint}
    evaluation = evaluate_in(directory, models, recipe.evaluation, texts, tasks, session)
    session.release()
    benchmark = None
    if recipe.benchmark is not None:
        benchmark = bench_in(directory, models, recipe.benchmark, session)
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
    check_length(checkpoint, recipe.evaluation.length, "--eval-length", before=1)
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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("recipe", "checkpoint", "quantity", "ours", "published"))
    for name, one in measured.items():
        for row in one.comparison:
            writer.writerow((name, one.checkpoint, row.quantity, row.ours, row.published))
    write_text(path, text.getvalue())
