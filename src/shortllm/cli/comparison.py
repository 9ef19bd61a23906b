"""`compare-criteria`, `compare-units`: which criterion to trust, and width against depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import CriterionOption, Json, ModelArgument, Revision, Settings
from shortllm.cli.output import command_line, is_main_process, options_in, print_json, print_table
from shortllm.cli.run import RecipeName, Retrain, requested_recipe
from shortllm.comparison.options import DEPTH, WIDTH, ComparisonOptions
from shortllm.recipe import Recipe
from shortllm.runtime import Runtime

if TYPE_CHECKING:
    from shortllm.comparison.options import Comparison


@flags(comparison=ComparisonOptions, runtime=Runtime)
def compare_criteria(
    comparison: ComparisonOptions,
    runtime: Runtime,
    model: ModelArgument = "embedded",
    out: Annotated[
        Path | None, typer.Option(help="Run directory. Default: runs/<model>-comparison.")
    ] = None,
    option: CriterionOption = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Compare criteria on a model: the perplexity that is left after each, at several budgets.

    Scores the blocks by every criterion, then measures every set of blocks they would remove, and
    random sets, in one pass over held-out text. Run the same command again to resume.

    Example: shortllm compare-criteria Qwen/Qwen3-0.6B --data my_text.jsonl
    """
    import shortllm
    from shortllm.comparison.criteria import default_directory

    directory = out or default_directory(model)
    found = shortllm.compare_criteria(
        model,
        comparison=comparison,
        options=options_in(option),
        runtime=runtime,
        out=directory,
        revision=revision,
        command=command_line(),
    )
    if not is_main_process():
        return
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        _print_comparison(found)
        typer.echo(f"report: {directory / 'comparison.html'}")


@flags(typed=Recipe)
def compare_units(
    typed: Recipe,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory or Hub id. Default: embedded."),
    ] = None,
    recipe: RecipeName = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. Default: runs/<model>-units.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="METHOD,METHOD",
            help="Depth criteria, of which the first sets the number of parameters, and width "
            "methods.",
        ),
    ] = ",".join((*DEPTH, *WIDTH)),
    retrain: Retrain = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="1,4,16",
            help="Batch sizes for measuring speed. Default: the recipe's, or 1,4,16,64.",
        ),
    ] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Compare width and depth pruning at the same number of parameters: quality, speed, memory.

    Run the same command again to resume; what is up to date is skipped.

    Example: shortllm compare-units Qwen/Qwen3-0.6B --ratio 0.2 --retrain lora
    """
    import shortllm
    from shortllm.recipes import changed

    chosen = requested_recipe(typed, model, recipe, retrain=retrain, settings=settings or ())
    held = chosen.benchmark is not None and "batches" in chosen.benchmark.model_fields_set
    if batch is not None or not held:
        sizes = [int(size) for size in (batch or "1,4,16,64").split(",")]
        chosen = changed(chosen, {"benchmark.batches": sizes}, "command line")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    found = shortllm.compare_units(recipe=chosen, methods=names, out=out, command=command_line())
    if json:
        print_json(found.model_dump(mode="json"))
        return
    from shortllm.comparison.width_vs_depth import default_directory
    from shortllm.reporting.comparison import units_table
    from shortllm.reporting.load import load_units

    directory = out or default_directory(chosen.model)
    print_table(*units_table(load_units(directory)).plain())
    typer.echo(f"page: {directory / 'units.html'}")


def _print_comparison(found: Comparison) -> None:
    from shortllm.comparison.ranking import verdict
    from shortllm.format import number
    from shortllm.reporting.comparison import perplexity_table
    from shortllm.reporting.protocol import perplexity_source, segments_phrase

    typer.echo(
        f"{found.model.id}: {found.model.blocks} blocks, intact perplexity "
        f"{number(found.intact.perplexity)} on {segments_phrase(found.intact)} from "
        f"{perplexity_source(found.intact)}"
    )
    print_table(*perplexity_table(found).plain())
    for left in found.left_out:
        typer.echo(f"left out: {100 * left.ratio:.4g} % ({left.reason})")
    typer.echo(f"* lowest of a column\n{verdict(found)}")
