"""The processes of a training that a launcher has started."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from shortllm.errors import ShortLLMError
from shortllm.model.session import Session
from shortllm.runtime import ALONE, Ranks, join_ranks

if TYPE_CHECKING:
    from transformers import TrainingArguments

LONGEST_WAIT = timedelta(days=1)
"""How long a process waits for another, which may be writing a large checkpoint."""


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
    PartialState(cpu=session.device.type == "cpu", timeout=LONGEST_WAIT)
    return join_ranks()


def is_sharded() -> bool:
    """Whether the launcher has asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_on_cpu_too(arguments: TrainingArguments) -> None:
    """Have FSDP among CPU processes: accelerate 1.15 passes it over there, torch's own works."""
    from accelerate import DistributedType

    state = arguments.distributed_state
    if is_sharded() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
