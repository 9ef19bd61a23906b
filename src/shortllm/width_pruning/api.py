"""`shortllm.width(...)`, as a function of names and options."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.options import CalibrationOptions
from shortllm.data.texts import calibrate
from shortllm.model.session import Session
from shortllm.recipe import Recipe
from shortllm.width_pruning.options import SAMPLE_LENGTH, WidthOptions, WidthPruning
from shortllm.width_pruning.stage import width as width_stage


def width(
    model: str,
    out: Path | str,
    *,
    options: WidthOptions,
    calibration: CalibrationOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    max_memory: int | None = None,
) -> WidthPruning:
    """Write a narrower checkpoint: heads and neurons removed by one of the width baselines.

    Args:
        out: the new checkpoint directory, which also gets width.json.
        calibration: which text the model sees; default: that of scoring, for llm-pruner with
            samples of 64 tokens.
        stream: read the blocks one at a time from the files; default: where they do not fit.
        max_memory: bytes of hidden streams in memory; beyond it they go to a file.
    Returns:
        What width.json holds, what went from each block among it.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    options = options.filled(checkpoint.block_count)
    if calibration is None:
        length = SAMPLE_LENGTH.get(options.method, CalibrationOptions().length)
        calibration = CalibrationOptions(length=length)
    recipe = Recipe(model=model, calibration=calibration).resolved(checkpoint.model_type)
    ids = calibrate(checkpoint, recipe.calibration) if options.needs_text else None
    session = Session(device=device, dtype=dtype, stream=stream, max_memory=max_memory)
    return width_stage(checkpoint, options, Path(out), calibration=ids, session=session)
