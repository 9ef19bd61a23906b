"""`run` and `recipes list`, `show`, `schema`, `run`: all stages, from a model to a report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from shortllm.cli import early
from shortllm.cli.flags import CriterionOptions, Json, flags
from shortllm.cli.output import (
    answered,
    command_line,
    print_benchmark,
    print_evaluation,
    print_table,
)
from shortllm.errors import CriterionError, RecipeError
from shortllm.healing.methods import METHODS as HEALING
from shortllm.options import Flag, overlaid
from shortllm.pruning.budget import ASKED
from shortllm.quantizing.methods import METHODS as QUANTIZING
from shortllm.recipe import (
    DEFAULT,
    Recipe,
    changed,
    default_recipe,
    load_recipe,
    recipe_names,
    recipe_text,
    settings_in,
)
from shortllm.retraining.methods import METHODS as RETRAINING

if TYPE_CHECKING:
    from shortllm.pipeline import RunResult
    from shortllm.released import Released

log = logging.getLogger(__name__)

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

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        rich_help_panel="Recipe",
        help="Start from this recipe (see `shortllm recipes list`) or .yaml file. Flags override "
        "it.",
    ),
]
Heal = Annotated[
    str | None,
    Flag(metavar="METHOD"),
    Field(
        description=f"Heal the shortened model without training: {', '.join(HEALING.names())}; "
        "or none. Default: the recipe's."
    ),
]
Retrain = Annotated[
    str | None,
    Flag(metavar="METHOD"),
    Field(
        description=f"Retrain by {', '.join(RETRAINING.names())}; several with commas, each from "
        "the same start; or none. Default: the recipe's."
    ),
]
Settings = Annotated[
    list[str],
    Flag(name="--set", metavar="FIELD=VALUE", panel="Recipe", repeated=True),
    Field(
        description="Set any field of a recipe, e.g. retraining.max_steps=200 or "
        "benchmark.batches=[1,8]; can be repeated."
    ),
]


class RunFlags(CriterionOptions):
    """Flags of a run that are not fields of its recipe, or stand for several of them."""

    out: Path | None = Field(
        default=None, description="Run directory. Default: runs/<model>-<criterion>-<budget>."
    )
    heal: Heal = None
    retrain: Retrain = None
    quantize: Annotated[str | None, Flag(metavar="METHOD")] = Field(
        default=None,
        description=f"Quantize the best model by {' or '.join(QUANTIZING.names())}; or none. "
        "Default: the recipe's.",
    )
    bench: Annotated[bool | None, Flag(name="--bench/--no-bench")] = Field(
        default=None, description="Measure speed and memory. Default: the recipe's."
    )
    settings: Settings = []


@flags("remove", "ratio", "criterion", "data", own=RunFlags, typed=Recipe)
def run(
    own: RunFlags,
    typed: Recipe,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory or Hub id. Default: embedded."),
    ] = None,
    recipe: RecipeName = None,
    json: Json = False,
) -> None:
    """Shorten a model and report what it cost: score, prune, heal, retrain, evaluate, benchmark.

    Removes a quarter of the blocks unless told otherwise. Run the same command again to resume an
    interrupted run; stages that are up to date are skipped.

    Example: shortllm run Qwen/Qwen3-0.6B --remove 6 --retrain lora --bench
    """
    _run(typed, own, model=model, name=recipe, json=json)


def _run(typed: Recipe, own: RunFlags, *, model: str | None, name: str | None, json: bool) -> None:
    import shortllm

    chosen = requested_recipe(typed, own, model=model, name=name)
    early.check_recipe(chosen, own.out)
    _print_run(shortllm.run(recipe=chosen, out=own.out, command=command_line()), json=json)


def requested_recipe(
    typed: Recipe, own: RunFlags, *, model: str | None, name: str | None
) -> Recipe:
    """The recipe of that name, or the default one for the model, with what was typed laid over."""
    if name is not None:
        base = load_recipe(name)
    else:
        base = default_recipe() if (model or DEFAULT) == DEFAULT else Recipe()
    given = typed.budget.model_fields_set if "budget" in typed.model_fields_set else set()
    if given.intersection(ASKED):  # an amount replaces the recipe's
        kept = {name: None for name in ASKED}
        base = base.model_copy(update={"budget": base.budget.model_copy(update=kept)})
    if "blocks" in given and "criterion" in typed.model_fields_set:
        log.warning(
            "--blocks names the blocks to remove, so --criterion %s has no effect", typed.criterion
        )
    changes: dict[str, object] = {}
    if model is not None:
        changes["model"] = model
    if own.option:
        options = own.by_criterion()
        criterion = typed.criterion if "criterion" in typed.model_fields_set else None
        criterion = criterion or next(iter(options))
        for other in options:
            if other != criterion:
                raise CriterionError(
                    f"--option names criterion '{other}', but --criterion is {criterion}"
                )
        changes |= {"criterion": criterion, "options": options[criterion]}
    for field, method in (("healing", own.heal), ("quantization", own.quantize)):
        if method == "none":
            changes[field] = None
        elif method is not None:
            changes[f"{field}.method"] = method
    if own.bench is not None:
        changes["benchmark"] = {} if own.bench else None
    if own.retrain is not None:
        names = [] if own.retrain == "none" else [one.strip() for one in own.retrain.split(",")]
        held = {one.method: one for one in base.retraining}
        changes["retraining"] = [
            held[name].model_dump(mode="json", exclude_unset=True)
            if name in held
            else {"method": name}
            for name in names
        ]
    changes |= settings_in(own.settings)
    return changed(overlaid(base, typed), changes, "command line")


def _print_run(result: RunResult, *, json: bool) -> None:
    from shortllm.published import compared_blocks, published_comparison
    from shortllm.reporting.measurements import published_table

    published, evaluation = result.recipe.published, result.evaluation
    rows = []
    if published is not None:
        rows = published_comparison(published, evaluation, result.recipe.evaluation)
    content = {
        "directory": result.directory,
        "checkpoints": result.checkpoints,
        "report": result.report,
        "removed": result.plan.removed,
        "reached": result.plan.reached,
        "perplexity": {
            model.name: {entry.source: entry.perplexity for entry in model.perplexity}
            for model in evaluation.models
        },
        "tasks": {
            model.name: {entry.task: entry.score for entry in model.zeroshot}
            for model in evaluation.models
        },
        "probe": {
            model.name: {one.capability: one.written.share for one in model.probe.capabilities}
            for model in evaluation.models
            if model.probe is not None
        },
        "published": rows,
    }
    if answered(content, in_json=json):
        return
    typer.echo(str(result.plan))
    print_evaluation(evaluation)
    if result.benchmark is not None:
        typer.echo("")
        print_benchmark(result.benchmark)
    if published is not None:
        typer.echo(f"\ncompared with the published results ({published.source})")
        if published.removed:
            typer.echo(compared_blocks(published, result.plan.removed))
        if rows:
            print_table(*published_table(rows).plain())
    width = max(map(len, (*result.checkpoints, "report")))
    for name, path in {**result.checkpoints, "report": result.report}.items():
        typer.echo(f"{name + ':':{width + 1}} {path}")


# ---- recipes that come with the package

recipes = typer.Typer(
    help="List, show and run the recipes that come with the package: a whole run in a file each.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@recipes.command(name="list")
def list_recipes(json: Json = False) -> None:
    """List all recipes: model, blocks removed, and description."""
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        asked = recipe.budget.asked()
        amounts = ", ".join(f"{amount} {value}" for amount, value in asked.items())
        removes = asked.get("remove", amounts)
        rows.append(
            {"name": name, "model": recipe.model, "removes": removes, "about": recipe.about}
        )
    if answered(rows, in_json=json):
        return
    for row in rows:
        typer.echo(f"{row['name']:26}{row['model']}\n{'':26}{row['about']}")
    typer.echo(f"{PUBLISHED:26}all released checkpoints, measured next to the published results")


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See `shortllm recipes list`.")],
) -> None:
    """Print a recipe file, to start one of your own from."""
    typer.echo(recipe_text(name), nl=False)


@recipes.command(name="schema")
def print_schema() -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them."""
    import json

    from shortllm.schemas import RECIPE, schema

    typer.echo(json.dumps(schema(RECIPE), indent=1))


@recipes.command(name="run")
@flags(own=RunFlags, typed=Recipe)
def run_recipe(
    own: RunFlags,
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
    json: Json = False,
) -> None:
    """Run a recipe: the same as `shortllm run --recipe NAME`, with the same flags.

    Example: shortllm recipes run llama-1-7b-taylor
    """
    if name == PUBLISHED:
        _run_published(own, typed, json=json)
    else:
        _run(typed, own, model=model, name=name, json=json)


def _run_published(own: RunFlags, typed: Recipe, *, json: bool) -> None:
    """Measure all released checkpoints; exits with 2 if one of them is missing."""
    from shortllm.released import DIRECTORY, measure_released

    changes = settings_in(own.settings)
    given = {one.partition(".")[0] for one in changes} | typed.model_fields_set
    stages = ("heal", "retrain", "quantize", "option")
    refused = [*sorted(given - MEASURING), *(f"--{one}" for one in stages if getattr(own, one))]
    if refused:
        raise RecipeError(
            f"released checkpoints are measured as they are, so '{refused[0]}' has no effect. "
            "Leave it out"
        )
    if own.bench is not None:
        changes["benchmark"] = {} if own.bench else None
    chosen = {
        name: changed(overlaid(load_recipe(name), typed), changes, "command line")
        for name in recipe_names()
    }
    found = measure_released(chosen, out=own.out or DIRECTORY, command=command_line())
    content = {
        "measured": {name: one.comparison for name, one in found.measured.items()},
        "failed": found.failed,
        "table": found.table,
    }
    if not answered(content, in_json=json):
        _print_released(found)
    if found.failed:
        raise typer.Exit(2)


def _print_released(found: Released) -> None:
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
