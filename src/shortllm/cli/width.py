"""`width`, `compare-units`: removing heads and neurons, beside removing blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from shortllm.cli.options import (
    BosEverySample,
    CalibrationFile,
    Data,
    Device,
    Dtype,
    Json,
    MaxMemory,
    ModelArgument,
    Revision,
    SampleCount,
    Sampler,
    Seed,
    Stream,
    TrustRemoteCode,
)
from shortllm.cli.output import print_json, print_table
from shortllm.cli.values import bytes_in, calibration_of

if TYPE_CHECKING:
    from shortllm.width_pruning.options import WidthPruning


def width(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")] = ...,  # type: ignore[assignment]
    method: Annotated[
        Literal["llm-pruner", "wanda-sp", "flap"],
        typer.Option(help="Weights times gradients; weights times inputs; how much inputs vary."),
    ] = "llm-pruner",
    ratio: Annotated[
        float,
        typer.Option(
            help="Part of the heads and neurons of each block that goes; for flap part of the "
            "parameters of all of them."
        ),
    ] = ...,  # type: ignore[assignment]
    neuron_ratio: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Part of the neurons, where that is not to be --ratio; not for flap."),
    ] = None,
    start: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="First block made narrower. Default: 4 for llm-pruner, else 0."),
    ] = None,
    end: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="The one behind the last. Default: all but 2 for llm-pruner, else all."),
    ] = None,
    importance: Annotated[
        Optional[Literal["first", "second", "mixed", "vectorised", "l1", "l2", "random"]],  # noqa: UP045
        typer.Option(help="Of llm-pruner. Default: first (order)."),
    ] = None,
    bias: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Of flap: keep the mean of what goes as a bias. Default: yes."),
    ] = None,
    shapes: Annotated[
        Literal["auto", "uniform", "per-block"],
        typer.Option(
            help="uniform: all blocks alike, a plain checkpoint; per-block: for shortllm.load; "
            "auto: plain where it can be."
        ),
    ] = "auto",
    data: Data = None,
    calibration: CalibrationFile = None,
    sampler: Sampler = "random",
    samples: SampleCount = 10,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Tokens per sample. Default: 64 for llm-pruner, else 128."),
    ] = None,
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
    """Make a checkpoint narrower: the baselines that depth pruning is compared with."""
    import shortllm
    from shortllm.width_pruning.options import SAMPLE_LENGTH

    made = shortllm.width(
        model,
        out,
        options=shortllm.WidthOptions(
            method=method,
            ratio=ratio,
            neuron_ratio=neuron_ratio,
            start=start,
            end=end,
            importance=importance,
            bias=bias,
            shapes=shapes,
            seed=seed,
        ),
        calibration=calibration_of(
            data,
            calibration,
            sampler,
            samples,
            length or SAMPLE_LENGTH.get(method, 128),
            seed,
            bos_every_sample,
        ),
        revision=revision,
        device=device,
        dtype=dtype,
        stream=stream,
        max_memory=bytes_in(max_memory),
    )
    if json:
        print_json(made.model_dump(mode="json"))
        return
    _print_width(made)
    typer.echo(f"checkpoint: {out}")


def _print_width(made: WidthPruning) -> None:
    """A row per block: what is left of its heads and neurons."""
    rows = [
        (
            str(one.block),
            _left(one.query_heads, len(one.removed_query_heads)),
            _left(one.kv_heads, len(one.removed_kv_heads)),
            _left(one.neurons, len(one.removed_neurons)),
        )
        for one in made.blocks
    ]
    print_table(("block", "heads", "kv heads", "neurons"), rows)
    typer.echo(
        f"{made.model.id} by {made.method}: {made.model.parameters:,} -> "
        f"{made.reached.parameters:,} parameters (-{made.reached.removed_ratio:.1%}), shapes "
        f"{made.shapes}"
    )


def _left(before: int, removed: int) -> str:
    return f"{before} -> {before - removed}" if removed else str(before)
