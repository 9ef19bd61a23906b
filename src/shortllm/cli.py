"""The command line: each command parses, calls the function of the same name, and prints the
result.

Answers go to standard output (`--json`: exactly one line of JSON), progress and notes to standard
error. Exit codes: 0 done, 2 a user's mistake or bad input, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from shortllm import __version__
from shortllm.errors import BudgetError, CriterionError, ShortLLMError

if TYPE_CHECKING:
    from shortllm.planning import Budget
    from shortllm.recipe import CalibrationOptions
    from shortllm.results import Benchmark, BlockScores, Comparison, Evaluation, PrunePlan
    from shortllm.summary import ModelSummary

app = typer.Typer(
    name="shortllm",
    help="Make large language models shorter: score their blocks, remove some, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UsageError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""Wrong flags and arguments; typer brings its own copy of click or uses the installed one."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

# Options that several commands share. `Optional` because typer reads these at run time on Python
# 3.10.
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, Hub id, or 'embedded'.")
]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a Hub model.")]  # noqa: UP045
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Computation type; auto: float32 on a CPU, else the checkpoint's own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]

Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Calibration text: a .txt, .jsonl, .json or .parquet file, a Hub data set "
        "name[:config[:split]], or a built-in name. Default: bookcorpus."
    ),
]
CalibrationFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--calibration", help="Token ids given directly: an earlier run or a JSON list of lists."
    ),
]
Sampler = Annotated[
    Literal["random", "packed"], typer.Option(help="How windows are cut from the text.")
]
SampleCount = Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per calibration sample.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampler.")]
BosEverySample = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(help="Begin every sample with BOS. Default: for Gemma models only."),
]
CriterionName = Annotated[
    str,
    typer.Option(
        "--criterion",
        help="Rule that scores the blocks: ppl, kl, taylor, magnitude, influence, relative, "
        "angular, greedy, last, random, even.",
    ),
]
CriterionNames = Annotated[
    str,
    typer.Option(
        "--criterion",
        help="Rules that score the blocks, e.g. ppl or taylor,influence: several take as few "
        "passes as there can be. ppl, kl, taylor, magnitude, influence, relative, angular, greedy, "
        "last, random, even.",
    ),
]
ComparedCriteria = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--criterion",
        help="Rules to compare, e.g. ppl,taylor,influence. Default: ppl, kl, taylor, magnitude, "
        "influence, relative, angular, greedy, last, even.",
    ),
]
CriterionOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--option",
        metavar="CRITERION.NAME=VALUE",
        help="Option of a criterion, e.g. taylor.power=2 or greedy.inner=kl; may be repeated.",
    ),
]
Stream = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--stream/--no-stream",
        help="Read the blocks one at a time from the files. Default: where the model does not fit.",
    ),
]
MaxMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Hidden streams beyond this size go to a file, e.g. 4GiB. Default: half of what is "
        "free."
    ),
]
Contiguous = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--contiguous/--scattered",
        help="Remove one span of blocks, or single ones. Default: a span where the criterion "
        "scores spans (angular).",
    ),
]

Remove = Annotated[Optional[int], typer.Option(help="Blocks to remove.")]  # noqa: UP045
Ratio = Annotated[Optional[float], typer.Option(help="Part of the blocks to remove, e.g. 0.25.")]  # noqa: UP045
ParamRatio = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Part of all parameters to remove, with as few blocks as reach it."),
]
Blocks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Exactly these blocks, counted from 0, e.g. 3,4,8."),
]
TargetParams = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="At most so many parameters left, e.g. 1.0B or 350M."),
]
TargetMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="At most so much memory left for weights and cache, e.g. 8GiB."),
]
TargetSpeedup = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="At least so many times as fast, measured here, e.g. 1.3."),
]
ProtectFirst = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="First blocks that stay. Default: 4, at most a quarter of the blocks."),
]
ProtectLast = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Last blocks that stay. Default: 2, at most a quarter of the blocks."),
]
PeriodAligned = Annotated[
    bool,
    typer.Option(
        "--period-aligned",
        help="Remove only whole periods where the kinds of blocks repeat, as other programs need.",
    ),
]

EvalLength = Annotated[
    int, typer.Option(min=2, help="Tokens per segment; 2048 is the usual protocol.")
]
EvalBos = Annotated[
    Optional[Literal["first", "every", "none"]],  # noqa: UP045
    typer.Option(
        help="Where BOS stands. Default: before the first segment; before every one for Gemma."
    ),
]
MaxSegments = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Measure only the first so many segments."),
]
Prompt = Annotated[Optional[str], typer.Option(help="Prompt of the generation samples.")]  # noqa: UP045
Continuations = Annotated[
    int, typer.Option(min=0, help="Generation samples per model; 0 for none.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens of each generation sample.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
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

    budget = _budget(
        remove,
        ratio,
        param_ratio,
        blocks,
        contiguous,
        protect_first,
        protect_last,
        period_aligned,
        targets=_targets(target_params, target_memory, target_speedup),
        default_ratio=0.25,
    )
    recipe = shortllm.Recipe(
        model=model,
        revision=revision,
        criterion=criterion,
        options=_single(_options(option, [criterion]), criterion),
        calibration=_calibration(
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
        ),
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=_bytes(max_memory),
    )
    result = shortllm.run(recipe, out=out, command=_command_line())
    if json:
        _print_json(
            {
                "directory": str(result.directory),
                "checkpoint": str(result.checkpoint),
                "report": str(result.report),
                "removed": result.plan.removed,
                "reached": result.plan.reached.model_dump(),
                "perplexity": _perplexities(result.evaluation),
            }
        )
        return
    typer.echo(_plan_line(result.plan))
    _print_evaluation(result.evaluation)
    typer.echo(f"checkpoint: {result.checkpoint}")
    typer.echo(f"report:     {result.report}")


@app.command()
def info(
    model: ModelArgument,
    revision: Revision = None,
    samples: SampleCount = 10,
    length: Length = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    option: CriterionOption = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="Measure this machine for two seconds; without, no times are foretold.",
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Blocks, parameters and bytes of a model, what a removal saves, and what scoring takes."""
    import shortllm
    from shortllm import criteria

    summary = shortllm.info(
        model,
        revision=revision,
        samples=samples,
        length=length,
        device=device,
        dtype=dtype,
        options=_options(option, criteria.names()),
        probe=probe,
    )
    if json:
        _print_json(summary.model_dump(mode="json"))
    else:
        _print_summary(summary)


@app.command()
def score(
    model: ModelArgument = "embedded",
    out: Annotated[Path, typer.Option(help="Run directory for calibration and scores.json.")] = ...,  # type: ignore[assignment]
    criterion: CriterionNames = "ppl",
    option: CriterionOption = None,
    data: Data = None,
    calibration: CalibrationFile = None,
    sampler: Sampler = "random",
    samples: SampleCount = 10,
    length: Length = 128,
    seed: Seed = 1234,
    bos_every_sample: BosEverySample = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Importance of every block, by one or several criteria on calibration text.

    Under `accelerate launch -m shortllm score ...` or `torchrun -m shortllm score ...` the samples
    are shared by all processes. An interrupted pass goes on when the same command is given again.
    """
    import shortllm

    names = _names(criterion)
    found = shortllm.score(
        model,
        criterion=names,
        options=_options(option, names),
        calibration=_calibration(
            data, calibration, sampler, samples, length, seed, bos_every_sample
        ),
        out=out,
        revision=revision,
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=_bytes(max_memory),
        command=_command_line(),
    )
    if not _is_main_process():
        return
    if json:
        one = [scores.model_dump(mode="json") for scores in found.values()]
        _print_json(one[0] if len(one) == 1 else one)
        return
    for name, scores in found.items():
        _print_scores(scores)
        file = "scores.json" if len(found) == 1 else f"scores-{name}.json"
        typer.echo(f"scores: {out / file}")


@app.command(name="compare-criteria")
def compare_criteria(
    model: ModelArgument = "embedded",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Run directory. Default: runs/<model>-comparison."),
    ] = None,
    criterion: ComparedCriteria = None,
    option: CriterionOption = None,
    ratios: Annotated[
        str, typer.Option(help="Parts of the blocks to remove.")
    ] = "0.1,0.2,0.3,0.4,0.5",
    random: Annotated[
        int, typer.Option(min=1, help="Random removals of each size: what criteria must beat.")
    ] = 10,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    data: Data = None,
    calibration: CalibrationFile = None,
    sampler: Sampler = "random",
    samples: SampleCount = 10,
    length: Length = 128,
    seed: Seed = 1234,
    bos_every_sample: BosEverySample = None,
    eval_data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Text to measure on. Default: rows of --data kept apart from calibration, or "
            "wikitext2."
        ),
    ] = None,
    eval_length: EvalLength = 128,
    eval_bos: EvalBos = None,
    max_segments: Annotated[
        int, typer.Option(min=1, help="Measure on the first so many segments.")
    ] = 64,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Which criterion to trust for this model: the perplexity left by each, at several budgets.

    Scores the blocks by every criterion, and measures all that they would remove, and random
    removals, in one pass over held-out text. The same command again skips what is up to date.
    """
    import shortllm
    from shortllm.comparison import CRITERIA, default_directory

    names = list(CRITERIA) if criterion is None else _names(criterion)
    directory = out or default_directory(model)
    found = shortllm.compare_criteria(
        model,
        criterion=names,
        options=_options(option, names),
        ratios=_ratios(ratios),
        random=random,
        protect_first=protect_first,
        protect_last=protect_last,
        calibration=_calibration(
            data, calibration, sampler, samples, length, seed, bos_every_sample
        ),
        evaluation=shortllm.EvaluationOptions(
            data=[eval_data] if eval_data else [],
            length=eval_length,
            bos=eval_bos,
            max_segments=max_segments,
        ),
        out=directory,
        revision=revision,
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=_bytes(max_memory),
        command=_command_line(),
    )
    if not _is_main_process():
        return
    if json:
        _print_json(found.model_dump(mode="json"))
    else:
        _print_comparison(found)
        typer.echo(f"report: {directory / 'comparison.html'}")


@app.command()
def plan(
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES", help="A run directory, or a file of scores.")
    ],
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
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where to write the plan. Default: plan.json beside the scores."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Choose the blocks to remove from scores and a budget."""
    import shortllm

    budget = _budget(
        remove,
        ratio,
        param_ratio,
        blocks,
        contiguous,
        protect_first,
        protect_last,
        period_aligned,
        targets=_targets(target_params, target_memory, target_speedup),
    )
    made = shortllm.plan(scores, budget, out=out, device=device, dtype=dtype)
    if json:
        _print_json(made.model_dump(mode="json"))
        return
    typer.echo(_plan_line(made))
    typer.echo(made.reason)


@app.command()
def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")] = ...,  # type: ignore[assignment]
    plan: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A plan.json, or the run directory that holds it."),
    ] = None,
    blocks: Blocks = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Load original and result and compare what they compute; needs memory for one."
        ),
    ] = True,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
) -> None:
    """Write the checkpoint without the blocks of a plan, or without the blocks named."""
    import shortllm

    if (plan is None) == (blocks is None):
        raise BudgetError("give either --plan plan.json or --blocks 3,4,8")
    chosen = plan if plan is not None else _numbers(blocks or "")
    written = shortllm.prune(
        model,
        chosen,
        out,
        revision=revision,
        verify=verify,
        device=device,
        dtype=dtype,
        stream=stream,
    )
    typer.echo(f"checkpoint: {written}")


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Checkpoint directories or Hub ids.")
    ],
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Text to measure on; may be repeated. Default: wikitext2 and ptb."),
    ] = None,
    length: EvalLength = 128,
    bos: EvalBos = None,
    max_segments: MaxSegments = None,
    prompt: Prompt = None,
    continuations: Continuations = 0,
    new_tokens: NewTokens = 128,
    out: Annotated[Optional[Path], typer.Option(help="Write the result to this file.")] = None,  # noqa: UP045
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Perplexity of one or more models with the same tokenizer."""
    import shortllm

    measured = shortllm.evaluate(
        models,
        options=shortllm.EvaluationOptions(
            data=data or [],
            length=length,
            bos=bos,
            max_segments=max_segments,
            prompt=prompt,
            continuations=continuations,
            new_tokens=new_tokens,
        ),
        out=out,
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=_bytes(max_memory),
    )
    if json:
        _print_json(measured.model_dump(mode="json"))
        return
    _print_evaluation(measured)
    for model in measured.models:
        for text in model.samples.texts if model.samples else ():
            typer.echo(f"\n[{model.name}] {model.samples.prompt if model.samples else ''}{text}")


@app.command()
def export_lint(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A finished checkpoint, or a Hub id.")
    ],
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Whether llama.cpp (GGUF) and vLLM will represent a checkpoint rightly."""
    import shortllm

    findings = shortllm.export_lint(model, revision=revision)
    if json:
        _print_json([finding.model_dump(mode="json") for finding in findings])
        return
    for finding in findings:
        way_out = f". {finding.way_out}" if finding.way_out else ""
        typer.echo(f"{finding.target}: {finding.verdict} ({finding.reason}){way_out}")
        for name, value in finding.fields.items():
            typer.echo(f"    {name}: {value}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
) -> None:
    """Write report.html and the model card from the files of a run."""
    import shortllm

    typer.echo(f"report: {shortllm.report(run_dir)}")


# Speed and memory.


def _targets(params: str | None, memory: str | None, speedup: float | None) -> dict[str, Any]:
    """The fields of a budget that say what should be left."""
    return {
        "target_params": _parameters(params),
        "target_memory": _bytes(memory),
        "target_speedup": speedup,
    }


def _parameters(text: str | None) -> int | None:
    """`1.0B`, `350M` or a plain number as a count.

    Raises:
        ShortLLMError: another form.
    """
    if text is None:
        return None
    powers = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
    number = text.strip().rstrip("KkMmBbTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(round(float(number) * 10.0 ** powers[unit]))
    except (ValueError, KeyError, OverflowError) as error:
        raise ShortLLMError(f"'{text}' is no number of parameters such as 1.0B or 350M") from error


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Checkpoint directories or Hub ids.")
    ],
    batch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Batch sizes, e.g. 1,4,16. Default: 1."),
    ] = None,
    new_tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Lengths of what is generated, e.g. 128,512. Default: 128."),
    ] = None,
    preset: Annotated[
        Optional[Literal["paper"]],  # noqa: UP045
        typer.Option(help="A published sweep; paper: batch 1 to 256, 128 and 512 new tokens."),
    ] = None,
    warmup: Annotated[int, typer.Option(help="Runs of each model before the measured ones.")] = 10,
    runs: Annotated[int, typer.Option(help="Measured runs of each model.")] = 20,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Default: The Leaning Tower of Pisa is known for."),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="With a static cache and torch.compile.")
    ] = False,
    attention: Annotated[
        Optional[Literal["sdpa", "eager", "flash_attention_2"]],  # noqa: UP045
        typer.Option("--attn", help="Attention implementation. Default: the model's own."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory for bench.json, bench.csv and plots, e.g. a run directory."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Latency, throughput and memory of models, which take turns run by run.

    Speed-ups are against the first model. With --out an interrupted sweep goes on where it was
    when the same command is given again.
    """
    import shortllm
    from shortllm.recipe import BENCHMARK_PRESETS, PROMPT

    sweep = BENCHMARK_PRESETS[preset] if preset else {"batches": [1], "new_tokens": [128]}
    measured = shortllm.bench(
        models,
        options=shortllm.BenchmarkOptions(
            batches=_counts(batch, "--batch") or sweep["batches"],
            new_tokens=_counts(new_tokens, "--new-tokens") or sweep["new_tokens"],
            warmup=warmup,
            runs=runs,
            prompt=prompt or PROMPT,
            compile=compile,
            attention=attention,
        ),
        out=out,
        device=device,
        dtype=dtype,
    )
    if json:
        _print_json(measured.model_dump(mode="json"))
        return
    _print_benchmark(measured)
    if out is not None:
        typer.echo(f"benchmark: {out / 'bench.json'}")


def _counts(text: str | None, flag: str) -> list[int]:
    """`1,4,16` as numbers; none where nothing was given.

    Raises:
        ShortLLMError: another form.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise ShortLLMError(f"{flag} '{text}' is not a list of numbers such as 1,4,16") from error


def _print_benchmark(found: Benchmark) -> None:
    from shortllm.reporting.speed import table

    typer.echo(
        f"{found.device_name}, {'compiled, ' if found.compiled else ''}"
        f"{found.warmup} warm-up and {found.runs} measured runs of each model, in turn"
    )
    head, rows = table(found)
    _print_table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `shortllm` command; never returns."""
    _print_notes()
    _insist_on_interrupts()
    try:
        code = app(args=arguments, standalone_mode=False)
    except ShortLLMError as error:
        if os.environ.get("SHORTLLM_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        code = 2
    except UsageError as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, typer.Abort):  # newer versions of typer return 130 instead
        code = INTERRUPTED
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _repeat_interrupt(after_s=0)
        typer.echo("interrupted. The same command again goes on from here", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _print_notes() -> None:
    """Print the package's log to standard error; libraries have handlers of their own."""
    log = logging.getLogger("shortllm")
    log.setLevel(logging.INFO if _is_main_process() else logging.ERROR)
    log.handlers = [logging.StreamHandler(sys.stderr)]


def _insist_on_interrupts() -> None:
    """Repeat a Ctrl-C until it gets through.

    Python drops the KeyboardInterrupt that happens to be raised inside a destructor, and the run
    would go on as if nothing had been typed.
    """

    def interrupt(signum: int, frame: object) -> None:
        _repeat_interrupt(after_s=0.5)
        raise KeyboardInterrupt

    def report(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
    signal.signal(signal.SIGINT, interrupt)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, interrupt)


def _repeat_interrupt(*, after_s: float) -> None:
    """Have the interrupt raised again after a while; 0 calls that off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, after_s)


def _budget(
    remove: int | None,
    ratio: float | None,
    param_ratio: float | None,
    blocks: str | None,
    contiguous: bool | None,
    protect_first: int | None,
    protect_last: int | None,
    period_aligned: bool,
    *,
    targets: dict[str, Any],
    default_ratio: float | None = None,
) -> Budget:
    import shortllm

    amounts = (remove, param_ratio, blocks, ratio, *targets.values())
    if all(amount is None for amount in amounts):
        ratio = default_ratio
    budget = shortllm.Budget(
        remove=remove,
        ratio=ratio,
        param_ratio=param_ratio,
        blocks=None if blocks is None else _numbers(blocks),
        contiguous=contiguous,
        protect_first=protect_first,
        protect_last=protect_last,
        period_aligned=period_aligned,
        **targets,
    )
    budget.asked()
    return budget


def _names(text: str) -> list[str]:
    """`ppl,taylor` as names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _ratios(text: str) -> list[float]:
    """`0.1,0.25` as numbers.

    Raises:
        BudgetError: another form.
    """
    try:
        return [float(part) for part in _names(text)]
    except ValueError as error:
        raise BudgetError(
            f"--ratios '{text}' is not a list of parts of the blocks such as 0.1,0.25,0.5"
        ) from error


def _options(given: list[str] | None, criteria: list[str]) -> dict[str, dict[str, Any]]:
    """`taylor.power=2` and the like as options by criterion.

    Raises:
        CriterionError: another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in given or ():
        place, equals, value = text.partition("=")
        criterion, dot, name = place.partition(".")
        if not equals or not dot or not name:
            raise CriterionError(
                f"--option '{text}' is not of the form CRITERION.NAME=VALUE, e.g. "
                f"{criteria[0]}.name={value or 1}"
            )
        options.setdefault(criterion, {})[name] = value
    return options


def _single(options: dict[str, dict[str, Any]], criterion: str) -> dict[str, Any]:
    """The options of the one criterion there is.

    Raises:
        CriterionError: some are another's.
    """
    for other in options:
        if other != criterion:
            raise CriterionError(
                f"an option of criterion '{other}' was given, but --criterion is {criterion}"
            )
    return options.get(criterion, {})


def _bytes(text: str | None) -> int | None:
    """`4GiB`, `500MB` or a plain number as bytes.

    Raises:
        ShortLLMError: another form.
    """
    if text is None:
        return None
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power, letter: 1024**power}
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError) as error:
        raise ShortLLMError(f"'{text}' is no amount of memory such as 4GiB or 500MB") from error


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _command_line() -> list[str]:
    """What was typed, for run.json."""
    return ["shortllm", *sys.argv[1:]]


def _numbers(text: str) -> list[int]:
    """`3,4,8` as block numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BudgetError(
            f"--blocks '{text}' is not a list of block numbers such as 3,4,8"
        ) from error


def _calibration(
    data: str | None,
    file: Path | None,
    sampler: Literal["random", "packed"],
    samples: int,
    length: int,
    seed: int,
    bos_every_sample: bool | None,
) -> CalibrationOptions:
    import shortllm

    return shortllm.CalibrationOptions(
        data=data,
        file=file,
        sampler=sampler,
        samples=samples,
        length=length,
        seed=seed,
        bos_every_sample=bos_every_sample,
    )


def _ascending(values: list[float]) -> list[int]:
    from shortllm.planning import removal_order

    return removal_order(values, protected=[])


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content))


def _print_scores(scores: BlockScores) -> None:
    rank = {block: place for place, block in enumerate(_ascending(scores.importance), start=1)}
    rows = [
        (str(b), f"{scores.importance[b]:.6g}", f"{scores.values[b]:.6g}", str(rank[b]))
        for b in range(len(scores.importance))
    ]
    typer.echo(f"{scores.criterion}:")
    _print_table(("block", "importance", "value", "rank (1 = goes first)"), rows)
    if scores.intact is not None:
        typer.echo(f"intact: {scores.intact:.6g}")


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns aligned to the right but for the first."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        typer.echo("  ".join(cells).rstrip())


def _plan_line(plan: PrunePlan) -> str:
    reached = plan.reached
    return (
        f"{plan.model.id}: {plan.model.blocks} -> {len(plan.kept)} blocks, without "
        f"{', '.join(map(str, plan.removed))} ({reached.parameter_ratio:.1%} of the parameters)"
    )


def _perplexities(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    return {
        model.name: {entry.source: entry.perplexity for entry in model.perplexity}
        for model in evaluation.models
    }


def _print_evaluation(evaluation: Evaluation) -> None:
    first = evaluation.models[0]
    sources = tuple(f"ppl {Path(entry.source).name}" for entry in first.perplexity)
    rows = [
        (
            model.name,
            str(model.model.blocks),
            f"{model.model.parameters:,}",
            f"{model.model.bytes:,}",
            *(f"{entry.perplexity:.4f}" for entry in model.perplexity),
        )
        for model in evaluation.models
    ]
    _print_table(("model", "blocks", "parameters", "bytes", *sources), rows)


def _print_comparison(comparison: Comparison) -> None:
    from shortllm.standings import standings, verdict

    columns, intact = standings(comparison), comparison.intact
    typer.echo(
        f"{comparison.model.id}: {comparison.model.blocks} blocks, intact perplexity "
        f"{intact.perplexity:.4f} on {intact.segments} x {intact.length} tokens of "
        f"{Path(intact.source).name}"
    )
    criteria = [one.criterion for one in comparison.criteria]
    rows = [
        (name, *(f"{c.perplexities[i]:.4f}{'*' if name in c.best else ' '}" for c in columns))
        for i, name in enumerate(criteria)
    ]
    rows += [
        ("random, mean", *(f"{c.random_mean:.4f} " for c in columns)),
        ("random, lowest", *(f"{min(c.random):.4f} " for c in columns)),
        ("random, highest", *(f"{max(c.random):.4f} " for c in columns)),
        ("below random's mean", *(f"{c.beat_mean} of {len(criteria)} " for c in columns)),
    ]
    _print_table(("without", *(f"{c.name} ({c.blocks}) " for c in columns)), rows)
    for left in comparison.left_out:
        typer.echo(f"left out: {100 * left.ratio:.4g} % ({left.reason})")
    best = [f"{c.name} {', '.join(c.best) or 'none'}" for c in columns]
    typer.echo(f"* lowest: {'; '.join(best)}\n{verdict(comparison)}")


def _print_summary(summary: ModelSummary) -> None:
    model = summary.model
    protected = set(summary.protected)
    typer.echo(f"{model.id}: {model.model_type}, {model.blocks} blocks")
    parts = [
        (
            f"block {b}",
            f"{n:,}",
            f"{size:,}",
            f"{n / model.parameters:.2%}",
            "protected" if b in protected else "",
        )
        for b, (n, size) in enumerate(
            zip(model.parameters_per_block, summary.bytes_per_block, strict=True)
        )
    ]
    outside_bytes = model.bytes - sum(summary.bytes_per_block)
    outside = summary.parameters_outside
    parts.append(
        ("outside", f"{outside:,}", f"{outside_bytes:,}", f"{outside / model.parameters:.2%}", "")
    )
    parts.append(("all", f"{model.parameters:,}", f"{model.bytes:,}", "100.00%", ""))
    _print_table(("part", "parameters", "bytes", "share", ""), parts)
    typer.echo("\nremoving on average saves")
    most = model.blocks - len(protected)
    counts = sorted({1, *(max(1, round(model.blocks * r)) for r in (0.1, 0.2, 0.3, 0.4, 0.5))})
    saved = [
        (f"{k} of {model.blocks}", f"{summary.saved_by(k)[0]:.1%}", f"{summary.saved_by(k)[1]:.1%}")
        for k in counts
        if k <= most
    ]
    _print_table(("blocks", "parameters", "bytes"), saved)
    _print_estimates(summary)


def _print_estimates(summary: ModelSummary) -> None:
    typer.echo(
        f"\nscoring on {summary.samples} x {summary.length} tokens in {summary.dtype} on "
        f"{summary.device}, foretold"
    )
    rows = [
        (
            ", ".join(one.criteria),
            "streamed" if one.streamed else "in memory",
            f"{one.flops / 1e12:.3g}",
            f"{one.peak_bytes / 2**30:.2f}",
            *(() if one.seconds is None else (_duration(one.seconds),)),
        )
        for one in summary.estimates
    ]
    time = () if summary.probe is None else ("time",)
    _print_table(("criteria", "blocks", "TFLOP", "peak GiB", *time), rows)
    if summary.probe is not None:
        typer.echo(
            f"measured: {summary.probe.matrix_flops_per_s / 1e9:.0f} GFLOP/s in matrix products, "
            f"{summary.probe.read_bytes_per_s / 1e6:.0f} MB/s read from the model's files"
        )
    mode = "read one at a time (streamed)" if summary.streamed else "all in memory"
    typer.echo(f"without --stream or --no-stream, blocks are {mode}: {summary.why}")


def _duration(seconds: float) -> str:
    """E.g. `12.3 s`, `5.2 min` or `3.1 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
