"""`compare`, `compare-criteria`, `compare-units`: runs, criteria, and width against depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from shortllm.cli import early
from shortllm.cli.flags import CriterionOptions, Json, ModelArgument, Revision, flags
from shortllm.cli.output import answered, command_line, print_table
from shortllm.cli.run import Heal, RecipeName, Retrain, RunFlags, Settings, requested_recipe
from shortllm.comparison.options import DEPTH, WIDTH, ComparisonOptions
from shortllm.criteria import resolve
from shortllm.options import Flag, Options
from shortllm.recipe import Recipe, changed
from shortllm.run_directory import require_run_directory
from shortllm.runtime import Runtime

if TYPE_CHECKING:
    from shortllm.comparison.options import Comparison


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
    json: Json = False,
) -> None:
    """Compare several runs on one page: quality against size and latency.

    Example: shortllm compare runs/qwen3 runs/other
    """
    import shortllm

    models = shortllm.compare(runs, out=out).models
    from shortllm.reporting.runs_page import runs_table

    if not answered(models, in_json=json):
        print_table(*runs_table(models).plain())
        typer.echo(f"page: {out}")


@flags(criteria=CriterionOptions, comparison=ComparisonOptions, runtime=Runtime)
def compare_criteria(
    criteria: CriterionOptions,
    comparison: ComparisonOptions,
    runtime: Runtime,
    model: ModelArgument = "embedded",
    out: Annotated[
        Path | None, typer.Option(help="Run directory. Default: runs/<model>-comparison.")
    ] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Compare criteria on a model: the perplexity that is left after each, at several budgets.

    Scores the blocks by every criterion, then measures every set of blocks they would remove, and
    random sets, in one pass over held-out text. Run the same command again to resume.

    Example: shortllm compare-criteria Qwen/Qwen3-0.6B --data my_text.jsonl
    """
    import shortllm

    for name in comparison.criteria:
        resolve(name, criteria.by_criterion().get(name))
    if out is not None:
        require_run_directory(out)
    from shortllm.comparison.criteria import default_directory

    directory = out or default_directory(model)
    found = shortllm.compare_criteria(
        model,
        comparison=comparison,
        options=criteria.by_criterion(),
        runtime=runtime,
        out=directory,
        revision=revision,
        command=command_line(),
    )
    if not answered(found, in_json=json):
        _print_comparison(found)
        typer.echo(f"report: {directory / 'comparison.html'}")


class UnitsFlags(Options):
    """Flags of `compare-units` that are not fields of a recipe."""

    out: Path | None = Field(
        default=None, description="Run directory. Default: runs/<model>-units."
    )
    methods: Annotated[str, Flag(metavar="METHOD,METHOD")] = Field(
        default=",".join((*DEPTH, *WIDTH)),
        description="Depth criteria, of which the first sets the number of parameters, and width "
        "methods.",
    )
    heal: Heal = None
    retrain: Retrain = None
    batch: Annotated[list[int] | None, Flag(metavar="1,4,16")] = Field(
        default=None,
        description="Batch sizes for measuring speed. Default: the recipe's, or 1,4,16,64.",
    )
    settings: Settings = []


@flags(own=UnitsFlags, typed=Recipe)
def compare_units(
    own: UnitsFlags,
    typed: Recipe,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory or Hub id. Default: embedded."),
    ] = None,
    recipe: RecipeName = None,
    json: Json = False,
) -> None:
    """Compare width and depth pruning at the same number of parameters: quality, speed, memory.

    Run the same command again to resume; what is up to date is skipped.

    Example: shortllm compare-units Qwen/Qwen3-0.6B --ratio 0.2 --retrain lora
    """
    import shortllm
    from shortllm.comparison.width_vs_depth import default_directory
    from shortllm.reporting.comparison import units_table
    from shortllm.reporting.load import load_units

    run_flags = RunFlags(heal=own.heal, retrain=own.retrain, settings=own.settings)
    chosen = requested_recipe(typed, run_flags, model=model, name=recipe)
    held = chosen.benchmark is not None and "batches" in chosen.benchmark.model_fields_set
    if own.batch is not None or not held:
        sizes = own.batch or [1, 4, 16, 64]
        chosen = changed(chosen, {"benchmark.batches": sizes}, "command line")
    early.check_recipe(chosen, own.out)
    names = [name.strip() for name in own.methods.split(",") if name.strip()]
    found = shortllm.compare_units(
        recipe=chosen, methods=names, out=own.out, command=command_line()
    )
    if not answered(found, in_json=json):
        directory = own.out or default_directory(chosen.model)
        print_table(*units_table(load_units(directory)).plain())
        typer.echo(f"page: {directory / 'units.html'}")


def _print_comparison(found: Comparison) -> None:
    from shortllm.comparison.options import verdict
    from shortllm.reporting.comparison import perplexity_table
    from shortllm.reporting.measurements import errors_note
    from shortllm.reporting.protocol import perplexity_source, segments_phrase

    typer.echo(
        f"{found.model.id}: {found.model.blocks} blocks, intact perplexity "
        f"{found.intact} on {segments_phrase(found.intact)} from "
        f"{perplexity_source(found.intact)}"
    )
    print_table(*perplexity_table(found).plain())
    for left in found.left_out:
        typer.echo(f"left out: {100 * left.ratio:.4g} % ({left.reason})")
    typer.echo("* lowest of a column, or not clearly above the lowest")
    if note := errors_note([found.intact]):
        typer.echo(note)
    typer.echo(verdict(found))
