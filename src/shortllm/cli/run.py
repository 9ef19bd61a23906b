"""`run`: all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from shortllm.cli.asked import recipe_of
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
    EvalData,
    EvalLength,
    Json,
    Length,
    Limit,
    MaxMemory,
    MaxSegments,
    NewTokens,
    ParamRatio,
    PeriodAligned,
    Places,
    Prompt,
    ProtectFirst,
    ProtectLast,
    Ratio,
    RecipeName,
    Remove,
    RetrainMethods,
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
    TrustRemoteCode,
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


def run(
    ctx: typer.Context,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="[MODEL]", help="Checkpoint directory or Hub id. Default: embedded."
        ),
    ] = None,
    recipe: RecipeName = None,
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
    eval_data: EvalData = None,
    eval_length: EvalLength = 128,
    eval_bos: EvalBos = None,
    max_segments: MaxSegments = None,
    prompt: Prompt = None,
    continuations: Continuations = 5,
    new_tokens: NewTokens = 128,
    heal: Annotated[
        Optional[Literal["linear", "none"]],  # noqa: UP045
        typer.Option(help="Heal without training, by linear maps. Default: as the recipe has it."),
    ] = None,
    retrain: RetrainMethods = None,
    quantize: Annotated[
        Optional[Literal["gptq", "int8", "none"]],  # noqa: UP045
        typer.Option(help="Quantize the healed model by gptq or int8; none. Default: recipe."),
    ] = None,
    bench: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--bench/--no-bench", help="Measure speed and memory. Default: recipe."),
    ] = None,
    places: Places = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """All stages: score, plan, prune, heal, retrain, quantize, evaluate, bench, report. Without a
    model:
    the embedded one.

    Removes a quarter of the blocks unless told otherwise. The same command again goes on where an
    interrupted one was.
    """
    import shortllm
    from shortllm.published import published_comparison

    asked = recipe_of(ctx, model, recipe, retrain, places or [])
    result = shortllm.run(asked, out=out, command=command_line())
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
        print_beside(published, result.plan, rows)
    width = max(map(len, (*result.checkpoints, "report")))
    for name, path in {**result.checkpoints, "report": result.report}.items():
        typer.echo(f"{name + ':':{width + 1}} {path}")
