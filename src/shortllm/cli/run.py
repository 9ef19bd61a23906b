"""`run`: all stages, from a model's name to a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import CriterionOption, Json, Settings
from shortllm.cli.output import (
    command_line,
    options_in,
    perplexities,
    plan_line,
    print_benchmark,
    print_evaluation,
    print_json,
    print_published,
    task_scores,
)
from shortllm.errors import CriterionError
from shortllm.healing.methods import METHODS as HEALING
from shortllm.options import overlaid
from shortllm.pruning.budget import TARGETS
from shortllm.quantizing.methods import METHODS as QUANTIZING
from shortllm.recipe import Recipe
from shortllm.retraining.methods import METHODS as RETRAINING

if TYPE_CHECKING:
    from shortllm.pipeline import RunResult

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
    typer.Option(
        metavar="METHOD",
        help=f"Repair the shortened model without training: {', '.join(HEALING.names())}; or "
        "none. Default: the recipe's.",
    ),
]
Retrain = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help=f"Retrain by {', '.join(RETRAINING.names())}; several with commas, each from the same "
        "start; or none. Default: the recipe's.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help=f"Quantize the best model by {' or '.join(QUANTIZING.names())}; or none. Default: the "
        "recipe's.",
    ),
]
Bench = Annotated[
    bool | None,
    typer.Option(
        "--bench/--no-bench",
        help="Measure speed and memory. Default: the recipe's.",
    ),
]


@flags("remove", "ratio", "criterion", "data", typed=Recipe)
def run(
    typed: Recipe,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory or Hub id. Default: embedded."),
    ] = None,
    recipe: RecipeName = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run directory. Default: runs/<model>-<criterion>-<budget>.",
        ),
    ] = None,
    option: CriterionOption = None,
    heal: Heal = None,
    retrain: Retrain = None,
    quantize: Quantize = None,
    bench: Bench = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Shorten a model and report what it cost: score, prune, heal, retrain, evaluate, benchmark.

    Removes a quarter of the blocks unless told otherwise. Run the same command again to resume an
    interrupted run; stages that are up to date are skipped.

    Example: shortllm run Qwen/Qwen3-0.6B --remove 6 --retrain lora --bench
    """
    import shortllm

    chosen = requested_recipe(
        typed, model, recipe, option=option, heal=heal, retrain=retrain, quantize=quantize,
        bench=bench, settings=settings or (),
    )  # fmt: skip
    print_run(shortllm.run(recipe=chosen, out=out, command=command_line()), json=json)


def requested_recipe(
    typed: Recipe,
    model: str | None,
    recipe: str | None,
    *,
    option: Sequence[str] | None = None,
    heal: str | None = None,
    retrain: str | None = None,
    quantize: str | None = None,
    bench: bool | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """A recipe with what was typed laid over it.

    Args:
        typed: the flags that are fields of a recipe.
        recipe: name or file. Default: that of the embedded model, or none for another model.
        settings: `FIELD=VALUE` for fields without a flag.
    """
    from shortllm.recipes import DEFAULT, changed, default_recipe, load_recipe, settings_in

    if recipe is not None:
        base = load_recipe(recipe)
    else:
        base = default_recipe() if (model or DEFAULT) == DEFAULT else Recipe()
    amounts = ("remove", "ratio", "param_ratio", "blocks", *TARGETS)
    given = typed.budget.model_fields_set if "budget" in typed.model_fields_set else set()
    if given.intersection(amounts):  # an amount replaces the recipe's
        kept = {name: None for name in amounts}
        base = base.model_copy(update={"budget": base.budget.model_copy(update=kept)})
    chosen = overlaid(base, typed)
    changes: dict[str, object] = {}
    if model is not None:
        changes["model"] = model
    if option:
        criterion = typed.criterion if "criterion" in typed.model_fields_set else None
        options = options_in(option)
        criterion = criterion or next(iter(options))
        changes |= {"criterion": criterion, "options": only(options, criterion)}
    for field, method in (("healing", heal), ("quantization", quantize)):
        if method == "none":
            changes[field] = None
        elif method is not None:
            changes[f"{field}.method"] = method
    if bench is not None:
        changes["benchmark"] = {} if bench else None
    if retrain is not None:
        names = [] if retrain == "none" else [one.strip() for one in retrain.split(",")]
        held = {one.method: one for one in base.retraining}
        changes["retraining"] = [
            held[name].model_dump(mode="json", exclude_unset=True)
            if name in held
            else {"method": name}
            for name in names
        ]
    return changed(chosen, changes | settings_in(settings), "command line")


def only(options: dict[str, dict[str, object]], criterion: str) -> dict[str, object]:
    """The options of the one criterion."""
    for other in options:
        if other != criterion:
            raise CriterionError(
                f"--option names criterion '{other}', but --criterion is {criterion}"
            )
    return options.get(criterion, {})


def print_run(result: RunResult, *, json: bool) -> None:
    """The plan, what was measured, and where everything is."""
    from shortllm.published import published_comparison

    published, rows = result.recipe.published, []
    if published is not None:
        rows = published_comparison(published, result.evaluation, result.recipe.evaluation)
    if json:
        print_json(
            {
                "directory": str(result.directory),
                "checkpoints": {name: str(path) for name, path in result.checkpoints.items()},
                "report": str(result.report),
                "removed": result.plan.removed,
                "reached": result.plan.reached.model_dump(),
                "perplexity": perplexities(result.evaluation),
                "tasks": task_scores(result.evaluation),
                "published": [row.model_dump() for row in rows],
            }
        )
        return
    typer.echo(plan_line(result.plan))
    print_evaluation(result.evaluation)
    if result.benchmark is not None:
        typer.echo("")
        print_benchmark(result.benchmark)
    if published is not None:
        typer.echo("")
        print_published(published, result.plan, rows)
    width = max(map(len, (*result.checkpoints, "report")))
    for name, path in {**result.checkpoints, "report": result.report}.items():
        typer.echo(f"{name + ':':{width + 1}} {path}")
