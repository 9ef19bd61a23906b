"""`shortllm.retrain(...)`, as a function of names and options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shortllm.checkpoint.source import open_checkpoint
from shortllm.model.session import Session
from shortllm.retraining import RECORD as RETRAINED
from shortllm.retraining.options import Retraining
from shortllm.surgery.made import require_free

if TYPE_CHECKING:
    from shortllm.retraining.options import RetrainOptions


def retrain(
    model: str,
    out: Path | str,
    *,
    options: RetrainOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Retraining:
    """Heal a shortened checkpoint by retraining, and write it as a plain checkpoint.

    Under `accelerate launch` or `torchrun` all processes train and the main one writes. The same
    call again goes on where an interrupted one was.

    Args:
        out: the new checkpoint directory, with retrain.json, and for LoRA the adapter. It may hold
            nothing else; a retrained checkpoint of another recipe is replaced.
        dtype: computation type; default: bfloat16 on CUDA, float32 elsewhere.
    Returns:
        What retrain.json holds, the loss curves among it.
    Raises:
        ShortLLMError: any of its kinds, before the model is loaded wherever that can be known.
    """
    from shortllm.retraining import stage
    from shortllm.retraining.options import RetrainOptions
    from shortllm.retraining.processes import join_training

    options, out = options or RetrainOptions(), Path(out)
    checkpoint = open_checkpoint(model, revision=revision)
    require_free(out, RETRAINED)
    session = Session(device=device, dtype=dtype)
    ranks = join_training(session)
    return stage.retrain(checkpoint, options, out, session=session, ranks=ranks)
