"""`shortllm.drop_sublayers(...)`, as a function of names and options."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.options import CalibrationOptions
from shortllm.data.texts import calibrate
from shortllm.model.session import Session
from shortllm.recipe import Recipe
from shortllm.sublayers.options import SublayerDrop, SublayerOptions
from shortllm.sublayers.stage import drop_sublayers as stage


def drop_sublayers(
    model: str,
    out: Path | str,
    *,
    options: SublayerOptions,
    calibration: CalibrationOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    max_memory: int | None = None,
) -> SublayerDrop:
    """Write a plain checkpoint without some of the attentions and MLPs.

    Their output projections are zeros: the checkpoint loads everywhere and takes the time and the
    space it took. Blocks that lose both are removed.

    Args:
        out: the new checkpoint directory, which also gets sublayers.json.
        calibration: which text a criterion sees; default: that of scoring.
        stream: read the blocks one at a time from the files; default: where they do not fit.
        max_memory: bytes of hidden streams in memory; beyond it they go to a file.
    Returns:
        What sublayers.json holds, what went and why among it.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    options.candidates(checkpoint.info())
    ids = None
    if options.criterion is not None:
        given = calibration or CalibrationOptions()
        recipe = Recipe(model=model, calibration=given).filled(checkpoint.model_type)
        ids = calibrate(checkpoint, recipe.calibration)
    session = Session(device=device, dtype=dtype, stream=stream, max_memory=max_memory)
    return stage(checkpoint, options, Path(out), calibration=ids, session=session)
