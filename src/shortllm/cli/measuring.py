"""`eval`, `bench`, `report`: what models can do, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from shortllm.cli.options import (
    BatchSize,
    Continuations,
    Device,
    Dtype,
    EvalBos,
    EvalLength,
    Json,
    Limit,
    MaxMemory,
    MaxSegments,
    NewTokens,
    Prompt,
    Stream,
    TaskData,
    Tasks,
    TrustRemoteCode,
)
from shortllm.cli.output import print_benchmark, print_evaluation, print_json, print_table
from shortllm.cli.values import bytes_in, counts_in, names_in


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Checkpoint directories or Hub ids.")
    ],
    data: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Text to measure on; may be repeated. Default: wikitext2 and ptb, or none where "
            "--tasks are given."
        ),
    ] = None,
    length: EvalLength = 128,
    bos: EvalBos = None,
    max_segments: MaxSegments = None,
    prompt: Prompt = None,
    continuations: Continuations = 0,
    new_tokens: NewTokens = 128,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    out: Annotated[Optional[Path], typer.Option(help="Write the result to this file.")] = None,  # noqa: UP045
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Perplexity of one or more models with the same tokenizer, and what they score in tasks."""
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
            tasks=names_in(tasks or ""),
            task_data=task_data,
            limit=limit,
            batch_size=batch_size,
        ),
        out=out,
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=bytes_in(max_memory),
    )
    if json:
        print_json(measured.model_dump(mode="json"))
        return
    print_evaluation(measured)
    for model in measured.models:
        for text in model.samples.texts if model.samples else ():
            typer.echo(f"\n[{model.name}] {model.samples.prompt if model.samples else ''}{text}")


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
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Latency, throughput and memory of models, which take turns run by run.

    Speed-ups are against the first model. With --out an interrupted sweep goes on where it was
    when the same command is given again.
    """
    import shortllm
    from shortllm.benchmark.options import BENCHMARK_PRESETS, PROMPT

    sweep = BENCHMARK_PRESETS[preset] if preset else {"batches": [1], "new_tokens": [128]}
    measured = shortllm.bench(
        models,
        options=shortllm.BenchmarkOptions(
            batches=counts_in(batch, "--batch") or sweep["batches"],
            new_tokens=counts_in(new_tokens, "--new-tokens") or sweep["new_tokens"],
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
        print_json(measured.model_dump(mode="json"))
        return
    print_benchmark(measured)
    if out is not None:
        typer.echo(f"benchmark: {out / 'bench.json'}")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
    json: Json = False,
) -> None:
    """Several runs on one page: quality against size and against latency."""
    import shortllm
    from shortllm.reporting.runs_page import runs_table

    models = shortllm.compare(runs, out=out)
    if json:
        print_json([one.model_dump(mode="json") for one in models])
        return
    print_table(*runs_table(models).plain())
    typer.echo(f"page: {out}")


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
) -> None:
    """Write report.html and the model card from the files of a run."""
    import shortllm

    typer.echo(f"report: {shortllm.report(run_dir)}")
