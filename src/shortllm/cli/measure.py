"""`eval`, `bench`, `report`, `compare`, `export-lint`: what models can do, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from shortllm.benchmark.options import BENCHMARK_PRESETS, BenchmarkOptions
from shortllm.cli.flags import flags
from shortllm.cli.options import Json, Revision
from shortllm.cli.output import print_benchmark, print_evaluation, print_json, print_table
from shortllm.evaluation.options import EvaluationOptions
from shortllm.runtime import DeviceOptions, Runtime, Trust

Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Checkpoint directories or Hub ids.")
]


@flags(options=EvaluationOptions, runtime=Runtime)
def evaluate(
    models: Models,
    options: EvaluationOptions,
    runtime: Runtime,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure perplexity, zero-shot tasks and samples of models that share a tokenizer.

    Example: shortllm eval Qwen/Qwen3-0.6B qwen3-short --data wikitext2 --tasks paper
    """
    import shortllm

    measured = shortllm.evaluate(models, options=options, runtime=runtime, out=out)
    if json:
        print_json(measured.model_dump(mode="json"))
        return
    print_evaluation(measured)
    for model in measured.models:
        for text in model.samples.texts if model.samples else ():
            typer.echo(f"\n[{model.name}] {model.samples.prompt if model.samples else ''}{text}")


@flags(options=BenchmarkOptions, runtime=DeviceOptions)
def bench(
    models: Models,
    options: BenchmarkOptions,
    runtime: DeviceOptions,
    preset: Annotated[
        Literal["paper"] | None,
        typer.Option(help="A published sweep. paper: batch 1 to 256, 128 and 512 new tokens."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for bench.json, bench.csv and plots, e.g. a run directory."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure latency, throughput and memory of models, in interleaved runs.

    Speed-ups are against the first model. With --out, run the same command again to resume an
    interrupted sweep.

    Example: shortllm bench Qwen/Qwen3-0.6B qwen3-short --batch 1,16
    """
    import shortllm

    if preset is not None:
        given = options.model_dump(exclude_unset=True)
        options = BenchmarkOptions(**{**BENCHMARK_PRESETS[preset], **given})
    measured = shortllm.bench(models, options=options, runtime=runtime, out=out)
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
    """Compare several runs on one page: quality against size and latency.

    Example: shortllm compare runs/qwen3 runs/other
    """
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
    """Write report.html and the model card of a run from its files.

    Example: shortllm report runs/qwen3
    """
    import shortllm

    typer.echo(f"report: {shortllm.report(run_dir)}")


@flags(trust=Trust)
def export_lint(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a Hub id.")],
    trust: Trust,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Check whether llama.cpp (GGUF) and vLLM will load a shortened checkpoint correctly.

    Example: shortllm export-lint qwen3-short
    """
    import shortllm

    findings = shortllm.export_lint(model, revision=revision, trust=trust)
    if json:
        print_json([finding.model_dump(mode="json") for finding in findings])
        return
    for finding in findings:
        hint = f". {finding.hint}" if finding.hint else ""
        typer.echo(f"{finding.target}: {finding.verdict} ({finding.reason}){hint}")
        for name, value in finding.fields.items():
            typer.echo(f"    {name}: {value}")
