"""A trained model as a plain checkpoint: the same files, names and config as what was trained.

LoRA adapters are kept, and merged in float32 into the weights the training began with. Weights are
stored in the type the checkpoint stored them in. What was written is read back and compared, every
tensor bit by bit, before it gets its name.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shortllm import __version__
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.errors import CheckpointError
from shortllm.files import partial_directory
from shortllm.model.loading import load_model, quiet_transformers, stored_dtype
from shortllm.retraining import RECORD
from shortllm.retraining.options import Retraining
from shortllm.surgery.apply import PROVENANCE, carried_files, held_provenance
from shortllm.surgery.made import copy_carried

log = logging.getLogger(__name__)

ADAPTER = "adapter"
LOGS = "logs"

CPU = torch.device("cpu")


def write_retrained(
    checkpoint: Checkpoint,
    model: nn.Module,
    weights: dict[str, Tensor],
    target: Path,
    record: Retraining,
    *,
    logs: Path,
) -> None:
    """Write the trained model as directory `target`, whole or not at all.

    Args:
        model: the model as it was trained, wrapped by peft where it has adapters.
        weights: its weights by name, gathered from all processes, on the CPU.
        logs: what Trainer's reporters wrote, if anything.
    Raises:
        CheckpointError: what was read back is not what was written.
        OutputError: the target cannot be written.
    """
    with partial_directory(target, needed_bytes=checkpoint.bytes) as directory:
        if record.method == "lora":
            save_adapter(model, weights, directory / ADAPTER, checkpoint.id)
            plain = merged(checkpoint, directory / ADAPTER)
        else:
            plain = load_model(checkpoint, device=CPU, dtype=_name(stored_dtype(checkpoint)))
            plain.load_state_dict(weights)
        _save_plain(checkpoint, plain, directory)
        config = {**checkpoint.raw_config, PROVENANCE: _provenance(checkpoint, record)}
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        if logs.is_dir():
            shutil.copytree(logs, directory / LOGS)
        record.save(directory / RECORD)
        _compare(directory, plain)


def save_adapter(model: Any, weights: dict[str, Tensor], directory: Path, name: str) -> None:
    """The adapter by itself, as peft loads it."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = name  # not where it lay on this machine
    model.save_pretrained(directory, state_dict=weights, save_embedding_layers=False)


def merged(checkpoint: Checkpoint, adapter: Path) -> nn.Module:
    """The checkpoint with an adapter added to its weights, in float32, then in its stored type."""
    from peft import PeftModel

    base = load_model(checkpoint, device=CPU, dtype="float32")
    plain: nn.Module = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return plain.to(stored_dtype(checkpoint))


def _save_plain(checkpoint: Checkpoint, plain: Any, directory: Path) -> None:
    """Weights by transformers, which knows their names on disk; all other files from the source."""
    with quiet_transformers():
        plain.save_pretrained(directory)
    for file in ("config.json", "generation_config.json"):
        (directory / file).unlink(missing_ok=True)
    carried = carried_files(checkpoint.directory)
    kept = [name for name in carried if name.parts[0] not in (LOGS, RECORD)]
    copy_carried(checkpoint, kept, directory)


def _provenance(checkpoint: Checkpoint, record: Retraining) -> dict[str, Any]:
    """Where the checkpoint comes from, and how it was retrained; `before` keeps earlier times."""
    held = held_provenance(checkpoint)
    retrained = {
        "version": __version__,
        "method": record.method,
        "data": record.data.source,
        "steps": record.best_step,
        "tokens": record.tokens_seen,
        "fingerprint": record.fingerprint,
        "before": held.get("retrained"),
    }
    return {**held, "retrained": retrained}


def _compare(directory: Path, plain: nn.Module) -> None:
    """Read the written weights back.

    Raises:
        CheckpointError: a tensor that is missing, unexpected, or not bit by bit the same.
    """
    dtype = _name(next(plain.parameters()).dtype)
    found = load_model(open_checkpoint(directory), device=CPU, dtype=dtype).state_dict()
    for name, tensor in plain.state_dict().items():
        if not torch.equal(found[name], tensor):
            raise CheckpointError(f"{directory}: tensor '{name}' is not what was written")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
