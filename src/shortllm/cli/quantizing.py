"""`quantize`: fewer bits per weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shortllm.cli.flags import flags
from shortllm.cli.options import Json, Out, Revision
from shortllm.cli.output import print_json, print_table
from shortllm.quantizing.options import QuantizeOptions
from shortllm.runtime import DeviceOptions

if TYPE_CHECKING:
    from shortllm.quantizing.options import Quantization


@flags(options=QuantizeOptions, runtime=DeviceOptions)
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The shortened checkpoint, or any other.")
    ],
    out: Out,
    options: QuantizeOptions,
    runtime: DeviceOptions,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Quantize the linear layers of a checkpoint.

    Plain transformers loads the result.

    Example: shortllm quantize short --method gptq --data c4 --out short-4bit
    """
    import shortllm

    record = shortllm.quantize(model, out, options=options, runtime=runtime, revision=revision)
    if json:
        print_json(record.model_dump(mode="json"))
        return
    _print_quantization(record)
    typer.echo(f"checkpoint: {out}")


def _print_quantization(record: Quantization) -> None:
    before, after = record.bytes_before, record.bytes_after
    print_table(
        ("", "before", "after", "part"),
        [("bytes", f"{before:,}", f"{after:,}", f"{after / before:.1%}")],
    )
    text = record.calibration
    on = f", on {text.samples} samples of {text.length} tokens from {text.source}" if text else ""
    typer.echo(f"{record.described}: {record.layers} layers of {record.model.id}{on}")
