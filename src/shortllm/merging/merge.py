"""merge."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.options import CalibrationOptions
from shortllm.data.texts import calibrate
from shortllm.merging.options import MERGE_FILE, MergeOptions, Merging
from shortllm.model.session import Session
from shortllm.recipe import Recipe
from shortllm.surgery.made import require_free


def merge(
    model: str,
    out: Path | str,
    *,
    options: MergeOptions | None = None,
    calibration: CalibrationOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    max_memory: int | None = None,
) -> Merging:
    """Fold blocks into one another, from the top down, and write what is left as a plain
    checkpoint.

    Args:
        out: the new checkpoint directory, which also gets merge.json.
        calibration: which text final hidden states are compared on; default: that of scoring.
        stream: read the blocks one at a time from the files; default: where they do not fit.
        max_memory: bytes of hidden streams in memory; beyond it they go to a file.
    Returns:
        What merge.json holds, every try with its cosine among it.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    from shortllm.merging import stage as merge_stage

    options, target = options or MergeOptions(), Path(out)
    require_free(target, MERGE_FILE)
    checkpoint = open_checkpoint(model, revision=revision)
    options.check(checkpoint.block_count)
    recipe = Recipe(model=model, calibration=calibration or CalibrationOptions())
    ids = calibrate(checkpoint, recipe.resolved(checkpoint.model_type).calibration)
    session = Session(device=device, dtype=dtype, stream=stream, max_memory=max_memory)
    return merge_stage.merge(checkpoint, options, target, calibration=ids, session=session)
