"""`info`, `score`, `plan`, `prune`: from block scores to a shorter checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import CriterionOption, Json, ModelArgument, Out, Revision
from shortllm.cli.output import (
    command_line,
    is_main_process,
    options_in,
    plan_line,
    print_json,
    print_table,
)
from shortllm.data.options import CalibrationOptions
from shortllm.errors import BudgetError
from shortllm.format import duration, plain
from shortllm.pruning.budget import Budget
from shortllm.recipe import CRITERION_HELP
from shortllm.runtime import DeviceOptions, Runtime

if TYPE_CHECKING:
    from shortllm.criteria.records import Search
    from shortllm.pruning.estimate import ModelSummary
    from shortllm.pruning.records import BlockScores


@flags(runtime=DeviceOptions)
def info(
    model: ModelArgument,
    runtime: DeviceOptions,
    revision: Revision = None,
    samples: Annotated[int, typer.Option(min=1, help="Estimate for this many samples.")] = 10,
    length: Annotated[int, typer.Option(min=2, help="Estimate for samples of this length.")] = 128,
    option: CriterionOption = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="Measure this machine for two seconds; otherwise times are not estimated.",
        ),
    ] = True,
    json: Json = False,
) -> None:
    """Show the blocks of a model, what removing them saves, and how long scoring takes.

    Example: shortllm info Qwen/Qwen3-0.6B
    """
    import shortllm

    summary = shortllm.info(
        model,
        revision=revision,
        samples=samples,
        length=length,
        options=options_in(option),
        probe=probe,
        runtime=runtime,
    )
    if json:
        print_json(summary.model_dump(mode="json"))
    else:
        _print_summary(summary)


@flags(calibration=CalibrationOptions, runtime=Runtime)
def score(
    calibration: CalibrationOptions,
    runtime: Runtime,
    out: Annotated[Path, typer.Option(help="Run directory for calibration and scores.json.")],
    model: ModelArgument = "embedded",
    criterion: Annotated[
        str, typer.Option(help=f"{CRITERION_HELP} Several: ppl,kl take as few passes as possible.")
    ] = "ppl",
    option: CriterionOption = None,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Score every block of a model by one or several criteria on calibration text.

    Under `accelerate launch -m shortllm score ...` or `torchrun -m shortllm score ...` all
    processes share the samples. Run the same command again to resume an interrupted pass.

    Example: shortllm score Qwen/Qwen3-0.6B --criterion ppl,kl --out runs/steps
    """
    import shortllm

    found = shortllm.score(
        model,
        criterion=[name.strip() for name in criterion.split(",") if name.strip()],
        options=options_in(option),
        calibration=calibration,
        runtime=runtime,
        out=out,
        revision=revision,
        command=command_line(),
    )
    if not is_main_process():
        return
    if json:
        one = [scores.model_dump(mode="json") for scores in found.values()]
        print_json(one[0] if len(one) == 1 else one)
        return
    for name, scores in found.items():
        _print_scores(scores)
        file = "scores.json" if len(found) == 1 else f"scores-{name}.json"
        typer.echo(f"scores: {out / file}")


@flags(budget=Budget, runtime=DeviceOptions)
def plan(
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES", help="A run directory, or a file of scores.")
    ],
    budget: Budget,
    runtime: DeviceOptions,
    out: Annotated[
        Path | None, typer.Option(help="The plan. Default: plan.json next to the scores.")
    ] = None,
    json: Json = False,
) -> None:
    """Choose the blocks to remove from scores and a budget.

    Example: shortllm plan runs/steps --ratio 0.25
    """
    import shortllm

    budget.asked()
    chosen = shortllm.plan(scores, budget=budget, runtime=runtime, out=out)
    if json:
        print_json(chosen.model_dump(mode="json"))
        return
    typer.echo(plan_line(chosen))
    typer.echo(chosen.reason)


@flags(runtime=Runtime)
def prune(
    model: ModelArgument,
    out: Out,
    runtime: Runtime,
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json, or the run directory that contains it.")
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="3,4,8", help="Remove exactly these blocks, counted from 0."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Load the original and the result and compare what they compute; needs memory for "
            "one of them."
        ),
    ] = True,
    revision: Revision = None,
) -> None:
    """Write the checkpoint without the blocks of a plan, or without named blocks.

    Example: shortllm prune Qwen/Qwen3-0.6B --blocks 12,13,17 --out qwen3-short
    """
    import shortllm

    if (plan is None) == (blocks is None):
        raise BudgetError("give either --plan plan.json or --blocks 3,4,8")
    chosen = plan if plan is not None else _block_numbers(blocks or "")
    written = shortllm.prune(model, chosen, out, revision=revision, verify=verify, runtime=runtime)
    typer.echo(f"checkpoint: {written}")


def _block_numbers(text: str) -> list[int]:
    """`3,4,8` as block numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BudgetError(
            f"--blocks '{text}' is not a list of block numbers such as 3,4,8"
        ) from error


def _print_scores(scores: BlockScores) -> None:
    rank = {block: place for place, block in enumerate(_ascending(scores.importance), start=1)}
    rows = [
        (str(b), f"{scores.importance[b]:.6g}", f"{scores.values[b]:.6g}", str(rank[b]))
        for b in range(len(scores.importance))
    ]
    typer.echo(f"{scores.criterion}:")
    print_table(("block", "importance", "value", "rank (1 = removed first)"), rows)
    if scores.intact is not None:
        typer.echo(f"intact: {scores.intact:.6g}")
    if scores.search is not None:
        _print_search(scores.search)


def _print_search(search: Search) -> None:
    """A row per candidate set, and those left out."""
    from shortllm.reporting.run_page import search_table

    print_table(*search_table(search).plain())
    for left in search.left_out:
        typer.echo(f"left out: {left.criterion} ({left.reason})")


def _ascending(values: list[float]) -> list[int]:
    from shortllm.pruning.planning import removal_order

    return removal_order(values, protected=[])


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
    print_table(("part", "parameters", "bytes", "share", ""), parts)
    typer.echo("\nremoving on average saves")
    most = model.blocks - len(protected)
    counts = sorted({1, *(max(1, round(model.blocks * r)) for r in (0.1, 0.2, 0.3, 0.4, 0.5))})
    saved = [
        (f"{k} of {model.blocks}", f"{summary.saved_by(k)[0]:.1%}", f"{summary.saved_by(k)[1]:.1%}")
        for k in counts
        if k <= most
    ]
    print_table(("blocks", "parameters", "bytes"), saved)
    _print_estimates(summary)


def _print_estimates(summary: ModelSummary) -> None:
    typer.echo(
        f"\nscoring on {summary.samples} x {summary.length} tokens in {summary.dtype} on "
        f"{summary.device} (estimated)"
    )
    rows = [
        (
            ", ".join(one.criteria),
            "streamed" if one.streamed else "in memory",
            f"{one.flops / 1e12:.3g}",
            f"{one.peak_bytes / 2**30:.2f}",
            *(() if one.seconds is None else (plain(duration(one.seconds)),)),
        )
        for one in summary.estimates
    ]
    time = () if summary.probe is None else ("time",)
    print_table(("criteria", "blocks", "TFLOP", "peak GiB", *time), rows)
    if summary.probe is not None:
        typer.echo(
            f"measured: {summary.probe.matrix_flops_per_s / 1e9:.0f} GFLOP/s in matrix products, "
            f"{summary.probe.read_bytes_per_s / 1e6:.0f} MB/s read from the model's files"
        )
    mode = "read one at a time (streamed)" if summary.streamed else "all in memory"
    typer.echo(f"without --stream or --no-stream, blocks are {mode}: {summary.why}")
