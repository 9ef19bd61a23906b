"""`quantize`: fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from shortllm.cli.options import (
    BosEverySample,
    CalibrationFile,
    Device,
    Json,
    Revision,
    Seed,
    TrustRemoteCode,
)
from shortllm.cli.output import print_json, print_table

if TYPE_CHECKING:
    from shortllm.quantizing.options import Quantization


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The shortened checkpoint, or any other.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")] = ...,  # type: ignore[assignment]
    method: Annotated[
        Literal["gptq", "int8"],
        typer.Option(help="4-bit weights that make up for each other's error; 8 bits, no text."),
    ] = "gptq",
    group_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Inputs that share a scale; 0: all of a row. Default: 128."),
    ] = None,
    act_order: Annotated[
        bool,
        typer.Option("--act-order", help="Quantize the columns of large activations first."),
    ] = False,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Calibration text: a .txt, .jsonl, .json or .parquet file, a Hub data set "
            "name[:config[:split]], or a built-in name. Default: c4."
        ),
    ] = None,
    calibration: CalibrationFile = None,
    sampler: Annotated[
        Literal["random", "packed"], typer.Option(help="How windows are cut from the text.")
    ] = "packed",
    samples: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Calibration samples. Default: 128."),
    ] = None,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Tokens per sample. Default: 2048, or the model's positions."),
    ] = None,
    seed: Seed = 1234,
    bos_every_sample: BosEverySample = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Quantize a checkpoint: 4-bit weights by GPTQ, or 8-bit weights and activations."""
    import shortllm

    made = shortllm.quantize(
        model,
        out,
        options=shortllm.QuantizeOptions(
            method=method,
            group_size=group_size,
            act_order=act_order,
            data=data,
            file=calibration,
            sampler=sampler,
            samples=samples,
            length=length,
            seed=seed,
            bos_every_sample=bos_every_sample,
        ),
        revision=revision,
        device=device,
    )
    if json:
        print_json(made.model_dump(mode="json"))
        return
    _print_quantization(made)
    typer.echo(f"checkpoint: {out}")


def _print_quantization(made: Quantization) -> None:
    before, after = made.bytes_before, made.bytes_after
    print_table(
        ("", "before", "after", "part"),
        [("bytes", f"{before:,}", f"{after:,}", f"{after / before:.1%}")],
    )
    text = made.calibration
    on = f", on {text.samples} samples of {text.length} tokens from {text.source}" if text else ""
    typer.echo(f"{made.described}: {made.layers} layers of {made.model.id}{on}")
