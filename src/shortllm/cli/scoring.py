"""`info`, `score`, `compare-criteria`: what blocks matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from shortllm.cli.options import (
    BosEverySample,
    CalibrationFile,
    ComparedCriteria,
    CriterionNames,
    CriterionOption,
    Data,
    Device,
    Dtype,
    EvalBos,
    EvalLength,
    Json,
    Length,
    MaxMemory,
    ModelArgument,
    ProtectFirst,
    ProtectLast,
    Revision,
    SampleCount,
    Sampler,
    Seed,
    Stream,
    TrustRemoteCode,
)
from shortllm.cli.output import command_line, is_main_process, print_json, print_table
from shortllm.cli.values import bytes_in, calibration_of, names_in, options_in, ratios_in

if TYPE_CHECKING:
    from shortllm.comparison.options import Comparison
    from shortllm.criteria.records import Search
    from shortllm.pruning.estimate import ModelSummary
    from shortllm.pruning.records import BlockScores


def info(
    model: ModelArgument,
    revision: Revision = None,
    samples: SampleCount = 10,
    length: Length = 128,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
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
        options=options_in(option, criteria.names()),
        probe=probe,
    )
    if json:
        print_json(summary.model_dump(mode="json"))
    else:
        _print_summary(summary)


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
    trust_remote_code: TrustRemoteCode = False,
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

    names = names_in(criterion)
    found = shortllm.score(
        model,
        criterion=names,
        options=options_in(option, names),
        calibration=calibration_of(
            data, calibration, sampler, samples, length, seed, bos_every_sample
        ),
        out=out,
        revision=revision,
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=bytes_in(max_memory),
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
    trust_remote_code: TrustRemoteCode = False,
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
    from shortllm import criteria
    from shortllm.comparison.criteria import default_directory

    names = criteria.compared() if criterion is None else names_in(criterion)
    directory = out or default_directory(model)
    found = shortllm.compare_criteria(
        model,
        criterion=names,
        options=options_in(option, names),
        ratios=ratios_in(ratios),
        random=random,
        protect_first=protect_first,
        protect_last=protect_last,
        calibration=calibration_of(
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
        max_memory=bytes_in(max_memory),
        command=command_line(),
    )
    if not is_main_process():
        return
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        _print_comparison(found)
        typer.echo(f"report: {directory / 'comparison.html'}")


def _print_scores(scores: BlockScores) -> None:
    rank = {block: place for place, block in enumerate(_ascending(scores.importance), start=1)}
    rows = [
        (str(b), f"{scores.importance[b]:.6g}", f"{scores.values[b]:.6g}", str(rank[b]))
        for b in range(len(scores.importance))
    ]
    typer.echo(f"{scores.criterion}:")
    print_table(("block", "importance", "value", "rank (1 = goes first)"), rows)
    if scores.intact is not None:
        typer.echo(f"intact: {scores.intact:.6g}")
    if scores.search is not None:
        _print_search(scores.search)


def _print_search(search: Search) -> None:
    """A row per candidate, the one whose set goes marked."""
    found = search.found
    listed = [one.criterion for one in search.candidates]
    extra = [] if found.criterion in listed else [found]
    rows = [
        (
            f"{'* ' if one.criterion == found.criterion else ''}{one.criterion}",
            ",".join(map(str, one.removed)),
            *("-" if n is None else f"{n:.6g}" for n in (one.value, one.held_out)),
        )
        for one in (*search.candidates, *extra)
    ]
    print_table(("set by", "removes", f"{search.fitness}, searched", "ppl, held out"), rows)
    for left in search.left_out:
        typer.echo(f"left out: {left.criterion} ({left.reason})")


def _ascending(values: list[float]) -> list[int]:
    from shortllm.pruning.planning import removal_order

    return removal_order(values, protected=[])


def _print_comparison(comparison: Comparison) -> None:
    from shortllm.comparison.ranking import standings, verdict

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
    print_table(("without", *(f"{c.name} ({c.blocks}) " for c in columns)), rows)
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
            *(() if one.seconds is None else (_duration(one.seconds),)),
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


def _duration(seconds: float) -> str:
    """E.g. `12.3 s`, `5.2 min` or `3.1 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
