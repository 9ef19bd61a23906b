"""The embedded model and its shortened versions, made on first use and kept in the user's cache.

    $XDG_CACHE_HOME/shortllm/demo/<version>-<fingerprint>/
      width/    a quarter of the blocks' parameters removed from heads and neurons
      depth/    a quarter of the blocks removed by their ppl scores

Another version of shortllm, or another embedded model, has a directory of its own.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import shortllm
from shortllm import __version__
from shortllm.checkpoint.hub import EMBEDDED
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.data.texts import calibrate
from shortllm.errors import OutputError, ResultFileError
from shortllm.files import require_writable
from shortllm.model.session import Session
from shortllm.pipeline import resolved_criterion
from shortllm.pruning.planning import build_plan
from shortllm.pruning.records import PrunePlan
from shortllm.pruning.score import score_in
from shortllm.recipe import Recipe
from shortllm.stages import is_pruned_by, prune, pruned_fingerprint

log = logging.getLogger(__name__)

RATIO = 0.25
"""What goes: of the blocks, or of the parameters of all blocks."""


def embedded_models(session: Session) -> dict[str, str]:
    """Where the embedded model and its shortened versions are, by the names of their panels.

    Raises:
        OutputError: the cache cannot be written.
    """
    checkpoint = open_checkpoint(EMBEDDED)
    home = cache_directory() / f"{__version__}-{checkpoint.fingerprint[:16]}"
    try:
        require_writable(home, 2 * checkpoint.bytes)
    except OutputError as error:
        raise OutputError(
            "the embedded model's shortened versions are kept in the cache directory, and it "
            "cannot be written. Set XDG_CACHE_HOME to another one, or name models with --model"
        ) from error
    return {
        "original": EMBEDDED,
        "width": str(width_version(home / "width", session)),
        "depth": str(depth_version(home / "depth", checkpoint, session)),
    }


def cache_directory() -> Path:
    """Where the user's programs keep what they can make again."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "shortllm" / "demo"


def depth_version(target: Path, checkpoint: Checkpoint, session: Session) -> Path:
    """The embedded model without a quarter of its blocks, made unless it is there already."""
    plan_file = target.with_name("plan.json")
    if _is_made(target, checkpoint, plan_file):
        return target
    log.info("shortening the embedded model, on first use alone")
    recipe = Recipe(model=EMBEDDED).resolved(checkpoint.model_type)
    budget = recipe.budget.model_copy(update={"ratio": RATIO})
    calibration = calibrate(checkpoint, recipe.calibration)
    asked = resolved_criterion(recipe, checkpoint)
    [scores] = score_in(target.parent, checkpoint, [asked], calibration, session).values()
    plan = build_plan(budget, model=checkpoint.info(), scores=scores)
    prune(checkpoint, plan, target, session=session)
    plan.save(plan_file)
    return target


def _is_made(target: Path, checkpoint: Checkpoint, plan_file: Path) -> bool:
    """Whether a whole checkpoint is there, made from this model by the plan beside it."""
    try:
        plan = PrunePlan.load(plan_file)
    except ResultFileError:
        return False
    return is_pruned_by(target, pruned_fingerprint(checkpoint, plan))


def width_version(target: Path, session: Session) -> Path:
    """The embedded model with a quarter of its blocks' parameters removed in width, by FLAP."""
    shortllm.width(
        EMBEDDED,
        target,
        options=shortllm.WidthOptions(method="flap", ratio=RATIO),
        device=str(session.device),
        dtype=session.runtime.dtype,
    )
    return target
