"""`export`, `cache list` and `cache clear`: checkpoints as GGUF files, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortllm.checkpoint.gguf import OutType
from shortllm.cli.flags import Json, Revision, flags
from shortllm.cli.output import answered
from shortllm.format import in_bytes
from shortllm.runtime import Trust


@flags(trust=Trust)
def export(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a Hub id.")],
    trust: Trust,
    gguf: Annotated[Path, typer.Option(metavar="NAME.gguf", help="The file to write.")],
    outtype: Annotated[
        OutType, typer.Option(help="Type of the matrices. auto: that of most of the checkpoint.")
    ] = "auto",
    revision: Revision = None,
) -> None:
    """Convert a checkpoint to a GGUF file, with the converter of the llama.cpp project.

    Refused where llama.cpp would run the file incorrectly (see `export-lint`).

    Example: shortllm export qwen3-short --gguf qwen3-short.gguf
    """
    import shortllm

    written = shortllm.export(model, gguf, outtype=outtype, revision=revision, trust=trust)
    typer.echo(f"file: {written}")


cache = typer.Typer(
    help="List or delete the models that were dequantized from GGUF files.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@cache.command(name="list")
def list_cached(json: Json = False) -> None:
    """List the models of the cache: the GGUF file, its size here, and the directory."""
    from shortllm.checkpoint.gguf import cache_directory, cached_models

    models = cached_models()
    if answered(models, in_json=json):
        return
    for model in models:
        typer.echo(f"{model.file}  {in_bytes(model.bytes)}  {model.directory}")
    if not models:
        typer.echo(f"no models in {cache_directory()}")


@cache.command()
def clear() -> None:
    """Delete all models of the cache; they are made again when they are needed."""
    from shortllm.checkpoint.gguf import clear_cache

    typer.echo(f"{in_bytes(clear_cache())} freed")
