"""`push`: a checkpoint, its card and its results, to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shortllm.cli.flags import Json
from shortllm.cli.output import answered


def push(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="RUN|CHECKPOINT", help="A run directory, or one checkpoint."),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME, or NAME of yours.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    json: Json = False,
) -> None:
    """Send a checkpoint to the Hub, with its model card and the results of its run.

    Of a run the last checkpoint is sent: healed or retrained, if it was. Nothing that is sent names
    a directory of this machine.

    Example: shortllm push runs/qwen3 you/qwen3-short --private
    """
    import shortllm

    commit = shortllm.push_to_hub(checkpoint, repo, private=private or None)
    address = str(commit.repo_url)
    if not answered({"repository": address, "commit": commit.oid}, in_json=json):
        typer.echo(address)
