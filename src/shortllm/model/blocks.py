"""Find the parts of a live decoder by structure: its block list, whatever the family calls it.

The block list is the module list whose length is the config's block count and whose members the
text decoder runs one after the other. No family name is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from shortllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch


def text_config(config: Any) -> Any:
    """The part of a config that describes the text decoder (the config itself for most)."""
    return config.get_text_config(decoder=True)


def block_count(config: Any) -> int:
    """Number of blocks of the text decoder, under whichever name the config class keeps it."""
    count = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' states no block count (num_hidden_layers)"
        )
    return count


def find_blocks(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """Dotted name and module list of the decoder's blocks.

    Where several lists have the right length (a vision tower as deep as the decoder), the one
    inside the text decoder (`model.get_decoder()`) is taken.

    Raises:
        UnsupportedModelError: no list, or more than one, fits.
    """
    count = block_count(config)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
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
    if len(outer) != 1:
        names = ", ".join(name for name, _ in outer) or "none"
        raise UnsupportedModelError(
            f"model type '{config.model_type}' has {count} blocks, but the module lists of that "
            "length "
            f"are: {names}. Exactly one is needed to know which blocks can go"
        )
    return outer[0]


def build_empty(config: Any, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a config on the meta device: its structure without memory for its weights.

    Args:
        dtype: type of the parameters; default: the config's.
    Raises:
        UnsupportedModelError: transformers cannot build it from this config.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    errors = (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        IndexError,
        StrictDataclassError,
    )
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, **({} if dtype is None else {"dtype": dtype})
            )
    except errors as error:
        raise UnsupportedModelError(
            f"transformers cannot build model type '{config.model_type}' from this config: {error}"
        ) from error
    return model


def block_list_name(config: Any) -> str:
    """Dotted module name of the block list of the model a config describes."""
    return find_blocks(build_empty(config), config)[0]
