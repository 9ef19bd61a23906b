"""Find the parts of a live decoder by structure: its block list, whatever the family calls it.

The block list is the module list whose length is the config's block count and whose members the
text decoder runs one after the other. No family name is read.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from shortllm.checkpoint.config import block_count, text_config
from shortllm.errors import UnsupportedModelError


def find_blocks(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """Dotted name and module list of the decoder's blocks: modules that have parts themselves.

    Where several lists have the right length (a vision tower as deep as the decoder), those inside
    the text decoder are taken: within `model.get_decoder()`, and built from the text config.

    Raises:
        UnsupportedModelError: no list, or more than one, fits.
    """
    count = block_count(config)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _have_parts(module)
    ]
    outer = [
        (name, module)
        for name, module in found
        if not any(name.startswith(other + ".") for other, _ in found)
    ]
    if len(outer) > 1:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        inside = {id(module) for module in decoder.modules()}
        outer = [(name, module) for name, module in outer if id(module) in inside]
    if len(outer) > 1:
        text_type = text_config(config).model_type
        outer = [(name, m) for name, m in outer if _config_type(model, name) == text_type]
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise UnsupportedModelError(
            f"model type '{config.model_type}' has {count} blocks, but the module lists of that "
            f"length are: {names}. Exactly one is needed to know which blocks can go"
        )
    return outer[0]


def _have_parts(modules: nn.ModuleList) -> bool:
    return all(any(True for _ in module.children()) for module in modules)


def _config_type(model: nn.Module, name: str) -> str | None:
    """Model type of the nearest config above the module `name`."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return str(getattr(config, "model_type", None))
    return None


def is_projection(module: nn.Module) -> bool:
    """Whether a module is one matrix that its input is multiplied with."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))
