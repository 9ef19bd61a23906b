"""Parameters that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, Hub id, or 'embedded'.")
]
Out = Annotated[Path, typer.Option(help="Directory of the new checkpoint.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model, as in MODEL@REVISION.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")]
CriterionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="CRITERION.NAME=VALUE",
        rich_help_panel="Scoring",
        help="Option of a criterion, e.g. taylor.power=2 or greedy.inner=kl; can be repeated.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        rich_help_panel="Recipe",
        help="Set any field of a recipe, e.g. retraining.max_steps=200 or benchmark.batches=[1,8]; "
        "can be repeated.",
    ),
]
