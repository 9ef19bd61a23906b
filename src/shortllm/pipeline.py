"""A whole run in one directory: each stage writes its file, or skips it when it is up to date.

    run.json  calibration.*  scores.json  plan.json  pruned/  eval.json  zeroshot.csv  report.html

Everything a user can get wrong is checked before the first heavy step. A killed run goes on where
it was when the same command is given again; a changed recipe redoes the stages it touches.

    shortllm run MODEL --data stories.jsonl --remove 3
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shortllm import __version__, stages, targets
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.surgery import check_removal
from shortllm.errors import OutputError, ResultFileError
from shortllm.files import PARTIAL, require_writable, write_text
from shortllm.journal import journal_directory
from shortllm.planning import Budget, build_plan, check_budget, most_blocks, removable
from shortllm.recipe import Recipe
from shortllm.results import BlockScores, Evaluation, PrunePlan, ResultFile
from shortllm.runtime import ALONE, Ranks, versions
from shortllm.scoring import Asked
from shortllm.zeroshot import table_beside, write_table

if TYPE_CHECKING:
    from shortllm.calibration import Calibration
    from shortllm.zeroshot import TaskSet

log = logging.getLogger(__name__)

PRUNED = "pruned"

Kind = TypeVar("Kind", bound=ResultFile)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run made."""

    directory: Path
    plan: PrunePlan
    evaluation: Evaluation
    report: Path

    @property
    def checkpoint(self) -> Path:
        """The shortened checkpoint."""
        return self.directory / PRUNED


def run(
    recipe: Recipe | None = None, *, out: Path | str | None = None, command: list[str] | None = None
) -> RunResult:
    """From a model's name to a shortened checkpoint and a report.

    Args:
        recipe: every choice; the default shortens the embedded model by a quarter.
        out: run directory; default `runs/<model>-<criterion>-<budget>`.
        command: the command line, for run.json and the report.
    Raises:
        ShortLLMError: any of its kinds, before heavy work wherever that can be known.
    """
    from shortllm.reporting import write_report

    recipe = recipe or Recipe()
    needs_text = Asked.of(recipe.criterion, recipe.options).needs_text
    recipe.budget.asked()
    checkpoint = open_checkpoint(recipe.model, revision=recipe.revision)
    recipe = recipe.filled(checkpoint.model_type)
    if recipe.budget.target() is None:
        check_budget(recipe.budget, checkpoint.info())
    check_any_removal(checkpoint, recipe.budget)
    directory = Path(out) if out is not None else default_directory(recipe)
    claim_directory(directory, checkpoint)
    session = session_of(recipe)
    scoring = recipe.budget.blocks is None and needs_text
    tasks = stages.prepare_tasks([checkpoint], recipe.evaluation, session)
    texts = stages.prepare_texts(checkpoint, recipe.calibration, recipe.evaluation, scoring=scoring)
    budget, target = targets.resolve(recipe.budget, checkpoint, session, directory=directory)
    asked = asked_for(recipe.model_copy(update={"budget": budget}), checkpoint)

    write_run_file(directory, recipe.model_dump(mode="json"), checkpoint, command)
    targets.keep(target, directory)
    scores = None
    if recipe.budget.blocks is None:
        [scores] = score_in(directory, checkpoint, [asked], texts.calibration, session).values()
    else:
        delete_scores(directory)
    plan = build_plan(budget, model=checkpoint.info(), scores=scores)
    plan.save(directory / "plan.json")
    shortened = _prune(directory, checkpoint, plan, session)
    evaluation = _evaluate(directory, checkpoint, shortened, recipe, texts, tasks, session)
    report = write_report(directory)
    return RunResult(directory=directory, plan=plan, evaluation=evaluation, report=report)


def check_any_removal(checkpoint: Checkpoint, budget: Budget) -> None:
    """Run rules and guard on the removal asked for, or on a sample one, before anything is scored.

    Raises:
        UnsupportedModelError: blocks of this model type cannot be removed rightly.
    """
    count = checkpoint.block_count
    removed = budget.blocks
    if removed is None:
        removed = removable(budget, checkpoint.info())[0]
    check_removal(checkpoint, [block for block in range(count) if block not in set(removed)])


def default_directory(recipe: Recipe) -> Path:
    """`runs/<model>-<criterion>-<budget>`, e.g. `runs/stories10L-ppl-remove2`."""
    name = short_name(recipe.model)
    [(amount, value)] = recipe.budget.asked().items()
    periods = "-periods" if recipe.budget.period_aligned else ""
    if amount == "blocks":
        return Path("runs") / f"{name}-blocks{'-'.join(map(str, value))}"
    return Path("runs") / f"{name}-{recipe.criterion}-{amount}{value}{periods}"


def short_name(model: str) -> str:
    """The last part of a model's directory or Hub id."""
    return Path(model).resolve().name if Path(model).exists() else model.split("/")[-1]


def claim_directory(directory: Path, checkpoint: Checkpoint) -> None:
    """Check that `directory` is free, or holds an earlier run of the same model, and can be
    written.

    Raises:
        OutputError: it holds something else, cannot be written, or has too little space.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"--out {directory} is a file. Give a directory")
    held = [path for path in _listing(directory) if not path.name.endswith(PARTIAL)]
    if held:
        earlier = _run_model(directory)
        if earlier is None:
            raise OutputError(
                f"{directory} is not empty and holds no run of shortllm. Choose another --out"
            )
        has_results = any(
            path.name in ("plan.json", PRUNED) or path.match("scores*.json") for path in held
        )
        if has_results and earlier.get("fingerprint") != checkpoint.fingerprint:
            raise OutputError(
                f"{directory} holds a run of another model ({earlier.get('id')}). Choose another "
                "--out, or delete it"
            )
    require_writable(directory, checkpoint.bytes)


def _listing(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _run_model(directory: Path) -> dict[str, Any] | None:
    """The `model` entry of a directory's run.json; None if it has no readable one."""
    try:
        content = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        model = content["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return model if isinstance(model, dict) else None


def write_run_file(
    directory: Path,
    recipe: dict[str, Any],
    checkpoint: Checkpoint,
    command: list[str] | None = None,
) -> None:
    """run.json: what was asked for, filled in, and with which versions."""
    content = {
        "shortllm": __version__,
        "command": command or [],
        "model": checkpoint.info().model_dump(mode="json"),
        "recipe": recipe,
        "versions": versions(),
    }
    write_text(directory / "run.json", json.dumps(content, indent=1) + "\n")


def finished(kind: type[Kind], path: Path, expected: str) -> Kind | None:
    """An earlier result if it is whole and made from the same inputs; says that it is reused."""
    try:
        found = kind.load(path)
    except ResultFileError:
        return None
    if found.fingerprint != expected:
        return None
    log.info("%s is up to date, skipped", path)
    return found


def asked_for(recipe: Recipe, checkpoint: Checkpoint) -> Asked:
    """The criterion of a recipe; one that removes blocks itself gets the budget's amount.

    Raises:
        CriterionError: unknown criterion or option.
    """
    asked = Asked.of(recipe.criterion, recipe.options)
    if asked.inner() is None or recipe.budget.blocks is not None:
        return asked
    budget = recipe.budget
    amount = {
        "rounds": most_blocks(budget, checkpoint.info()),
        "protect_first": budget.protect_first,
        "protect_last": budget.protect_last,
    }
    return Asked.of(recipe.criterion, {**amount, **recipe.options})


def session_of(recipe: Recipe) -> stages.Session:
    """Where and how a recipe's models are run."""
    return stages.Session(
        device=recipe.device,
        dtype=recipe.dtype,
        stream=recipe.stream,
        max_memory=recipe.max_memory,
    )


def scores_file(directory: Path, asked: Sequence[Asked], one: Asked) -> Path:
    """scores.json for a single criterion; of several, one file each, named after it."""
    return directory / ("scores.json" if len(asked) == 1 else f"scores-{one.name}.json")


def score_in(
    directory: Path,
    checkpoint: Checkpoint,
    asked: Sequence[Asked],
    calibration: Calibration | None,
    session: stages.Session,
    ranks: Ranks = ALONE,
) -> dict[str, BlockScores]:
    """calibration.* and the file of each criterion's scores; those up to date are not made again.

    Of several processes all score and the main one writes.
    """
    if ranks.is_main:
        if calibration is None:
            _delete(directory.glob("calibration.*"))
        else:
            calibration.save(directory)
    found: dict[str, BlockScores] = {}
    for one in asked:
        expected = stages.scores_fingerprint(checkpoint, one, calibration, session)
        scores = finished(BlockScores, scores_file(directory, asked, one), expected)
        if scores is not None:
            found[one.name] = scores
    ranks.wait()  # until all have looked, nobody writes
    missing = [one for one in asked if one.name not in found]
    if missing:
        journal = journal_directory(directory)
        found |= stages.score(
            checkpoint, calibration, missing, session=session, directory=journal, ranks=ranks
        )
        if ranks.is_main:
            for one in missing:
                found[one.name].save(scores_file(directory, asked, one))
        ranks.wait()  # nobody deletes what it takes to go on before the scores are safe
        shutil.rmtree(journal, ignore_errors=True)
    return {one.name: found[one.name] for one in asked}


def delete_scores(directory: Path) -> None:
    """Delete the scores of an earlier recipe, where the blocks are now given by hand."""
    _delete([directory / "scores.json", *directory.glob("calibration.*")])


def _delete(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _prune(
    directory: Path, checkpoint: Checkpoint, plan: PrunePlan, session: stages.Session
) -> Checkpoint:
    target = directory / PRUNED
    if stages.is_pruned_by(target, stages.pruned_fingerprint(checkpoint, plan)):
        log.info("%s is up to date, skipped", target)
    else:
        stages.prune(checkpoint, plan, target, session=session)
    # named within the run, so that a run's files do not depend on where it lies
    return replace(open_checkpoint(target), id=PRUNED)


def _evaluate(
    directory: Path,
    checkpoint: Checkpoint,
    shortened: Checkpoint,
    recipe: Recipe,
    texts: stages.Texts,
    tasks: TaskSet | None,
    session: stages.Session,
) -> Evaluation:
    """eval.json, and zeroshot.csv where there are tasks."""
    path = directory / "eval.json"
    models = [("original", checkpoint), ("pruned", shortened)]
    options = recipe.evaluation
    expected = stages.evaluation_fingerprint(models, texts.evaluation, options, session, tasks)
    evaluation = finished(Evaluation, path, expected)
    if evaluation is None:
        evaluation = stages.evaluate(
            models, texts.evaluation, options, session=session, tasks=tasks
        )
        evaluation.save(path)
    if tasks is None:
        _delete([table_beside(path)])
    else:
        write_table(evaluation, table_beside(path))
    return evaluation
