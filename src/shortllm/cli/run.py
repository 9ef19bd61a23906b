"""`run`: all stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

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
    ModelArgument,
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
    budget_of,
    bytes_in,
    calibration_of,
    names_in,
    options_in,
    single,
    targets_of,
)
from shortllm.cli.output import (
    command_line,
    perplexities,
    plan_line,
    print_evaluation,
    print_json,
    task_scores,
)

if TYPE_CHECKING:
    pass


def run(
    model: ModelArgument = "embedded",
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
    """All stages: score, plan, prune, evaluate, report. Without a model: the embedded one.

    Removes a quarter of the blocks unless told otherwise. The same command again goes on where an
    interrupted one was.
    """
    import shortllm

    budget = budget_of(
        remove,
        ratio,
        param_ratio,
        blocks,
        contiguous,
        protect_first,
        protect_last,
        period_aligned,
        targets=targets_of(target_params, target_memory, target_speedup),
        default_ratio=0.25,
    )
    recipe = shortllm.Recipe(
        model=model,
        revision=revision,
        criterion=criterion,
        options=single(options_in(option, [criterion]), criterion),
        calibration=calibration_of(
            data, calibration, sampler, samples, length, seed, bos_every_sample
        ),
        budget=budget,
        evaluation=shortllm.EvaluationOptions(
            data=eval_data or [],
            length=eval_length,
            bos=eval_bos,
            max_segments=max_segments,
            prompt=prompt,
            continuations=continuations,
            new_tokens=new_tokens,
            tasks=names_in(tasks or ""),
            task_data=task_data,
            limit=limit,
            batch_size=batch_size,
        ),
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=bytes_in(max_memory),
    )
    result = shortllm.run(recipe, out=out, command=command_line())
    if json:
        print_json(
            {
                "directory": str(result.directory),
                "checkpoint": str(result.checkpoint),
                "report": str(result.report),
                "removed": result.plan.removed,
                "reached": result.plan.reached.model_dump(),
                "perplexity": perplexities(result.evaluation),
                "tasks": task_scores(result.evaluation),
            }
        )
        return
    typer.echo(plan_line(result.plan))
    print_evaluation(result.evaluation)
    typer.echo(f"checkpoint: {result.checkpoint}")
    typer.echo(f"report:     {result.report}")
