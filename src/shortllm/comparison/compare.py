"""`shortllm.compare_criteria(...)`, `compare_units` and `compare`, as functions of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.source import open_checkpoint
from shortllm.comparison import width_vs_depth as units
from shortllm.comparison.criteria import compare_in, default_directory
from shortllm.comparison.options import (
    CRITERIA,
    RANDOM_DRAWS,
    RATIOS,
    Comparison,
    UnitsComparison,
    fill_recipe,
    prepare_question,
)
from shortllm.criteria.selection import asked_criteria
from shortllm.data.options import CalibrationOptions
from shortllm.evaluation.options import EvaluationOptions
from shortllm.recipe import Recipe
from shortllm.run_directory import pinned

if TYPE_CHECKING:
    from shortllm.reporting.comparison import ComparedModel


def compare_criteria(
    model: str = "embedded",
    *,
    criterion: Sequence[str] = CRITERIA,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    ratios: Sequence[float] = RATIOS,
    random: int = RANDOM_DRAWS,
    protect_first: int | None = None,
    protect_last: int | None = None,
    calibration: CalibrationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    out: Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    max_memory: int | None = None,
    command: list[str] | None = None,
) -> Comparison:
    """What each criterion removes at several budgets, and the perplexity that is left.

    Writes the scores, comparison.json and comparison.html; what is up to date is not made again.
    Under `accelerate launch` or `torchrun` the samples are shared, as in `score`.

    Args:
        criterion: names of criteria.
        options: for each criterion its options.
        ratios: parts of the blocks to remove.
        random: how many random removals of each size are the floor.
        evaluation: the one text to measure on; default: held-out rows of the calibration text, or
            wikitext2, and 64 segments of it.
        out: run directory; default `runs/<model>-comparison`.
    Returns:
        What each criterion and each random draw removes, and what is left.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    directory = out or default_directory(model)
    checkpoint = open_checkpoint(model, revision=pinned(model, revision, directory))
    question = prepare_question(
        checkpoint.info(), asked_criteria(criterion, options or {}), ratios, draws=random,
        protect_first=protect_first, protect_last=protect_last,
    )  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "model": model,
            "revision": revision,
            "criterion": ",".join(criterion),
            "options": options or {},
            "calibration": calibration or CalibrationOptions(),
            "evaluation": evaluation or EvaluationOptions(),
            "device": device,
            "dtype": dtype,
            "stream": stream,
            "max_memory": max_memory,
        }
    )
    recipe = fill_recipe(recipe, checkpoint.model_type)
    return compare_in(directory, checkpoint, question, recipe, command=command)


def compare_units(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (*units.DEPTH, *units.WIDTH),
    out: Path | None = None,
    command: list[str] | None = None,
) -> UnitsComparison:
    """Width against depth pruning at the same number of parameters: quality, speed, memory.

    Writes the checkpoints, their evaluation and benchmark, units.json and units.html; what is up to
    date is not made again.

    Args:
        recipe: model, budget of depth, calibration, evaluation, benchmark, and the retraining
            that heals all alike, if any.
        methods: criteria of depth, the first of which sets the number of parameters, and methods
            of width.
        out: run directory; default `runs/<model>-units`.
    Returns:
        The candidates; what they can do and how fast they are stands in the files.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    units.asked_methods(methods)
    directory = out or units.default_directory(recipe.model)
    checkpoint = open_checkpoint(
        recipe.model,
        revision=pinned(recipe.model, recipe.revision, directory),
        special_tokens=recipe.special_tokens,
    )
    filled = recipe.filled(checkpoint.model_type)
    return units.compare_units_in(directory, checkpoint, filled, methods, command=command)


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
