"""`shortllm.quantize(...)`, as a function of names and options."""

from __future__ import annotations

from pathlib import Path

from shortllm.checkpoint.source import open_checkpoint
from shortllm.data.texts import calibrate
from shortllm.model.session import Session
from shortllm.quantizing.options import RECORD, Quantization, QuantizeOptions
from shortllm.quantizing.stage import calibration_options, check
from shortllm.quantizing.stage import quantize as quantize_stage
from shortllm.recipe import Recipe
from shortllm.surgery.made import require_free


def quantize(
    model: str,
    out: Path | str,
    *,
    options: QuantizeOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
) -> Quantization:
    """Write a quantized checkpoint, which plain transformers loads.

    Args:
        out: the new checkpoint directory, which also gets quantize.json. It may hold nothing else;
            a checkpoint quantized by another recipe is replaced.
    Returns:
        What quantize.json holds, bytes before and after among it.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    checkpoint = open_checkpoint(model, revision=revision)
    recipe = Recipe(model=model, quantization=options or QuantizeOptions())
    asked = recipe.resolved(checkpoint.model_type).quantization
    assert asked is not None
    require_free(Path(out), RECORD)
    session = Session(device=device)
    asked, _ = check(checkpoint, asked, session=session)
    text = calibration_options(asked)
    ids = calibrate(checkpoint, text) if text is not None else None
    return quantize_stage(checkpoint, asked, Path(out), calibration=ids, session=session)
