"""`heal` and `merge`: healing without training, and merging as a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import Json, ModelArgument, Out, Revision
from shortllm.cli.output import print_json, print_table
from shortllm.format import number
from shortllm.healing.options import HealOptions
from shortllm.merging.options import MergeOptions
from shortllm.runtime import Runtime

if TYPE_CHECKING:
    from shortllm.healing.options import Healing
    from shortllm.merging.options import Merging


@flags(options=HealOptions, runtime=Runtime)
def heal(
    model: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint that `shortllm prune` wrote."),
    ],
    out: Out,
    options: HealOptions,
    runtime: Runtime,
    source: Annotated[
        str | None,
        typer.Option(help="Model it was shortened from. Default: as its config.json says."),
    ] = None,
    json: Json = False,
) -> None:
    """Heal a shortened checkpoint without training: existing weights get new values.

    The result is a plain checkpoint of the same size and speed.

    Example: shortllm heal short --data my_text.jsonl --out healed
    """
    import shortllm

    record = shortllm.heal(model, out, options=options, runtime=runtime, source=source)
    if json:
        print_json(record.model_dump(mode="json"))
        return
    _print_healing(record)
    typer.echo(f"checkpoint: {out}")


def _print_healing(record: Healing) -> None:
    """A row per gap, then the loss on held-out samples."""
    rows = [
        (
            ", ".join(map(str, gap.removed)),
            "-" if gap.block is None else str(gap.block),
            "no block before it" if gap.block is None else gap.projection or "",
            "unchanged" if gap.ridge is None else f"{gap.ridge:g}",
            number(gap.error_before),
            number(gap.error_after),
        )
        for gap in record.gaps
    ]
    print_table(("removed", "into block", "projection", "ridge", "error", "healed"), rows)
    held_out = record.held_out
    typer.echo(
        f"loss on {held_out.samples} held-out samples of {record.data}: {held_out.source:.4f} "
        f"before the removal, {held_out.shortened:.4f} after, {held_out.healed:.4f} healed"
    )


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
