"""`shortllm.heal(...)` and `shortllm.merge(...)`, as functions of names and options."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.config import context_length
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.data.options import CalibrationOptions
from shortllm.data.texts import calibrate
from shortllm.healing.options import HEAL_FILE, Healing, HealOptions
from shortllm.model.session import Session
from shortllm.recipe import Recipe
from shortllm.surgery.made import require_free


def heal(
    model: str,
    out: Path | str,
    *,
    options: HealOptions | None = None,
    source: str | None = None,
    data: str | None = None,
    calibration: Path | None = None,
    bos_every_sample: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    max_memory: int | None = None,
) -> Healing:
    """Heal a shortened checkpoint without training, and write it as a plain checkpoint.

    Args:
        model: a checkpoint as `shortllm prune` wrote it.
        out: the new checkpoint directory, which also gets heal.json.
        source: what it was shortened from; default: what its config.json says.
        data: calibration text, all rows one after another; default: bookcorpus.
        calibration: token ids given directly, instead of text.
        stream: read the blocks one at a time from the files; default: where they do not fit.
        max_memory: bytes of hidden streams in memory; beyond it they go to a file.
    Returns:
        What heal.json holds, each gap with its error before and after among it.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    from shortllm.healing import stage

    options, target = options or HealOptions(), Path(out)
    require_free(target, HEAL_FILE)
    checkpoint = open_checkpoint(model)
    original = stage.open_source(checkpoint, source)
    stage.kept_blocks(checkpoint, original)
    asked = CalibrationOptions(data=data, file=calibration, bos_every_sample=bos_every_sample)
    recipe = Recipe(model=original.id, calibration=asked).resolved(checkpoint.model_type)
    ids = calibrate(original, healing_text(recipe.calibration, options, original))
    session = Session(device=device, dtype=dtype, stream=stream, max_memory=max_memory)
    return stage.heal(checkpoint, original, options, target, calibration=ids, session=session)


def healing_text(
    calibration: CalibrationOptions, options: HealOptions, checkpoint: Checkpoint
) -> CalibrationOptions:
    """The text that blocks are scored on, in the amount that healing takes; given ids as they
    are."""
    positions = context_length(checkpoint.config)
    return calibration.model_copy(
        update={
            "sampler": "packed",
            "samples": options.samples,
            "length": options.sample_length(positions),
        }
    )
