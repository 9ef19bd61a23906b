"""The adapter that LoRA leaves next to the merged weights, and the checkpoint it belongs to.

    adapter/adapter_config.json, adapter_model.safetensors   as peft writes and reads them
    adapter/belongs_to.json, README.md                       the checkpoint it was trained on

An adapter names blocks by number. peft puts it onto any model of the same widths, so on the model
before pruning it would change other blocks than those it was trained in, without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from shortllm import __version__
from shortllm.calls import accepts
from shortllm.checkpoint.config import block_count
from shortllm.checkpoint.hub import ModelSource
from shortllm.checkpoint.loaded import model_called
from shortllm.checkpoint.source import Checkpoint
from shortllm.errors import CheckpointError
from shortllm.files import write_text
from shortllm.format import counted
from shortllm.model.loading import load
from shortllm.records import ResultFile
from shortllm.retraining.methods import METHODS
from shortllm.surgery.origin import named_source

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

SAMPLE = 1024
"""Numbers at either end of each tensor that go into the hash."""


class AdapterOrigin(ResultFile):
    """belongs_to.json: which checkpoint an adapter was trained on."""

    FILE: ClassVar[str] = "belongs_to.json"

    version: str
    source: str = Field(description="name of the checkpoint")
    revision: str | None = None
    blocks: int
    weights: str = Field(description="sha256 over samples of each tensor, as 32-bit numbers")


def describe_adapter(directory: Path, checkpoint: Checkpoint, base: nn.Module) -> None:
    """Write next to an adapter which checkpoint it was trained on, whose model is `base`."""
    named = named_source(checkpoint)
    origin = AdapterOrigin(
        version=__version__,
        source=named["source"],
        revision=named["revision"],
        blocks=checkpoint.block_count,
        weights=weights_hash(base.state_dict()),
        fingerprint=checkpoint.fingerprint,
    )
    origin.save(directory / AdapterOrigin.FILE)
    write_text(
        directory / "README.md",
        f"""---
library_name: peft
tags:
- shortllm
---

# Adapter for {origin.source}, {counted(origin.blocks, "block")}

This adapter belongs to one checkpoint: {origin.source} with {counted(origin.blocks, "block")},
weights sha256 `{origin.weights}`. It names blocks by their numbers there, and peft puts it onto any
model of the same widths, the unpruned one too, where these are other blocks. The following refuses
every other model:

    shortllm.load_adapter("CHECKPOINT", "adapter")
""",
    )


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, shape and both ends of each floating tensor, whatever type it is in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            flat = tensor.detach().reshape(-1)
            ends = torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]).float().cpu()
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(ends.numpy().tobytes())
    return digest.hexdigest()


@accepts()
def load_adapter(model: ModelSource, adapter: Path, **kwargs: Any) -> PeftModel:
    """A model with the adapter that `retrain` trained on it; refuses every other model.

    Args:
        model: the checkpoint that was retrained: a directory, a Hub id, or the loaded model.
        adapter: the directory `adapter` in what `retrain` wrote.
        kwargs: of `from_pretrained`, for a model that is not loaded yet, e.g. `dtype`.
    Returns:
        The model of peft, with the adapter not merged.
    Raises:
        ShortLLMError: peft is not installed.
        CheckpointError: the adapter belongs to another model, or does not say to which.
    """
    METHODS.get("lora").require_packages()
    from peft import PeftModel

    file = adapter / AdapterOrigin.FILE
    if not file.is_file():
        raise CheckpointError(
            f"{adapter} does not say which checkpoint it belongs to: it has no "
            f"{AdapterOrigin.FILE}. Give the adapter directory that `shortllm retrain --method "
            "lora` wrote, or load it with peft, which does not check"
        )
    origin = AdapterOrigin.load(file)
    base = model_called(model)
    base = load(model, **kwargs) if base is None else base
    blocks, meant = block_count(base.config), f"{origin.source}, {counted(origin.blocks, 'block')}"
    if blocks != origin.blocks:
        raise CheckpointError(
            f"the adapter {adapter} belongs to {meant}, but {model} has {blocks}. Give the "
            "checkpoint that was retrained"
        )
    if weights_hash(base.state_dict()) != origin.weights:
        raise CheckpointError(
            f"the adapter {adapter} belongs to {meant}, but {model} has other weights. Give the "
            "checkpoint that was retrained, in the type it is stored in or in float32"
        )
    return PeftModel.from_pretrained(base, str(adapter))
