"""The commands as functions, under the same names: `shortllm.score(...)`, `shortllm.prune(...)`,
...

Each opens what it is given by name, checks it, calls one stage and saves what it made. The command
line (cli/) is these functions with flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from shortllm import pipeline, stages
from shortllm import run_directory as rundir
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.criteria.selection import asked_criteria
from shortllm.data.options import CalibrationOptions
from shortllm.data.texts import calibrate
from shortllm.errors import CheckpointError, OutputError, ResultFileError
from shortllm.files import releasing, require_file_target, require_writable
from shortllm.model.session import Session
from shortllm.pipeline import RunResult
from shortllm.pruning import targets
from shortllm.pruning.budget import Budget
from shortllm.pruning.estimate import ModelSummary, summarize
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.recipe import Recipe
from shortllm.runtime import join_ranks


def info(
    model: str,
    *,
    revision: str | None = None,
    samples: int = 10,
    length: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    probe: bool = True,
) -> ModelSummary:
    """What a model is made of, what can go, and what scoring it takes.

    Args:
        samples: of the calibration that scoring is foretold for.
        length: tokens of each of them.
        options: for a criterion its options, e.g. `{"greedy": {"rounds": 8}}`.
        probe: measure the machine for two seconds, and read a few of the model's tensors; without,
            no times are foretold and only headers are read.
    Returns:
        Blocks, parameters, bytes, and an estimate for each kind of pass.
    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        CriterionError: an unknown criterion or option.
        ShortLLMError: a device that is not there.
    """
    return summarize(
        open_checkpoint(model, revision=revision),
        samples=samples,
        length=length,
        device=device,
        dtype=dtype,
        options=options or {},
        probe=probe,
    )


@overload
def score(model: str = ..., *, criterion: str = ..., **kwargs: Any) -> BlockScores: ...
@overload
def score(
    model: str = ..., *, criterion: Sequence[str], **kwargs: Any
) -> dict[str, BlockScores]: ...
def score(  # type: ignore[misc]
    model: str = "embedded",
    *,
    criterion: str | Sequence[str] = "ppl",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    calibration: CalibrationOptions | None = None,
    out: Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    max_memory: int | None = None,
    command: list[str] | None = None,
) -> BlockScores | dict[str, BlockScores]:
    """Importance of every block of a model by one criterion, or by several in as few passes as
    there can be.

    Under `accelerate launch` or `torchrun` the samples are shared by all processes, each of which
    gets the result; the main one writes it.

    Args:
        criterion: a name, or several.
        options: for each criterion its options, e.g. `{"taylor": {"power": 2}}`.
        out: run directory for the calibration and scores.json; of several criteria
            scores-NAME.json each. An interrupted pass goes on where it was.
        stream: read the blocks one at a time from the files; default: where they do not fit.
        max_memory: bytes of hidden streams in memory; beyond it they go to a file.
    Returns:
        The scores; of several criteria a dict by name.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    names = [criterion] if isinstance(criterion, str) else list(criterion)
    asked = asked_criteria(names, options or {})
    checkpoint = open_checkpoint(model, revision=rundir.pinned(model, revision, out))
    recipe = Recipe.model_validate(
        {
            "model": model,
            "revision": revision,
            "criterion": ",".join(names),
            "options": options or {},
            "calibration": calibration or CalibrationOptions(),
            "device": device,
            "dtype": dtype,
            "stream": stream,
            "max_memory": max_memory,
        }
    ).filled(checkpoint.model_type)
    ranks = join_ranks()
    if out is not None and ranks.is_main:
        rundir.claim_directory(out, checkpoint)
    session = pipeline.session_of(recipe)
    text = any(one.needs_text for one in asked)
    ids = calibrate(checkpoint, recipe.calibration) if text else None
    if out is None:
        found = stages.score(checkpoint, ids, asked, session=session, ranks=ranks)
    else:
        with releasing():
            if ranks.is_main:
                chosen = recipe.model_dump(mode="json", exclude={"budget", "evaluation"})
                rundir.write_run_file(out, chosen, checkpoint, command)
            found = pipeline.score_in(out, checkpoint, asked, ids, session, ranks)
    return found[names[0]] if isinstance(criterion, str) else found


def plan(
    scores: BlockScores | Path | str,
    budget: Budget,
    *,
    out: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> PrunePlan:
    """Choose blocks by scores.

    Args:
        scores: scores, a scores.json, or a run directory, which then gets plan.json too.
        out: where to save the plan; default plan.json beside the scores, if those are a file. How
            a target came to its number of blocks is saved beside it as target.json.
        device: for a target of speed, which is that of the model scored.
        dtype: for a target of speed or memory.
    Returns:
        What stays, what goes, in which order, and why.
    Raises:
        BudgetError: a budget that cannot be met.
        CheckpointError: a target, and the model scored is no longer there.
    """
    if not isinstance(scores, BlockScores):
        path = _scores_path(Path(scores))
        out = out or path.with_name("plan.json")
        scores = BlockScores.load(path)
    if out is not None:
        require_file_target(out)
    directory = None if out is None else out.parent
    target = None
    if budget.target() is not None:
        session = Session(device=device, dtype=dtype)
        checkpoint = _scored_checkpoint(scores)
        budget, target = targets.resolve(budget, checkpoint, session, directory=directory)
    made = build_plan(budget, model=scores.model, scores=scores)
    if out is not None and directory is not None:
        targets.keep(target, directory)
        made.save(out)
    return made


def _scored_checkpoint(scores: BlockScores) -> Checkpoint:
    """The model that scores speak of.

    Raises:
        CheckpointError: it is not there, or was changed since.
    """
    checkpoint = open_checkpoint(scores.model.id, revision=scores.model.revision)
    if checkpoint.fingerprint != scores.model.fingerprint:
        raise CheckpointError(
            f"{checkpoint.id} was changed since it was scored, so that a target for it cannot be "
            "turned into a number of blocks. Score it again with `shortllm score`"
        )
    return checkpoint


def _scores_path(path: Path) -> Path:
    """A file of scores, or the only one of a run directory.

    Raises:
        ResultFileError: the directory holds those of several criteria.
    """
    if not path.exists():
        raise ResultFileError(
            f"there are no scores in {path}. Score first: shortllm score MODEL --out {path}"
        )
    if not path.is_dir() or (path / "scores.json").exists():
        return path / "scores.json" if path.is_dir() else path
    several = sorted(path.glob("scores-*.json"))
    if several:
        raise ResultFileError(
            f"{path} holds scores by several criteria. Give one: {', '.join(map(str, several))}"
        )
    return path / "scores.json"


def prune(
    model: str,
    plan: PrunePlan | Path | str | Sequence[int],
    out: Path | str,
    *,
    revision: str | None = None,
    verify: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
) -> Path:
    """Write the shortened checkpoint.

    Args:
        plan: a plan, a plan.json, a run directory, or the numbers of the blocks to remove.
        out: the new checkpoint directory; must not exist, unless it is the same shortened
            checkpoint.
        verify: load original and result and compare what they compute; without, structure only.
    Returns:
        `out`.
    Raises:
        UnsupportedModelError: removing these blocks would give a wrong model.
        OutputError: `out` holds something else or cannot be written.
    """
    out = Path(out)
    if isinstance(plan, (str, Path)):
        plan = Path(plan)
        plan = PrunePlan.load(plan / "plan.json" if plan.is_dir() else plan)
    if isinstance(plan, PrunePlan) and revision is None and plan.model.id == model:
        revision = plan.model.revision  # the one that was planned for
    checkpoint = open_checkpoint(model, revision=revision)
    if not isinstance(plan, PrunePlan):
        plan = build_plan(Budget(blocks=list(plan)), model=checkpoint.info())
    stages.require_same_model(plan, checkpoint)
    if stages.is_pruned_by(out, stages.pruned_fingerprint(checkpoint, plan)):
        pipeline.log.info("%s is up to date, skipped", out)
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not empty. Choose another --out, or delete it")
    require_writable(out.parent)
    session = Session(device=device, dtype=dtype, stream=stream) if verify else None
    stages.prune(checkpoint, plan, out, session=session)
    return out


def report(run_dir: Path) -> Path:
    """Write the page of a run directory from its files: report.html and the model card, or
    comparison.html where it holds no plan but a comparison.

    Returns:
        The page.
    Raises:
        ResultFileError: a directory that holds no finished run, or files that do not fit together.
    """
    from shortllm.reporting import write_comparison, write_report

    run_dir = Path(run_dir)
    if (run_dir / "comparison.json").exists() and not (run_dir / "plan.json").exists():
        return write_comparison(run_dir)
    return write_report(run_dir)


def run(
    recipe: Recipe | None = None, *, out: Path | None = None, command: list[str] | None = None
) -> RunResult:
    """From a model's name to a shortened, and healed, checkpoint and a report, in one directory.

    What is there and up to date is not made again.

    Args:
        recipe: every choice; the default shortens the embedded model by a quarter.
        out: run directory; default `runs/<model>-<criterion>-<budget>`.
        command: the command line, for run.json and the report.
    Returns:
        Where it was done, and what was made (plan, checkpoints by name, evaluation, benchmark,
        page).
    Raises:
        ShortLLMError: any of its kinds, before heavy work wherever that can be known.
    """
    return pipeline.run(recipe, out=out, command=command)
