"""States of a training on disk (`checkpoint-N`): found, and looked at before they are gone on from.

They hold the optimizer and the generators of random numbers as pickles, which transformers reads by
the weights-only loader. What that refuses, or cannot read, is refused here in one line, before the
model is trained on.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from shortllm.checkpoint.tensors import load_pickled
from shortllm.errors import CheckpointError

STATE_FILE = "trainer_state.json"

PICKLED = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""What transformers' Trainer loads of a state, beside the weights."""

WEIGHTS = ("adapter_model*.bin", "pytorch_model*.bin")
"""Weights that it would take where there are none in safetensors."""


def last_state(states: Path) -> Path | None:
    """The newest whole state in a directory."""
    found = [path for path in states.glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def require_sound(state: Path) -> None:
    """Refuse a state that could run code, or that cannot be read.

    Raises:
        CheckpointError: naming the file and what to delete.
    """
    work = state.parent.parent
    try:
        json.loads((state / STATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(_damaged(state / STATE_FILE, state, work)) from error
    for pattern in WEIGHTS:
        for file in sorted(state.glob(pattern)):
            load_pickled(file)
    for pattern in PICKLED:
        for file in sorted(state.glob(pattern)):
            _require_plain(file, state, work)


def _require_plain(file: Path, state: Path, work: Path) -> None:
    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():  # what numpy's generator is kept as
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than the state of a training and is refused, since loading it "
            f"could run code. Delete {work} to train anew"
        ) from error
    except Exception as error:  # whatever torch's reader stumbles over
        raise CheckpointError(_damaged(file, state, work)) from error


def _damaged(file: Path, state: Path, work: Path) -> str:
    return (
        f"{file} is damaged. Delete {state} to go on from the state before it, or {work} to train "
        "anew"
    )
