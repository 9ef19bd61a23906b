"""`drop-sublayers`: attentions and MLPs of single blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import Json, ModelArgument, Out, Revision
from shortllm.cli.output import print_json, print_table
from shortllm.runtime import Runtime
from shortllm.sublayers.criteria import CRITERIA
from shortllm.sublayers.options import SublayerOptions

if TYPE_CHECKING:
    from shortllm.sublayers.options import SublayerDrop


@flags(options=SublayerOptions, runtime=Runtime)
def drop_sublayers(
    model: ModelArgument,
    out: Out,
    options: SublayerOptions,
    runtime: Runtime,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Remove attentions and MLPs of single blocks; the checkpoint keeps its size and speed.

    The output projections of removed sublayers become zeros, so only quality changes. Blocks that
    lose both sublayers are removed, which saves time and memory.

    Example: shortllm drop-sublayers MODEL --criterion sublayer-ppl --remove 4 --out without
    """
    import shortllm

    record = shortllm.drop_sublayers(
        model, out, options=options, runtime=runtime, revision=revision
    )
    if json:
        print_json(record.model_dump(mode="json"))
        return
    _print_drop(record)
    typer.echo(f"checkpoint: {out}")


def _print_drop(record: SublayerDrop) -> None:
    """What was removed, in order, and what that saves."""
    value = CRITERIA.get(record.criterion).value if record.criterion else ""
    rows = [
        (f"{one.part} of {one.block}", "" if one.value is None else f"{one.value:.6g}")
        for one in record.dropped
    ]
    print_table(("removed", value), rows)
    if record.intact is not None:
        typer.echo(f"intact: {record.intact:.6g}")
    removed = record.removed_blocks
    zeroed = len(record.dropped) - 2 * len(removed)
    if zeroed:
        typer.echo(
            f"{zeroed} of {len(record.dropped)} sublayers are zeros now "
            f"({record.zeroed_parameters:,} parameters). They still take memory and time"
        )
    if removed:
        saved = record.model.parameters - record.parameters
        noun, verb = ("block", "was") if len(removed) == 1 else ("blocks", "were")
        typer.echo(
            f"{noun} {', '.join(map(str, removed))} lost both sublayers and {verb} removed: "
            f"{record.model.parameters:,} -> {record.parameters:,} parameters "
            f"(-{saved / record.model.parameters:.1%})"
        )
