"""`run`: all stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from shortllm.cli.options import (
    BatchSize,
    Blocks,
    BosEverySample,
    CalibrationFile,
    Contiguous,
    Continuations,
    CriterionName,
    CriterionOption,
    Data,
    Device,
    Dtype,
    EvalBos,
    EvalLength,
    Json,
    Length,
    Limit,
    MaxMemory,
    MaxSegments,
    NewTokens,
    ParamRatio,
    PeriodAligned,
    Prompt,
    ProtectFirst,
    ProtectLast,
    Ratio,
    Remove,
    Revision,
    SampleCount,
    Sampler,
    Seed,
    Stream,
    TargetMemory,
    TargetParams,
    TargetSpeedup,
    TaskData,
    Tasks,
    bytes_in,
    names_in,
    numbers_in,
    options_in,
    parameters_in,
    places_in,
    single,
)
from shortllm.cli.output import (
    command_line,
    perplexities,
    plan_line,
    print_benchmark,
    print_beside,
    print_evaluation,
    print_json,
    task_scores,
)
from shortllm.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from shortllm.recipe import Recipe

PLACES = {
    "model": "model",
    "revision": "revision",
    "criterion": "criterion",
    "data": "calibration.data",
    "calibration": "calibration.file",
    "sampler": "calibration.sampler",
    "samples": "calibration.samples",
    "length": "calibration.length",
    "seed": "calibration.seed",
    "bos_every_sample": "calibration.bos_every_sample",
    "eval_data": "evaluation.data",
    "eval_length": "evaluation.length",
    "eval_bos": "evaluation.bos",
    "max_segments": "evaluation.max_segments",
    "prompt": "evaluation.prompt",
    "continuations": "evaluation.continuations",
    "new_tokens": "evaluation.new_tokens",
    "task_data": "evaluation.task_data",
    "limit": "evaluation.limit",
    "batch_size": "evaluation.batch_size",
    "remove": "budget.remove",
    "ratio": "budget.ratio",
    "param_ratio": "budget.param_ratio",
    "target_speedup": "budget.target_speedup",
    "contiguous": "budget.contiguous",
    "protect_first": "budget.protect_first",
    "protect_last": "budget.protect_last",
    "period_aligned": "budget.period_aligned",
    "use_published_order": "use_published_order",
    "device": "device",
    "dtype": "dtype",
    "stream": "stream",
}
"""Flag -> the field of a recipe that it sets."""

READ: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "blocks": ("budget.blocks", numbers_in),
    "target_params": ("budget.target_params", parameters_in),
    "target_memory": ("budget.target_memory", bytes_in),
    "tasks": ("evaluation.tasks", names_in),
    "max_memory": ("max_memory", bytes_in),
}
"""The same for flags whose text is read first."""

AMOUNTS = {
    name: f"budget.{name}"
    for name in (
        "remove", "ratio", "param_ratio", "blocks", "target_params", "target_memory",
        "target_speedup",
    )
}  # fmt: skip
"""Flags that say how much goes: one of them takes the place of what the recipe says."""


def run(
    ctx: typer.Context,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="[MODEL]", help="Checkpoint directory or Hub id. Default: embedded."
        ),
    ] = None,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="A recipe by name (`shortllm recipes list`), or a .yaml file; flags go before it."
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Run directory. Default: runs/<model>-<criterion>-<budget>."),
    ] = None,
    criterion: CriterionName = "ppl",
    option: CriterionOption = None,
    remove: Remove = None,
    ratio: Ratio = None,
    param_ratio: ParamRatio = None,
    blocks: Blocks = None,
    target_params: TargetParams = None,
    target_memory: TargetMemory = None,
    target_speedup: TargetSpeedup = None,
    contiguous: Contiguous = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    period_aligned: PeriodAligned = False,
    use_published_order: Annotated[
        bool,
        typer.Option(
            "--use-published-order",
            help="Remove by the order of blocks that the recipe has as published; score nothing.",
        ),
    ] = False,
    data: Data = None,
    calibration: CalibrationFile = None,
    sampler: Sampler = "random",
    samples: SampleCount = 10,
    length: Length = 128,
    seed: Seed = 1234,
    bos_every_sample: BosEverySample = None,
    eval_data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Text to measure on; may be repeated. Default: rows of --data kept apart from "
            "calibration, or wikitext2 and ptb."
        ),
    ] = None,
    eval_length: EvalLength = 128,
    eval_bos: EvalBos = None,
    max_segments: MaxSegments = None,
    prompt: Prompt = None,
    continuations: Continuations = 5,
    new_tokens: NewTokens = 128,
    retrain: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="METHOD",
            help="Heal by lora, full, distill or last-blocks; several, e.g. lora,full, each from "
            "the same start; none. Default: as the recipe has it.",
        ),
    ] = None,
    bench: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--bench/--no-bench", help="Measure speed and memory. Default: recipe."),
    ] = None,
    places: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any field of a recipe, e.g. retraining.max_steps=200 or benchmark.batches=[1,8]; "
            "may be repeated.",
        ),
    ] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """All stages: score, plan, prune, retrain, evaluate, bench, report. Without a model: the
    embedded one.

    Removes a quarter of the blocks unless told otherwise. The same command again goes on where an
    interrupted one was.
    """
    import shortllm
    from shortllm.published import beside
    from shortllm.recipes import DEFAULT, changed, default_recipe, load_recipe

    changes = changes_of(ctx, places or [])
    if recipe is not None:
        base = load_recipe(recipe)
    else:
        base = default_recipe() if (model or DEFAULT) == DEFAULT else shortllm.Recipe()
    asked = changed(_healed(base, retrain), changes, "command line")
    result = shortllm.run(asked, out=out, command=command_line())
    published, rows = result.recipe.published, []
    if published is not None:
        rows = beside(published, result.evaluation, result.recipe.evaluation)
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
        print_beside(published, result.plan, rows)
    width = max(map(len, (*result.checkpoints, "report")))
    for name, path in {**result.checkpoints, "report": result.report}.items():
        typer.echo(f"{name + ':':{width + 1}} {path}")


def changes_of(ctx: typer.Context, places: Sequence[str]) -> dict[str, Any]:
    """What was typed, by its place in a recipe; what was not leaves the recipe as it is.

    Raises:
        ShortLLMError: a value of another form.
    """
    typed = {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    changes = {place: typed[name] for name, place in PLACES.items() if name in typed}
    for name, (place, read) in READ.items():
        if name in typed:
            changes[place] = read(typed[name])
    if any(name in typed for name in AMOUNTS):
        changes = {place: changes.get(place) for place in AMOUNTS.values()} | changes
    if "option" in typed:
        criterion = typed.get("criterion")
        options = options_in(typed["option"], [criterion or "ppl"])
        changes["options"] = single(options, criterion or next(iter(options)))
        changes.setdefault("criterion", next(iter(options)))
    if "bench" in typed:
        changes["benchmark"] = {} if typed["bench"] else None
    return changes | places_in(places)


def _healed(base: Recipe, methods: str | None) -> Recipe:
    """The recipe with the ways of healing asked for, each as it has it or else with defaults."""
    if methods is None:
        return base
    import shortllm
    from shortllm.retraining.options import DEFAULTS as METHODS

    names = [] if methods == "none" else names_in(methods)
    for name in names:
        if name not in METHODS:
            raise RecipeError(f"--retrain {name}: no such method.{did_you_mean(name, METHODS)}")
    held: dict[str, shortllm.RetrainOptions] = {one.method: one for one in base.retraining}
    chosen = [
        held.get(name) or shortllm.RetrainOptions.model_validate({"method": name}) for name in names
    ]
    return base.model_copy(update={"retraining": chosen})
