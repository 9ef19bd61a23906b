"""`drop-sublayers`: attentions and MLPs of single blocks."""

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
from shortllm.cli.output import print_json, print_table
from shortllm.cli.values import bytes_in, calibration_of, counts_in

if TYPE_CHECKING:
    from shortllm.sublayers.options import SublayerDrop


def drop_sublayers(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")] = ...,  # type: ignore[assignment]
    criterion: Annotated[
        Optional[Literal["sublayer-ppl", "sublayer-influence"]],  # noqa: UP045
        typer.Option(
            help="Perplexity without it, one after the other; or how much it turns the stream."
        ),
    ] = None,
    remove: Annotated[Optional[int], typer.Option(help="Sublayers to remove.")] = None,  # noqa: UP045
    parts: Annotated[
        Literal["joint", "attention", "mlp"],
        typer.Option(help="What a criterion may remove: both kinds in one list, or one kind."),
    ] = "joint",
    attention: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Exactly the attentions of these blocks, counted from 0, e.g. 3,4."),
    ] = None,
    mlp: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Exactly the MLPs of these blocks, e.g. 7."),
    ] = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
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
    """Remove attentions and MLPs of single blocks: a plain checkpoint, as large and slow as before.

    Output projections of what goes become zeros, which costs quality only. Time and space are saved
    where a block loses both and is removed.
    """
    import shortllm

    made = shortllm.drop_sublayers(
        model,
        out,
        options=shortllm.SublayerOptions(
            criterion=criterion,
            remove=remove,
            parts=parts,
            attention=counts_in(attention, "--attention"),
            mlp=counts_in(mlp, "--mlp"),
            protect_first=protect_first,
            protect_last=protect_last,
        ),
        calibration=calibration_of(
            data, calibration, sampler, samples, length, seed, bos_every_sample
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
    _print_drop(made)
    typer.echo(f"checkpoint: {out}")


def _print_drop(made: SublayerDrop) -> None:
    """What went, in order, and what that saves."""
    value = "perplexity without" if made.criterion == "sublayer-ppl" else "1 - cos"
    rows = [
        (f"{one.part} of {one.block}", "" if one.value is None else f"{one.value:.6g}")
        for one in made.dropped
    ]
    print_table(("goes", value if made.criterion else ""), rows)
    if made.intact is not None:
        typer.echo(f"intact: {made.intact:.6g}")
    removed = made.removed_blocks
    zeroed = len(made.dropped) - 2 * len(removed)
    if zeroed:
        typer.echo(
            f"{zeroed} of {len(made.dropped)} sublayers are zeros now ({made.zeroed_parameters:,} "
            "parameters): the checkpoint is plain, and they take the time and the space they took"
        )
    if removed:
        saved = made.model.parameters - made.parameters
        noun, verb = ("block", "is") if len(removed) == 1 else ("blocks", "are")
        typer.echo(
            f"{noun} {', '.join(map(str, removed))} lost both and {verb} removed: "
            f"{made.model.parameters:,} -> {made.parameters:,} parameters "
            f"(-{saved / made.model.parameters:.1%})"
        )
