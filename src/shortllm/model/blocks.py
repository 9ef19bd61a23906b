"""Find the parts of a live decoder by structure: its block list, whatever the family calls it.

The block list is the module list whose length is the config's block count and whose members the
text decoder runs one after the other. No family name is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from shortllm.checkpoint.shapes import block_shapes
from shortllm.checkpoint.trust import is_own_code
from shortllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch


def text_config(config: Any) -> Any:
    """The part of a config that describes the text decoder (the config itself for most)."""
    return config.get_text_config(decoder=True)


DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
"""Where configs of encoder-decoders, also used for a decoder alone, keep the decoder's count."""

COUNT_BY_TYPE = {"longcat_flash": "num_layers"}
"""Types whose `num_hidden_layers` counts something else than blocks."""


def count_field(config: Any) -> str:
    """Name under which a text decoder's config keeps its block count."""
    if config.model_type in COUNT_BY_TYPE:
        return COUNT_BY_TYPE[config.model_type]
    for name in DECODER_COUNTS:
        if hasattr(config, name):
            return name
    return type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")  # type: ignore[no-any-return]


def block_count(config: Any) -> int:
    """Number of blocks of the text decoder, under whichever name the config class keeps it.

    Raises:
        UnsupportedModelError: the config says no number of blocks.
    """
    text = text_config(config)
    count = getattr(text, count_field(text), None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' states no block count ({count_field(text)})"
        )
    return count


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
            "length "
            f"are: {names}. Exactly one is needed to know which blocks can go"
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


def auto_class(config: Any) -> Any:
    """The transformers class that loads a config's model with its text head.

    `AutoModelForCausalLM`, but for types that only have a class with towers for images around the
    text decoder, or whose checkpoint names that class, and for blocks that differ in width.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text_only, wrapped = model_classes(config.model_type)
    named = set(getattr(config, "architectures", None) or ())
    if block_shapes(config) is not None:
        from shortllm.model.shapes import per_block_class

        return per_block_class(min(text_only & named or text_only))
    if wrapped and (not text_only or named & wrapped - text_only):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def model_classes(model_type: str) -> tuple[set[str], set[str]]:
    """Names of a type's classes in transformers' tables for causal and for image-text models."""
    from transformers.models.auto import modeling_auto

    def names(table: dict[str, Any]) -> set[str]:
        found = table.get(model_type) or ()
        return {found} if isinstance(found, str) else set(found)

    return (
        names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        names(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )


def build_empty(config: Any, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a config on the meta device: its structure without memory for its weights.

    Args:
        dtype: type of the parameters; default: the config's.
    Raises:
        UnsupportedModelError: transformers cannot build it from this config.
    """
    import torch

    try:
        with torch.device("meta"):
            arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
            if is_own_code(config):
                arguments["trust_remote_code"] = True
            model: nn.Module = auto_class(config).from_config(config, **arguments)
    except Exception as error:  # model classes raise whatever a config's values lead to
        raise UnsupportedModelError(
            f"transformers cannot build model type '{config.model_type}' from this config: "
            f"{str(error) or type(error).__name__}"
        ) from error
    return model
