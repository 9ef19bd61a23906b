"""Pickled weights (`.bin`): read by torch's weights-only loader, which runs no code.

A pickle is a program, and one that was made to do harm does it when it is loaded. The weights-only
loader knows how to rebuild tensors and nothing else; whatever it refuses is refused here, in one
line. Every command reads such files through this module.
"""

from __future__ import annotations

import pickle
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SETTLED_NS = 100_000_000
"""From this age on a changed file has another time; clocks of file systems are coarse."""


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` through the weights-only loader, memory-mapped where the file allows.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors (it could run code).
    """
    changed_ns = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns)
    if time.time_ns() - changed_ns < SETTLED_NS:
        return _load(path)
    return _remembered(path, changed_ns)


@lru_cache(maxsize=1)
def _remembered(path: Path, changed_ns: int) -> dict[str, Tensor]:
    """The last file's content: its tensors are asked for one by one."""
    return _load(path)


def _load(path: Path) -> dict[str, Tensor]:
    import torch

    for mmap in (True, False):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than tensors and is refused, since loading it could run code. "
                "Convert it to safetensors where you trust it"
            ) from error
        except Exception as error:  # whatever torch's reader stumbles over
            if mmap:
                continue  # files of torch < 1.6 cannot be memory-mapped
            raise CheckpointError(
                f"{path} is damaged or truncated ({_reason(error)}). Download it again"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and _is_plain(tensor) for name, tensor in content.items()
        ):
            raise CheckpointError(
                f"{path} is not a plain table of tensors. Convert it to safetensors"
            )
        return content
    raise AssertionError("unreachable")


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with memory of its own behind every element.

    A view that repeats its memory lets a file of a few bytes stand for any amount.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def _reason(error: Exception) -> str:
    """The first line of a foreign error."""
    return str(error).split("\n", 1)[0] or type(error).__name__
