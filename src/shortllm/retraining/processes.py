"""The processes of a training that a launcher has started."""

from __future__ import annotations

import os

from shortllm.errors import ShortLLMError
from shortllm.runtime import ALONE, Ranks, join_ranks
from shortllm.stages import Session


def join_training(session: Session) -> Ranks:
    """The processes this one was launched with, joined the way that Trainer will use them.

    Raises:
        ShortLLMError: accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ShortLLMError(
            "training in several processes needs accelerate. Install it with: pip install "
            "'shortllm[train]'"
        ) from error
    PartialState(cpu=session.device.type == "cpu")
    return join_ranks()
