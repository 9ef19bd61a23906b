"""`width`: remove heads and neurons, the baselines that depth pruning is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import (
    Json,
    ModelArgument,
    Out,
    Revision,
)
from shortllm.cli.output import print_json, print_table
from shortllm.runtime import Runtime
from shortllm.width_pruning.options import WidthOptions

if TYPE_CHECKING:
    from shortllm.width_pruning.options import WidthPruning


@flags(options=WidthOptions, runtime=Runtime)
def width(
    model: ModelArgument,
    out: Out,
    options: WidthOptions,
    runtime: Runtime,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Make a checkpoint narrower by removing attention heads and MLP neurons.

    All blocks stay. These are the baselines that depth pruning is compared with.

    Example: shortllm width MODEL --method flap --ratio 0.2 --data my_text.jsonl --out narrow
    """
    import shortllm

    record = shortllm.width(model, out, options=options, runtime=runtime, revision=revision)
    if json:
        print_json(record.model_dump(mode="json"))
        return
    _print_width(record)
    typer.echo(f"checkpoint: {out}")


def _print_width(record: WidthPruning) -> None:
    """A row per block: what is left of its heads and neurons."""
    rows = [
        (
            str(one.block),
            _left(one.query_heads, len(one.removed_query_heads)),
            _left(one.kv_heads, len(one.removed_kv_heads)),
            _left(one.neurons, len(one.removed_neurons)),
        )
        for one in record.blocks
    ]
    print_table(("block", "heads", "kv heads", "neurons"), rows)
    typer.echo(
        f"{record.model.id} by {record.method}: {record.model.parameters:,} -> "
        f"{record.reached.parameters:,} parameters (-{record.reached.removed_ratio:.1%}), shapes "
        f"{record.shapes}"
    )


def _left(before: int, removed: int) -> str:
    return f"{before} -> {before - removed}" if removed else str(before)
