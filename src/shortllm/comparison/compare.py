"""Compare criteria, width with depth, and finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.source import open_checkpoint
from shortllm.comparison import width_vs_depth as units
from shortllm.comparison.criteria import compare_in, default_directory
from shortllm.comparison.options import (
    Comparison,
    ComparisonOptions,
    UnitsComparison,
    prepare_question,
)
from shortllm.criteria.selection import resolve_all
from shortllm.model.session import Session
from shortllm.options import accepts, overlaid
from shortllm.recipe import Recipe
from shortllm.run_directory import pinned
from shortllm.runtime import Runtime

if TYPE_CHECKING:
    from shortllm.reporting.runs_page import ComparedModel


@accepts(comparison=ComparisonOptions, runtime=Runtime)
def compare_criteria(
    model: str = "embedded",
    *,
    comparison: ComparisonOptions,
    runtime: Runtime,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    out: Path | str | None = None,
    revision: str | None = None,
    command: Sequence[str] = (),
) -> Comparison:
    """What each criterion removes at several budgets, and the perplexity that is left.

    Writes the scores, comparison.json and comparison.html; what is up to date is skipped. Under
    `accelerate launch` or `torchrun` all processes share the samples, as in `score`.

    Args:
        model: a checkpoint directory or Hub id.
        comparison: what to compare; its fields can be given as keywords.
        runtime: where to compute; its fields can be given as keywords.
        options: for each criterion its options.
        out: run directory. Default: `runs/<model>-comparison`.
        revision: of a Hub model.
        command: the command line, for run.json.
    Returns:
        What each criterion and each random draw removes, and what is left.
    Raises:
        ShortLLMError: any kind, before the model is loaded wherever that can be known.
    """
    directory = default_directory(model) if out is None else Path(out)
    checkpoint = open_checkpoint(model, revision=pinned(model, revision, directory))
    question = prepare_question(
        checkpoint.info(),
        resolve_all(comparison.criteria, options or {}),
        comparison.ratios,
        draws=comparison.random,
        protect_first=comparison.protect_first,
        protect_last=comparison.protect_last,
    )
    return compare_in(
        directory, checkpoint, question, comparison, session=Session(runtime), command=command
    )


@accepts(recipe=Recipe)
def compare_units(
    model: str | None = None,
    *,
    recipe: Recipe,
    methods: Sequence[str] = (*units.DEPTH, *units.WIDTH),
    out: Path | str | None = None,
    command: Sequence[str] = (),
) -> UnitsComparison:
    """Width against depth pruning at the same number of parameters: quality, speed, memory.

    Writes the checkpoints, their evaluation and benchmark, units.json and units.html; what is up to
    date is skipped.

    Args:
        model: a checkpoint directory or Hub id. Default: the recipe's.
        recipe: budget of depth, calibration, evaluation, benchmark, and the retraining that all
            candidates get, if any; its fields can be given as keywords.
        methods: depth criteria, of which the first sets the number of parameters, and width
            methods.
        out: run directory. Default: `runs/<model>-units`.
        command: the command line, for run.json.
    Returns:
        The candidates; what they can do and how fast they are is in eval.json and bench.json.
    Raises:
        ShortLLMError: any kind, before the model is loaded wherever that can be known.
    """
    if model is not None:
        recipe = overlaid(recipe, Recipe(model=model))
    units.asked_methods(methods)
    directory = units.default_directory(recipe.model) if out is None else Path(out)
    checkpoint = open_checkpoint(
        recipe.model,
        revision=pinned(recipe.model, recipe.revision, directory),
        special_tokens=recipe.special_tokens,
    )
    resolved = recipe.resolved(checkpoint.model_type)
    return units.compare_units_in(directory, checkpoint, resolved, methods, command=command)


def compare(runs: Sequence[Path | str], *, out: Path | str = "compare.html") -> list[ComparedModel]:
    """Several runs on one page: every model, quality against size and against latency.

    Args:
        runs: directories of finished runs.
        out: the page.
    Returns:
        One entry per model; an original that several runs share stands there once.
    Raises:
        ResultFileError: a directory that holds no finished run.
    """
    from shortllm.reporting import write_runs

    return write_runs([Path(one) for one in runs], Path(out))
