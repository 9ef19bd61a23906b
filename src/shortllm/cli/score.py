"""`info`, `score`, `plan`, `prune`: from block scores to a shorter checkpoint."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shortllm.checkpoint.hub import is_gguf
from shortllm.checkpoint.options import ACCEPT, SurgeryOptions
from shortllm.checkpoint.tensors import weight_files
from shortllm.cli import early
from shortllm.cli.flags import CriterionOptions, Json, ModelArgument, Revision, flags, list_of
from shortllm.cli.output import answered, command_line, print_notes, print_table
from shortllm.criteria import names_in, resolve_all
from shortllm.data.options import CalibrationOptions
from shortllm.errors import BudgetError
from shortllm.format import counted, duration, plain, what_is_left
from shortllm.pruning.budget import Budget
from shortllm.pruning.records import Pruning
from shortllm.recipe import CRITERION_HELP
from shortllm.runtime import DeviceOptions, Runtime, ScoringRuntime

if TYPE_CHECKING:
    from shortllm.pruning.estimate import ModelSummary
    from shortllm.pruning.records import BlockScores


@flags(criteria=CriterionOptions, runtime=DeviceOptions)
def info(
    model: ModelArgument,
    criteria: CriterionOptions,
    runtime: DeviceOptions,
    revision: Revision = None,
    samples: Annotated[int, typer.Option(min=1, help="Estimate for this many samples.")] = 10,
    length: Annotated[int, typer.Option(min=2, help="Estimate for samples of this length.")] = 128,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe",
            help="Measure this machine for three seconds; otherwise times are not estimated.",
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
        options=criteria.by_criterion(),
        probe=probe,
        runtime=runtime,
    )
    if not answered(summary, in_json=json):
        _print_summary(summary)


@flags(criteria=CriterionOptions, calibration=CalibrationOptions, runtime=ScoringRuntime)
def score(
    criteria: CriterionOptions,
    calibration: CalibrationOptions,
    runtime: ScoringRuntime,
    out: Annotated[Path, typer.Option(help="Run directory for calibration and scores.json.")],
    model: ModelArgument = "embedded",
    criterion: Annotated[
        str, typer.Option(help=f"{CRITERION_HELP} Several: ppl,kl take as few passes as possible.")
    ] = "ppl",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Score every block of a model by one or several criteria on calibration text.

    Under `accelerate launch -m shortllm score ...` or `torchrun -m shortllm score ...` all
    processes share the samples. Run the same command again to resume an interrupted pass.

    Example: shortllm score Qwen/Qwen3-0.6B --criterion ppl,kl --out runs/steps
    """
    import shortllm

    names, given = names_in(criterion), criteria.by_criterion()
    early.check_scoring(model, resolve_all(names, given), calibration, out)
    found = shortllm.score(
        model,
        criterion=names,
        options=given,
        calibration=calibration,
        runtime=runtime,
        out=out,
        revision=revision,
        command=command_line(),
    )
    records = list(found.values())
    if answered(records[0] if len(records) == 1 else records, in_json=json):
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
    eval_data: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text for --max-ppl-increase. Default: that of the run."),
    ] = None,
    json: Json = False,
) -> None:
    """Choose the blocks to remove from scores and a budget.

    With --max-ppl-increase, the most blocks that it allows without healing or retraining; `run`
    finds the most with them.

    Example: shortllm plan runs/steps --ratio 0.25
    """
    import shortllm

    budget.asked()
    early.check_scores(scores)
    chosen = shortllm.plan(scores, budget=budget, runtime=runtime, out=out, eval_data=eval_data)
    if not answered(chosen, in_json=json):
        typer.echo(f"{chosen}\n{chosen.reason}")


@flags(runtime=Runtime, surgery=SurgeryOptions)
def prune(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the new checkpoint. Or NAME.gguf: remove the blocks from a GGUF "
            "file itself, whose weights stay as they are; nothing is computed with it."
        ),
    ],
    runtime: Runtime,
    surgery: SurgeryOptions,
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json, or the run directory that contains it.")
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="3,4,8-10", help="Remove exactly these blocks, counted from 0."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Load the original and the result and compare what they compute; needs memory for "
            "one of them."
        ),
    ] = True,
    drop_heads: Annotated[
        bool,
        typer.Option(
            "--drop-heads",
            help="Leave out prediction heads (MTP), and what config.json says of them. Otherwise "
            "they stay as they are.",
        ),
    ] = False,
    revision: Revision = None,
) -> None:
    """Write the checkpoint without the blocks of a plan, or without named blocks.

    Example: shortllm prune Qwen/Qwen3-0.6B --blocks 12,13,17 --out qwen3-short

    Example: shortllm prune model.gguf --blocks 12,13,17 --out short.gguf
    """
    import shortllm

    numbers = None if blocks is None else _block_numbers(blocks)
    early.check_pruning(plan, numbers, out)
    written = shortllm.prune(
        model,
        plan,
        out,
        blocks=numbers,
        revision=revision,
        verify=verify,
        drop_heads=drop_heads,
        runtime=runtime,
        surgery=surgery,
    )
    if not is_gguf(out):
        _print_pruning(Pruning.load(written / Pruning.FILE), written, verified=verify)
    typer.echo(f"{'file' if is_gguf(out) else 'checkpoint'}: {written}")


def _print_pruning(record: Pruning, written: Path, *, verified: bool) -> None:
    size = sum((written / name).stat().st_size for name in weight_files(written))
    model = record.model
    typer.echo(what_is_left(model.id, model.blocks, record.removed, model.bytes, size))
    if verified:
        typer.echo(
            "verified: loaded again, it computes what the original does without these blocks"
        )
    else:
        typer.echo("not verified: names and structure were checked, nothing was computed")
    print_notes(record)


def _block_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in list_of(text)]
    except ValueError as error:
        raise BudgetError(
            f"--blocks '{text}' is not a list of block numbers such as 3,4,8 or 4-6"
        ) from error


def _print_scores(scores: BlockScores) -> None:
    from shortllm.reporting.run_page import search_table

    columns = {"importance": scores.importance}
    if scores.stderr is not None:
        columns["± standard error"] = scores.stderr
    if scores.values != scores.importance:
        columns["value"] = scores.values
    if scores.delta_nll is not None and scores.delta_stderr is not None:
        columns |= {"Δ NLL": scores.delta_nll, "± paired": scores.delta_stderr}
    rows = [
        (
            str(b),
            *(f"{one[b]:.{2 if '±' in name else 6}g}" for name, one in columns.items()),
            str(rank),
        )
        for b, rank in sorted(scores.ranks.items())
    ]
    typer.echo(f"{scores.criterion}:")
    print_table(("block", *columns, "rank (1 = removed first)"), rows)
    if scores.intact is not None:
        typer.echo(f"intact: {scores.intact:.6g}")
    if scores.search is not None:
        print_table(*search_table(scores.search).plain())
        for left in scores.search.left_out:
            typer.echo(f"left out: {left.criterion} ({left.reason})")


def _print_summary(summary: ModelSummary) -> None:
    model = summary.model
    protected = set(summary.protected)
    typer.echo(f"{model.id}: {model.model_type}, {counted(model.blocks, 'block')}")
    if model.gguf is not None:
        typer.echo(f"dequantized from {model.gguf}")
    if (heads := summary.prediction_heads) is not None:
        typer.echo(
            f"with a prediction head, MTP ({heads}, {heads.parameters:,} parameters); "
            f"config.json names it in {', '.join(heads.fields) or 'no field'}"
        )
    if (experts := summary.experts) is not None:
        active = "" if experts.active is None else f", {experts.active} of them for each token"
        shared = f", and {experts.shared} shared" if experts.shared else ""
        where = (
            "every block"
            if experts.blocks == model.blocks
            else f"each of {counted(experts.blocks, 'block')}"
        )
        typer.echo(f"experts: {experts.total} in {where}{active}{shared}")
    if summary.quantize_refuses is not None:
        typer.echo(f"quantize would refuse it: {summary.quantize_refuses}")
    inside = zip(model.parameters_per_block, summary.bytes_per_block, strict=True)
    blocks = [
        (parameters, size, "protected" if b in protected else "")
        for b, (parameters, size) in enumerate(inside)
    ]
    parts = []
    for (parameters, size, note), equal in groupby(range(model.blocks), key=blocks.__getitem__):
        first, *others = equal
        name = f"blocks {first}-{others[-1]}, each" if others else f"block {first}"
        parts.append((name, parameters, size, note))
    parts += [
        ("outside", summary.parameters_outside, model.bytes - sum(summary.bytes_per_block), ""),
        ("all", model.parameters, model.bytes, ""),
    ]
    print_table(
        ("part", "parameters", "bytes", "share", ""),
        [
            (part, f"{parameters:,}", f"{size:,}", f"{parameters / model.parameters:.2%}", note)
            for part, parameters, size, note in parts
        ],
    )
    if summary.companions:
        typer.echo("\nfiles and fields that refer to blocks")
        print_table(
            ("file", "field", "kind", "value", "when blocks are removed"),
            [
                (one.file, one.field, one.kind, one.value, one.rule or f"no rule: see {ACCEPT}")
                for one in summary.companions
            ],
            words=True,
        )
    typer.echo("\nremoving on average saves")
    most = model.blocks - len(protected)
    counts = sorted({1, *(max(1, round(model.blocks * r)) for r in (0.1, 0.2, 0.3, 0.4, 0.5))})
    saved = [
        (f"{k} of {model.blocks}", *(f"{ratio:.1%}" for ratio in summary.saved_by(k)))
        for k in counts
        if k <= most
    ]
    print_table(("blocks", "parameters", "bytes"), saved)
    typer.echo("")
    for line in summary.advice:
        typer.echo(f"note: {line}")
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
            f"measured: {summary.probe.block_flops_per_s / 1e9:.0f} GFLOP/s in blocks, "
            f"{summary.probe.head_flops_per_s / 1e9:.0f} in the head, "
            f"{summary.probe.read_bytes_per_s / 1e6:.0f} MB/s read from the model's files\n"
        )
        rows = [(one.stage, one.of, plain(duration(one.seconds))) for one in summary.stages]
        print_table(("stage, one model", "of", "time (estimated)"), rows)
    mode = "read one at a time (streamed)" if summary.streamed else "all in memory"
    typer.echo(f"without --stream or --no-stream, blocks are {mode}: {summary.why}")
