"""A quantized model as a checkpoint: the files and config of its source, and packed weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortllm import __version__
from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.files import partial_directory
from shortllm.quantizing.compressing import save_compressed
from shortllm.quantizing.options import RECORD, Quantization
from shortllm.retraining.options import Retraining
from shortllm.surgery.apply import PROVENANCE, carried_files, held_provenance
from shortllm.surgery.made import copy_carried

LEFT_BEHIND = {Retraining.FILE, RECORD, "adapter", "logs"}
"""What speaks of the source's weights alone."""

OWN_FILES = ("config.json", "generation_config.json", "recipe.yaml")
"""Files of llm-compressor that the source's, or ours, take the place of."""


def write_quantized(
    checkpoint: Checkpoint,
    model: Any,
    target: Path,
    record: Quantization,
    *,
    verify: Callable[[Path], None],
) -> None:
    """Write the quantized model as directory `target`, whole or not at all.

    Args:
        record: how it was made; the bytes after are filled in here.
        verify: called with the written directory before it gets its final name; may raise.
    Raises:
        OutputError: the target cannot be written.
    """
    with partial_directory(target) as directory:
        save_compressed(model, directory)
        written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        for name in OWN_FILES:
            (directory / name).unlink(missing_ok=True)
        carried = carried_files(checkpoint.directory, target)
        kept = [file for file in carried if file.parts[0] not in LEFT_BEHIND]
        copy_carried(checkpoint, kept, directory)
        config = {
            **checkpoint.raw_config,
            "quantization_config": written["quantization_config"],
            PROVENANCE: _provenance(checkpoint, record),
        }
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        after = open_checkpoint(directory).bytes
        record.model_copy(update={"bytes_after": after}).save(directory / RECORD)
        verify(directory)


def _provenance(checkpoint: Checkpoint, record: Quantization) -> dict[str, Any]:
    """Where the checkpoint comes from, and how it was quantized."""
    calibration = record.calibration
    quantized = {
        "version": __version__,
        "method": record.method,
        "scheme": record.scheme,
        "group_size": record.options.get("group_size"),
        "calibration": calibration.tokens_fingerprint if calibration else None,
        "fingerprint": record.fingerprint,
    }
    return {**held_provenance(checkpoint), "quantized": quantized}
