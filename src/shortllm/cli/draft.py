"""`draft`: a shortened model that drafts for the intact one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from shortllm.checkpoint.options import SurgeryOptions
from shortllm.cli import early
from shortllm.cli.flags import CriterionOptions, Json, ModelArgument, Revision, flags
from shortllm.cli.output import answered, command_line, print_table
from shortllm.cli.run import RunFlags, requested_recipe
from shortllm.criteria import resolve
from shortllm.data.at_hand import require_at_hand
from shortllm.drafting.options import DraftOptions
from shortllm.errors import CriterionError, RecipeError
from shortllm.healing.methods import METHODS as HEALING
from shortllm.options import Flag
from shortllm.recipe import CRITERION_HELP, Recipe, settings_in
from shortllm.retraining.methods import METHODS as RETRAINING
from shortllm.run_directory import require_run_directory
from shortllm.runtime import Runtime


class DraftFlags(CriterionOptions):
    """Flags of `draft` that are not among its options, or stand for several of them."""

    out: Path | None = Field(default=None, description="Directory. Default: runs/<model>-draft.")
    criterion: Annotated[str, Flag(panel="Scoring")] = Field(
        default="acceptance", description=CRITERION_HELP
    )
    heal: Annotated[str | None, Flag(metavar="METHOD")] = Field(
        default=None,
        description=f"Heal the draft without training: {', '.join(HEALING.names())}. Default: not "
        "at all.",
    )
    retrain: Annotated[str | None, Flag(metavar="METHOD")] = Field(
        default=None,
        description=f"Train the draft as it was cut: {', '.join(RETRAINING.names())}. Default: not "
        "at all.",
    )
    settings: Annotated[list[str], Flag(name="--set", metavar="FIELD=VALUE", repeated=True)] = (
        Field(
            default_factory=list,
            description="Set an option of healing or training, e.g. retraining.max_steps=200; can "
            "be repeated.",
        )
    )


@flags("remove", "prompts", own=DraftFlags, drafting=DraftOptions, runtime=Runtime,
       surgery=SurgeryOptions)  # fmt: skip
def draft(
    own: DraftFlags,
    drafting: DraftOptions,
    runtime: Runtime,
    surgery: SurgeryOptions,
    model: ModelArgument = "embedded",
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Choose which blocks a draft can do without: it writes ahead, the intact model accepts.

    The intact model writes texts; what it accepts of shorter models and how long they take says
    which number of blocks and of drafted tokens is fastest. The best draft is measured and written.
    Run the same command again to resume.

    Example: shortllm draft Qwen/Qwen3-0.6B --retrain distill
    """
    import shortllm

    options = own.by_criterion()
    if other := options.keys() - {own.criterion}:
        raise CriterionError(
            f"--option names criterion '{other.pop()}', but --criterion is {own.criterion}"
        )
    criterion = resolve(own.criterion, options.get(own.criterion))
    early.check_items([criterion])
    for source in drafting.prompts:
        require_at_hand(source, role="calibration", option="--prompts")
    drafting = _with_stages(drafting, own)
    if own.out is not None:
        require_run_directory(own.out)
    from shortllm.drafting.prepare import default_directory

    directory = own.out or default_directory(model)
    found = shortllm.draft(
        model,
        drafting=drafting,
        runtime=runtime,
        surgery=surgery,
        criterion=own.criterion,
        options=options.get(own.criterion),
        out=directory,
        revision=revision,
        command=command_line(),
    )
    if answered(found, in_json=json):
        return
    from shortllm.reporting.draft_page import measured_table, size_table

    print_table(*size_table(found).plain())
    if found.recovered:
        typer.echo("")
        print_table(*measured_table(found).plain())
    typer.echo(found.verdict)
    typer.echo(f"draft: {directory / found.best.name}")
    typer.echo(f"page:  {directory / 'draft.html'}")


def _with_stages(drafting: DraftOptions, own: DraftFlags) -> DraftOptions:
    """The options with healing and training as they were typed."""
    for place in settings_in(own.settings):
        if place.partition(".")[0] not in ("healing", "retraining"):
            raise RecipeError(f"--set {place}: a draft has only healing.NAME and retraining.NAME")
    typed = RunFlags(heal=own.heal, retrain=own.retrain, settings=own.settings)
    stages = requested_recipe(Recipe(), typed, model="-", name=None)
    if len(stages.retraining) > 1:
        raise RecipeError(f"--retrain {own.retrain}: a draft is trained in one way. Name one")
    chosen = {
        **drafting.model_dump(exclude_unset=True),
        **({"healing": stages.healing} if stages.healing else {}),
        **({"retraining": stages.retraining[0]} if stages.retraining else {}),
    }
    return DraftOptions(**chosen)
