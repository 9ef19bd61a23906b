"""What commands print: tables, and JSON in one line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from pydantic_core import to_jsonable_python

from shortllm.runtime import is_main_process

if TYPE_CHECKING:
    from shortllm.benchmark.options import Benchmark
    from shortllm.evaluation.options import Evaluation
    from shortllm.records import DerivedRecord


def show_notes(*, quiet: bool = False, verbose: bool = False) -> None:
    """Print the package's log to standard error: all, what matters, or only warnings.

    Libraries have handlers of their own.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    if verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    elif sys.stderr.isatty():  # which has bars instead
        handler.addFilter(lambda record: record.name != "shortllm.progress")
    log = logging.getLogger("shortllm")
    log.setLevel(logging.DEBUG if is_main_process() else logging.ERROR)
    log.handlers = [handler]


def answered(result: Any, *, in_json: bool) -> bool:
    """Print a result as one line of JSON, if asked; whether no text is to follow."""
    if is_main_process() and in_json:
        typer.echo(json.dumps(to_jsonable_python(result)))
    return in_json or not is_main_process()


def print_table(
    head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, words: bool = False
) -> None:
    """Columns aligned to the right but for the first; all to the left if they contain `words`."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    justify = str.ljust if words else str.rjust
    for first, *others in (head, *rows):
        cells = [justify(cell, width) for cell, width in zip(others, widths[1:], strict=True)]
        typer.echo("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def print_notes(record: DerivedRecord) -> None:
    """What to know of a new checkpoint, a line each."""
    for note in record.notes:
        typer.echo(f"note: {note}")


def print_evaluation(evaluation: Evaluation) -> None:
    """A row per model: sizes and perplexities; then a row per task, and per capability."""
    from shortllm.reporting.measurements import (
        errors_note,
        evaluation_table,
        prompts_phrase,
        task_table,
    )
    from shortllm.reporting.probe import probe_table, probed

    print_table(*evaluation_table(evaluation).plain())
    if note := errors_note(evaluation.models[0].perplexity):
        typer.echo(note)
    if evaluation.models[0].zeroshot:
        typer.echo("")
        print_table(*task_table(evaluation.models).plain())
        if prompts := prompts_phrase(evaluation):
            typer.echo(f"asked {prompts}")
    if probed(evaluation.models):
        typer.echo("")
        print_table(*probe_table(evaluation.models).plain())


def print_benchmark(found: Benchmark) -> None:
    """The device, then a row per model, batch and length."""
    from shortllm.reporting.measurements import benchmark_table, drafted_note, drafted_table

    typer.echo(
        f"{found.device_name}, {'compiled, ' if found.compiled else ''}"
        f"{found.warmup} warm-up and {found.runs} measured runs of each model, in turn"
    )
    print_table(*benchmark_table(found).plain())
    if found.drafted:
        typer.echo("")
        print_table(*drafted_table(found.drafted).plain())
        typer.echo(drafted_note(found.drafted))


def command_line() -> list[str]:
    """What was typed, for run.json."""
    return ["shortllm", *sys.argv[1:]]
