"""`heal` and `merge`: healing without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import (
    BosEverySample,
    CalibrationFile,
    Data,
    Device,
    Dtype,
    Json,
    MaxMemory,
    ModelArgument,
    Out,
    Revision,
    Stream,
    TrustRemoteCode,
)
from shortllm.cli.output import print_json, print_table
from shortllm.cli.values import bytes_in
from shortllm.merging.options import MergeOptions
from shortllm.runtime import Runtime

if TYPE_CHECKING:
    from shortllm.healing.options import Healing
    from shortllm.merging.options import Merging


def heal(
    model: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint as `shortllm prune` wrote it."),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")] = ...,  # type: ignore[assignment]
    method: Annotated[
        Literal["linear"],
        typer.Option(help="A least-squares map folded into the block before each gap."),
    ] = "linear",
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What it was shortened from. Default: as its config.json says."),
    ] = None,
    ridge: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="How strongly maps are held to do nothing. Default: for each gap what does best "
            "on held-out samples."
        ),
    ] = None,
    weighting: Annotated[
        Literal["norm", "none"],
        typer.Option(
            help="norm: the error of each token in parts of its stream's size; none: all alike, as "
            "published."
        ),
    ] = "norm",
    data: Data = None,
    calibration: CalibrationFile = None,
    samples: Annotated[
        int, typer.Option(min=2, help="Calibration samples; a quarter of them is held out.")
    ] = 64,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Tokens per sample. Default: 256, or all positions."),
    ] = None,
    bos_every_sample: BosEverySample = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Heal a shortened checkpoint without training: what the gaps took is folded into weights."""
    import shortllm
    from shortllm.errors import ShortLLMError

    if ridge is not None and not ridge > 0:
        raise ShortLLMError(f"--ridge {ridge} is not above 0. Give e.g. 0.01")
    made = shortllm.heal(
        model,
        out,
        options=shortllm.HealOptions(
            method=method, ridge=ridge, weighting=weighting, samples=samples, length=length
        ),
        source=source,
        data=data,
        calibration=calibration,
        bos_every_sample=bos_every_sample,
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=bytes_in(max_memory),
    )
    if json:
        print_json(made.model_dump(mode="json"))
        return
    _print_healing(made)
    typer.echo(f"checkpoint: {out}")


def _print_healing(made: Healing) -> None:
    """A row per gap, and the loss on held-out samples."""
    rows = [
        (
            ", ".join(map(str, gap.removed)),
            "-" if gap.block is None else str(gap.block),
            "none is before it" if gap.block is None else gap.projection or "",
            "left as it was" if gap.ridge is None else f"{gap.ridge:g}",
            _number(gap.error_before),
            _number(gap.error_after),
        )
        for gap in made.gaps
    ]
    print_table(("removed", "into block", "projection", "ridge", "error", "healed"), rows)
    held_out = made.held_out
    typer.echo(
        f"loss on {held_out.samples} held-out samples of {made.data}: {held_out.source:.4f} before "
        f"the removal, {held_out.shortened:.4f} after, {held_out.healed:.4f} healed"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@flags(options=MergeOptions, runtime=Runtime)
def merge(
    model: ModelArgument,
    out: Out,
    options: MergeOptions,
    runtime: Runtime,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Shorten a model by folding blocks into one another (LaCo), from the top down.

    A baseline to compare removal with.

    Example: shortllm merge MODEL --data my_text.jsonl --threshold 0.65 --out merged
    """
    import shortllm

    record = shortllm.merge(model, out, options=options, runtime=runtime, revision=revision)
    if json:
        print_json(record.model_dump(mode="json"))
        return
    _print_merging(record)
    typer.echo(f"checkpoint: {out}")


def _print_merging(record: Merging) -> None:
    """A row per try, then the cosine next to the perplexities."""
    rows = [
        (
            str(one.block),
            ", ".join(map(str, one.merged)),
            f"{one.cosine:.4f}",
            "kept" if one.kept else "",
        )
        for one in record.tries
    ]
    print_table(("block", "merged into it", "cosine", ""), rows)
    typer.echo(
        f"{record.model.id}: {record.model.blocks} -> {len(record.kept)} blocks, mean cosine of "
        f"the final hidden states {record.cosine:.4f}"
    )
    typer.echo(
        f"perplexity on the calibration text: {record.intact_perplexity:.4f} -> "
        f"{record.perplexity:.4f}"
    )
