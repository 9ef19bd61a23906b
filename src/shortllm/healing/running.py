"""Healing without training as a stage of a run: from `pruned/` to `healed/`."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.source import Checkpoint
from shortllm.data.options import CalibrationOptions
from shortllm.evaluation.texts import Texts
from shortllm.healing.api import healing_text
from shortllm.healing.options import HEAL_FILE, Healing
from shortllm.healing.stage import check_healable, heal
from shortllm.model.session import Session
from shortllm.recipe import Recipe
from shortllm.run_directory import HEALED
from shortllm.surgery.made import require_free


def healing_text_of(recipe: Recipe, checkpoint: Checkpoint) -> CalibrationOptions | None:
    """How text to heal with is cut; None where nothing is healed without training."""
    if recipe.healing is None:
        return None
    return healing_text(recipe.calibration, recipe.healing, checkpoint)


def check_healing(directory: Path, checkpoint: Checkpoint, session: Session) -> None:
    """Find out before anything is scored whether there is a place to fold maps into.

    Raises:
        UnsupportedModelError: there is none.
        OutputError: the healed checkpoint's directory holds something else.
    """
    require_free(directory / HEALED, HEAL_FILE)
    check_healable(checkpoint, session)


def heal_in(
    directory: Path,
    shortened: Checkpoint,
    checkpoint: Checkpoint,
    recipe: Recipe,
    texts: Texts,
    session: Session,
) -> Healing | None:
    """A checkpoint with heal.json, where it is asked for."""
    if recipe.healing is None or texts.healing is None:
        return None
    return heal(
        shortened,
        checkpoint,
        recipe.healing,
        directory / HEALED,
        calibration=texts.healing,
        session=session,
    )
