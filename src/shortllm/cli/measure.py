"""`eval`, `bench`, `check`, `report`, `export-lint`, `demo`: what models can do, how fast."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from shortllm.benchmark.options import BENCHMARK_PRESETS, BenchmarkOptions, DraftedOptions
from shortllm.cli import early
from shortllm.cli.flags import Json, Revision, flags
from shortllm.cli.output import answered, print_benchmark, print_evaluation, print_table
from shortllm.demo import named_models
from shortllm.errors import ShortLLMError, TargetMissedError, install_hint
from shortllm.evaluation.options import EvaluationOptions
from shortllm.evaluation.quality import GateOptions
from shortllm.files import require_file_target
from shortllm.runtime import DeviceOptions, Runtime, Trust
from shortllm.surgery.export_tables import NAMES

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Checkpoint directories, GGUF files or Hub ids."),
]
Panel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Checkpoint directory, GGUF file, Hub id, or 'embedded'."),
]


@flags(options=EvaluationOptions, runtime=Runtime)
def evaluate(
    models: Models,
    options: EvaluationOptions,
    runtime: Runtime,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure perplexity, tasks and samples of models that share a tokenizer.

    Under `accelerate launch -m shortllm eval ...` or `torchrun -m shortllm eval ...` all processes
    share the windows and the documents of tasks.

    Example: shortllm eval Qwen/Qwen3-0.6B qwen3-short --data wikitext2 --tasks paper
    """
    import shortllm

    if out is not None:
        require_file_target(out)
    if options.tasks and find_spec("lm_eval") is None:
        raise ShortLLMError(
            f"tasks need lm-evaluation-harness. Install it with: {install_hint('eval')}"
        )
    measured = shortllm.evaluate(models, options=options, runtime=runtime, out=out)
    if answered(measured, in_json=json):
        return
    print_evaluation(measured)
    for model in measured.models:
        for text in model.samples.shown() if model.samples else ():
            typer.echo(f"\n[{model.name}] {text}")


@flags(options=BenchmarkOptions, drafted=DraftedOptions, runtime=DeviceOptions)
def bench(
    models: Models,
    options: BenchmarkOptions,
    drafted: DraftedOptions,
    runtime: DeviceOptions,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="A shorter model that drafts for the first model, whose text is then measured "
            "alone and with it; can be repeated.",
        ),
    ] = None,
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
    interrupted sweep. With --draft, greedy text with the draft must be that of the model alone.

    Example: shortllm bench Qwen/Qwen3-0.6B qwen3-short --batch 1,16

    Example: shortllm bench Qwen/Qwen3-0.6B --draft qwen3-short --draft-tokens 2,4
    """
    import shortllm

    if preset is not None:
        given = options.model_dump(exclude_unset=True)
        options = BenchmarkOptions(**{**BENCHMARK_PRESETS[preset], **given})
    if out is not None:
        early.check_directory(out)
    measured = shortllm.bench(
        models, options=options, drafted=drafted, runtime=runtime, draft=draft, out=out
    )
    if answered(measured, in_json=json):
        return
    print_benchmark(measured)
    if out is not None:
        typer.echo(f"benchmark: {out / 'bench.json'}")


@flags(options=GateOptions)
def check(
    options: GateOptions,
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or a checkpoint in one.")
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model of the run. Default: the last one: quantized, else retrained, else healed, "
            "else pruned.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check a shortened model that was measured against what you ask for; a gate for CI.

    Reads result files alone. The exit code is 3 if something is not met.

    Example: shortllm check runs/qwen3 --max-ppl-increase 5% --min-speedup 1.2
    """
    import shortllm

    found = shortllm.check(run_dir, options=options, name=name)
    if not answered({**found.model_dump(mode="json"), "passed": found.passed}, in_json=json):
        print_table(
            ("", "asked", "measured", ""),
            [
                (one.of, one.asked, one.measured, "passed" if one.passed else "failed")
                for one in found.requirements
            ],
            words=True,
        )
        left = "" if found.compared else ". Its checkpoint is not there to compare with"
        typer.echo(f"{found}{left}")
    if not found.passed:
        raise typer.Exit(TargetMissedError.exit_code)


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
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(NAMES), help="A program; can be repeated. All by default."),
    ] = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Check whether llama.cpp (GGUF), vLLM, MLX, SGLang, ExecuTorch run a checkpoint correctly.

    The exit code is 3 if the verdict on one of them is `wrong`.

    Example: shortllm export-lint qwen3-short --target gguf
    """
    import shortllm
    from shortllm.surgery.export_lint import WRONG

    if unknown := set(target or ()) - set(NAMES):
        raise ShortLLMError(f"--target {unknown.pop()}: the programs are {', '.join(NAMES)}")
    findings = shortllm.export_lint(model, revision=revision, target=target, trust=trust)
    if not answered(findings, in_json=json):
        for finding in findings:
            hint = f". {finding.hint}" if finding.hint else ""
            typer.echo(f"{finding.target}: {finding.verdict} ({finding.reason}){hint}")
            for name, value in finding.fields.items():
                typer.echo(f"    {name}: {value}")
            for source in finding.sources:
                typer.echo(f"    read in: {source}")
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(WRONG)


@flags(runtime=DeviceOptions)
def demo(
    runtime: DeviceOptions,
    original: Panel = None,
    width: Panel = None,
    depth: Panel = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="A panel with a name of yours; can be repeated."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Default: the first free one from 7860."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also serve a public address through gradio's servers.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a user can generate.")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch a user can choose.")] = 8,
) -> None:
    """Show several models side by side in the browser: text, time, throughput, memory.

    Without a model: the embedded one and its shortened versions, which are made on first use.

    Example: shortllm demo --original Qwen/Qwen3-0.6B --depth qwen3-short
    """
    if find_spec("gradio") is None:
        raise ShortLLMError(f"the demo needs gradio. Install it with: {install_hint('demo')}")
    given = {"original": original, "width": width, "depth": depth}
    places = named_models(
        [
            *((name, place) for name, place in given.items() if place is not None),
            *((name, place) for name, _, place in (one.partition("=") for one in model or ())),
        ]
    )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from shortllm.demo.generate import Limits
    from shortllm.demo.models import embedded_models, open_models
    from shortllm.demo.page import serve
    from shortllm.model import Session

    session = Session(runtime)
    if not places:
        places = embedded_models(session)
        session.release()
    models = open_models(places, session)
    limits = Limits(new_tokens=max_tokens, batch=max_batch)
    _, address = serve(models, limits=limits, host=host, port=port, share=share)
    typer.echo(f"demo of {', '.join(places)}: {address}")
    typer.echo("Ctrl-C ends it", err=True)
    threading.Event().wait()
