"""`recipes list`, `show`, `schema`, `run`: the recipes that come with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import CriterionOption, Json, Settings
from shortllm.cli.output import command_line, print_json, print_table
from shortllm.cli.run import Bench, Heal, Quantize, Retrain, print_run, requested_recipe
from shortllm.errors import RecipeError
from shortllm.options import overlaid
from shortllm.recipe import Recipe

if TYPE_CHECKING:
    from shortllm.released import Released

recipes = typer.Typer(
    help="List, show and run the recipes that come with the package: a whole run in a file each.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

PUBLISHED = "published"
"""The name of the recipe that measures all released checkpoints."""

SHOWN = {
    "parameters": "parameters",
    "perplexity wikitext2:test, BOS first": "wikitext2",
    "perplexity wikitext2:test, BOS every": "wikitext2, every BOS",
    "perplexity ptb:validation, BOS first": "ptb",
    "perplexity ptb:validation, BOS every": "ptb, every BOS",
    "mean of tasks [%]": "tasks [%]",
}
"""Quantities that have a column on the terminal, and its heading."""

MEASURING = {"evaluation", "benchmark", "device", "dtype", "stream", "max_memory"}
"""Fields of a recipe that apply to a checkpoint that is only measured."""


@recipes.command(name="list")
def list_recipes(json: Json = False) -> None:
    """List all recipes: model, blocks removed, and description."""
    from shortllm.recipes import load_recipe, recipe_names

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        [(amount, value)] = recipe.budget.asked().items()
        removes = value if amount == "remove" else f"{amount} {value}"
        rows.append(
            {"name": name, "model": recipe.model, "removes": removes, "about": recipe.about}
        )
    if json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['name']:26}{row['model']}\n{'':26}{row['about']}")
    typer.echo(f"{PUBLISHED:26}all released checkpoints, measured next to the published results")


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See `shortllm recipes list`.")],
) -> None:
    """Print a recipe file, to start one of your own from."""
    from shortllm.recipes import recipe_text

    typer.echo(recipe_text(name), nl=False)


@recipes.command(name="schema")
def print_schema() -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them."""
    import json

    from shortllm.schemas import RECIPE, schema

    typer.echo(json.dumps(schema(RECIPE), indent=1))


@recipes.command(name="run")
@flags(typed=Recipe)
def run_recipe(
    typed: Recipe,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help=f"A recipe, a .yaml file, or `{PUBLISHED}`: evaluate and benchmark all released "
            "checkpoints next to the published results.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Use this checkpoint instead of the recipe's, e.g. a local copy.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. Default: runs/<model>-<criterion>-<budget>.")
    ] = None,
    option: CriterionOption = None,
    heal: Heal = None,
    retrain: Retrain = None,
    quantize: Quantize = None,
    bench: Bench = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Run a recipe: the same as `shortllm run --recipe NAME`, with the same flags.

    Example: shortllm recipes run llama-1-7b-taylor
    """
    import shortllm

    if name == PUBLISHED:
        stages = {"--heal": heal, "--retrain": retrain, "--quantize": quantize, "--option": option}
        _run_published(typed, bench, settings or (), stages, out=out, json=json)
        return
    chosen = requested_recipe(
        typed, model, name, option=option, heal=heal, retrain=retrain, quantize=quantize,
        bench=bench, settings=settings or (),
    )  # fmt: skip
    print_run(shortllm.run(recipe=chosen, out=out, command=command_line()), json=json)


def _run_published(
    typed: Recipe,
    bench: bool | None,
    settings: Sequence[str],
    stages: Mapping[str, object],
    *,
    out: Path | None,
    json: bool,
) -> None:
    """Measure all released checkpoints; exits with 2 if one of them is missing."""
    from shortllm.recipes import changed, load_recipe, recipe_names, settings_in
    from shortllm.released import DIRECTORY, measure_released, released_recipes

    changes = settings_in(settings)
    given = {one.partition(".")[0] for one in changes} | typed.model_fields_set
    refused = [*sorted(given - MEASURING), *(flag for flag, value in stages.items() if value)]
    if refused:
        raise RecipeError(
            f"released checkpoints are measured as they are, so '{refused[0]}' has no effect. "
            "Leave it out"
        )
    if bench is not None:
        changes["benchmark"] = {} if bench else None
    recipes_ = {
        name: changed(overlaid(recipe, typed), changes, "command line")
        for name, recipe in released_recipes(
            {name: load_recipe(name) for name in recipe_names()}
        ).items()
    }
    found = measure_released(recipes_, out=out or DIRECTORY, command=command_line())
    if json:
        print_json(
            {
                "measured": {
                    name: [row.model_dump() for row in one.comparison]
                    for name, one in found.measured.items()
                },
                "failed": found.failed,
                "table": str(found.table),
            }
        )
    else:
        _print_released(found)
    if found.failed:
        raise typer.Exit(2)


def _print_released(found: Released) -> None:
    """A row per checkpoint, ours | published; then what is missing."""
    from shortllm.format import figure, number

    rows = []
    for one in found.measured.values():
        pairs = [(figure(one.ours.get(name)), figure(one.theirs.get(name))) for name in SHOWN]
        speed = one.benchmark.measurements[0].tokens_per_s if one.benchmark else None
        cells = [f"{ours} | {theirs}" for ours, theirs in pairs]
        rows.append((Path(one.checkpoint).name, *cells, number(speed)))
    if rows:
        typer.echo("ours | published")
        print_table(("checkpoint", *SHOWN.values(), "tokens/s"), rows)
    typer.echo(f"all numbers: {found.table}")
    for name, reason in found.failed.items():
        typer.echo(f"left out: {name} ({reason})")
