"""`width` and `compare-units`: removing heads and neurons, compared with removing blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from shortllm.cli.asked import recipe_of
from shortllm.cli.flags import flags
from shortllm.cli.options import (
    Data,
    Device,
    Dtype,
    EvalData,
    Json,
    Length,
    Limit,
    MaxSegments,
    ModelArgument,
    Out,
    Places,
    Ratio,
    RecipeName,
    Remove,
    RetrainMethods,
    Revision,
    SampleCount,
    TaskData,
    Tasks,
    TrustRemoteCode,
)
from shortllm.cli.output import command_line, print_json, print_table
from shortllm.cli.values import counts_in, names_in
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


def compare_units(
    ctx: typer.Context,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Checkpoint directory or Hub id. Default: embedded."),
    ] = None,
    recipe: RecipeName = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Run directory. Default: runs/<model>-units."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Criteria of depth, the first sets the number of parameters, and width."),
    ] = "ppl,taylor,llm-pruner,wanda-sp,flap",
    remove: Remove = None,
    ratio: Ratio = None,
    data: Data = None,
    samples: SampleCount = 10,
    length: Length = 128,
    eval_data: EvalData = None,
    max_segments: MaxSegments = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    retrain: RetrainMethods = None,
    batch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Batch sizes that speed is measured at. Default: 1,4,16,64, or recipe."),
    ] = None,
    places: Places = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Width against depth: the same number of parameters removed by each method, then measured.

    The same command again skips what is up to date.
    """
    import shortllm
    from shortllm.recipes import changed

    asked = recipe_of(ctx, model, recipe, retrain, places or [])
    held = asked.benchmark is not None and "batches" in asked.benchmark.model_fields_set
    if batch is not None or not held:
        sizes = counts_in(batch or "1,4,16,64", "--batch")
        asked = changed(asked, {"benchmark.batches": sizes}, "command line")
    found = shortllm.compare_units(
        asked, methods=names_in(methods), out=out, command=command_line()
    )
    if json:
        print_json(found.model_dump(mode="json"))
        return
    from shortllm.comparison.width_vs_depth import default_directory
    from shortllm.reporting.loading import load_units
    from shortllm.reporting.units import terminal_table

    directory = out or default_directory(asked.model)
    print_table(*terminal_table(load_units(directory)))
    typer.echo(f"page: {directory / 'units.html'}")
