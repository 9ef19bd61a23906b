"""`recipes list`, `show`, `schema`, `run`: the runs that come with the package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from shortllm.cli.asked import changes_of
from shortllm.cli.options import Json
from shortllm.cli.output import command_line, print_json, print_table
from shortllm.cli.run import run
from shortllm.errors import RecipeError

if TYPE_CHECKING:
    from shortllm.published import Measured, Released

recipes = typer.Typer(
    help="Whole runs in a file each: list, show and run those that come with the package.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PUBLISHED = "published"
"""The name that stands for all released checkpoints."""

SHOWN = {
    "parameters": "parameters",
    "perplexity wikitext2:test, BOS first": "wikitext2",
    "perplexity wikitext2:test, BOS every": "wikitext2, every BOS",
    "perplexity ptb:validation, BOS first": "ptb",
    "perplexity ptb:validation, BOS every": "ptb, every BOS",
    "mean of tasks [%]": "tasks [%]",
}
"""Quantities that have a column on the terminal, and its heading."""

MEASURING = ("evaluation", "benchmark", "device", "dtype", "stream", "max_memory")
"""Fields of a recipe that mean something to a checkpoint that is only measured."""


@recipes.command(name="list")
def list_recipes(json: Json = False) -> None:
    """All recipes: model, how many blocks go, and what it is."""
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
    typer.echo(f"{PUBLISHED:26}all released checkpoints, measured beside what was published")


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See `shortllm recipes list`.")],
) -> None:
    """A recipe as it stands in its file: a beginning for one of your own."""
    from shortllm.recipes import recipe_text

    typer.echo(recipe_text(name), nl=False)


@recipes.command(name="schema")
def print_schema() -> None:
    """The JSON schema of recipes, by which an editor completes and checks them."""
    import json

    from shortllm.schemas import RECIPE, schema

    typer.echo(json.dumps(schema(RECIPE), indent=1))


def _by_name(command: Callable[..., None]) -> Callable[..., None]:
    """`run` with the recipe as its first argument; all flags are the same."""

    @functools.wraps(command)
    def run_recipe(**given: Any) -> None:
        if given["recipe"] == PUBLISHED:
            _run_published(given)
        else:
            command(**given)

    signature = inspect.signature(command, eval_str=True)
    parameters = dict(signature.parameters)
    name = parameters.pop("recipe").replace(
        annotation=Annotated[
            str,
            typer.Argument(
                metavar="NAME",
                help=f"A recipe, a .yaml file, or `{PUBLISHED}`: all released checkpoints, "
                "evaluated and benchmarked beside the published numbers.",
            ),
        ],
        default=inspect.Parameter.empty,
    )
    model = parameters.pop("model").replace(
        annotation=Annotated[
            Optional[str],  # noqa: UP045
            typer.Argument(
                metavar="[MODEL]", help="Checkpoint in place of the recipe's, e.g. a local copy."
            ),
        ]
    )
    context = parameters.pop("ctx")
    ordered = [context, name, model, *parameters.values()]
    run_recipe.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    run_recipe.__annotations__ = {one.name: one.annotation for one in ordered}
    run_recipe.__doc__ = "Run a recipe: the same as `shortllm run --recipe NAME`, with all flags."
    return run_recipe


recipes.command(name="run")(_by_name(run))


def _run_published(given: dict[str, Any]) -> None:
    """Measure all released checkpoints; exits with 2 if one of them could not be had.

    Raises:
        RecipeError: a flag about something else than measuring.
    """
    from shortllm.published import DIRECTORY, measure_released, released_recipes
    from shortllm.recipes import changed, load_recipe, recipe_names

    changes = changes_of(given["ctx"], given["places"] or [])
    for place in (*changes, *(["retraining"] if given["retrain"] else [])):
        if place.split(".")[0] not in MEASURING:
            raise RecipeError(
                f"released checkpoints are measured as they are, and '{place}' is about how one is "
                "made. Leave it out"
            )
    held = released_recipes({name: load_recipe(name) for name in recipe_names()})
    asked = {name: changed(recipe, changes, "command line") for name, recipe in held.items()}
    found = measure_released(asked, out=given["out"] or DIRECTORY, command=command_line())
    if given["json"]:
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
    """A row per checkpoint: ours, and behind a bar what was published; then what is missing."""
    head = ("checkpoint", *SHOWN.values(), "tokens/s")
    rows = [
        (
            Path(one.checkpoint).name,
            *(_cell(one.ours.get(quantity), one.theirs.get(quantity)) for quantity in SHOWN),
            _throughput(one),
        )
        for one in found.measured.values()
    ]
    if rows:
        typer.echo("ours | published")
        print_table(head, rows)
    typer.echo(f"all numbers: {found.table}")
    for name, reason in found.failed.items():
        typer.echo(f"left out: {name} ({reason})")


def _cell(ours: float | None, theirs: float | None) -> str:
    return f"{_number(ours)} | {_number(theirs)}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value > 1e6 else f"{value:.2f}"


def _throughput(one: Measured) -> str:
    """That of the first batch and length."""
    found = one.benchmark.measurements[0].tokens_per_s if one.benchmark else None
    return "-" if found is None else f"{found:.1f}"
