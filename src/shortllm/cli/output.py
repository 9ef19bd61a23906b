"""What commands print: tables, and JSON in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from shortllm.errors import CriterionError

if TYPE_CHECKING:
    from shortllm.benchmark.options import Benchmark
    from shortllm.evaluation.options import Evaluation
    from shortllm.pruning.records import PrunePlan
    from shortllm.published import Published, PublishedComparison


def print_json(content: Any) -> None:
    """One line of JSON on standard output."""
    import json

    typer.echo(json.dumps(content))


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns aligned to the right but for the first."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        typer.echo("  ".join(cells).rstrip())


def plan_line(plan: PrunePlan) -> str:
    """A plan in one line: blocks before and after, which go, what that saves."""
    reached = plan.reached
    return (
        f"{plan.model.id}: {plan.model.blocks} -> {len(plan.kept)} blocks, without "
        f"{', '.join(map(str, plan.removed))} ({reached.parameter_ratio:.1%} of the parameters)"
    )


def perplexities(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Perplexity by model and text, for `--json`."""
    return {
        model.name: {entry.source: entry.perplexity for entry in model.perplexity}
        for model in evaluation.models
    }


def task_scores(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Scores by model and task, for `--json`."""
    return {
        model.name: {entry.task: entry.score for entry in model.zeroshot}
        for model in evaluation.models
    }


def print_evaluation(evaluation: Evaluation) -> None:
    """A row per model: sizes and perplexities; then a row per zero-shot task."""
    from shortllm.reporting.measurements import evaluation_table, task_table

    print_table(*evaluation_table(evaluation).plain())
    if evaluation.models[0].zeroshot:
        typer.echo("")
        print_table(*task_table(evaluation.models).plain())


def is_main_process() -> bool:
    """Whether this process speaks to the user, of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def options_in(given: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """`taylor.power=2` and the like as options by criterion."""
    options: dict[str, dict[str, Any]] = {}
    for text in given or ():
        place, equals, value = text.partition("=")
        criterion, dot, name = place.partition(".")
        if not equals or not dot or not name:
            raise CriterionError(
                f"--option '{text}' must have the form CRITERION.NAME=VALUE, e.g. taylor.power=2"
            )
        options.setdefault(criterion, {})[name] = value
    return options


def command_line() -> list[str]:
    """What was typed, for run.json."""
    return ["shortllm", *sys.argv[1:]]


def print_benchmark(found: Benchmark) -> None:
    """The device, then a row per model, batch and length."""
    from shortllm.reporting.measurements import benchmark_table

    typer.echo(
        f"{found.device_name}, {'compiled, ' if found.compiled else ''}"
        f"{found.warmup} warm-up and {found.runs} measured runs of each model, in turn"
    )
    print_table(*benchmark_table(found).plain())


def print_published(
    published: Published, plan: PrunePlan, rows: Sequence[PublishedComparison]
) -> None:
    """Blocks and numbers, ours and the published ones."""
    from shortllm.published import compared_blocks
    from shortllm.reporting.run_page import published_table

    typer.echo(f"compared with the published results ({published.source})")
    if published.removed:
        typer.echo(compared_blocks(published, plan.removed))
    if rows:
        print_table(*published_table(rows).plain())
