"""Choose the blocks to remove: scores and a budget make a plan.

shortllm plan runs/steps --ratio 0.25
"""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import CheckpointError, ResultFileError
from shortllm.files import require_file_target
from shortllm.model.session import Session
from shortllm.options import accepts
from shortllm.pruning import targets
from shortllm.pruning.budget import Budget
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import BlockScores, PrunePlan
from shortllm.runtime import DeviceOptions


@accepts(budget=Budget, runtime=DeviceOptions)
def plan(
    scores: BlockScores | Path | str,
    *,
    budget: Budget,
    runtime: DeviceOptions,
    out: Path | str | None = None,
) -> PrunePlan:
    """Choose blocks by their scores.

    Args:
        scores: scores, a scores.json, or a run directory, which then also gets plan.json.
        budget: how much to remove; its fields can be given as keywords, e.g. `remove=6`.
        runtime: for a target of speed or memory; its fields can be given as keywords.
        out: where to save the plan. Default: plan.json next to the scores, if those are a file.
            How a target became a number of blocks is saved next to it as target.json.
    Returns:
        The blocks to keep and to remove, in which order, and why.
    Raises:
        BudgetError: a budget that cannot be met.
        CheckpointError: a target, and the model that was scored is no longer there.
    """
    path = None if out is None else Path(out)
    if not isinstance(scores, BlockScores):
        file = _scores_path(Path(scores))
        path = path or file.with_name("plan.json")
        scores = BlockScores.load(file)
    if path is not None:
        require_file_target(path)
    directory = None if path is None else path.parent
    target = None
    if budget.target() is not None:
        checkpoint = _scored_checkpoint(scores)
        budget, target = targets.resolve(budget, checkpoint, Session(runtime), directory=directory)
    chosen = build_plan(budget, model=scores.model, scores=scores)
    if path is not None and directory is not None:
        targets.keep(target, directory)
        chosen.save(path)
    return chosen


def _scored_checkpoint(scores: BlockScores) -> Checkpoint:
    """The model that was scored."""
    checkpoint = open_checkpoint(scores.model.id, revision=scores.model.revision)
    if checkpoint.fingerprint != scores.model.fingerprint:
        raise CheckpointError(
            f"{checkpoint.id} was changed after it was scored, so a target for it cannot be turned "
            "into a number of blocks. Score it again with `shortllm score`"
        )
    return checkpoint


def _scores_path(path: Path) -> Path:
    """A file of scores, or the only one of a run directory."""
    if not path.exists():
        raise ResultFileError(
            f"there are no scores in {path}. Score first: shortllm score MODEL --out {path}"
        )
    if not path.is_dir() or (path / "scores.json").exists():
        return path / "scores.json" if path.is_dir() else path
    several = sorted(path.glob("scores-*.json"))
    if several:
        raise ResultFileError(
            f"{path} contains scores by several criteria. Give one: {', '.join(map(str, several))}"
        )
    return path / "scores.json"
