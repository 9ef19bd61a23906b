"""config.json of a checkpoint: read, checked to be a decoder's, and what it says of the blocks.

Code of its own    Some checkpoints bring Python modules (`auto_map`) instead of a model type that
                   transformers knows. Loading such a model runs that code with all rights of the
                   user, so it is refused unless the user allows it (`--trust-remote-code`).
Shape per block    Blocks that differ in width have their shapes in config.json, block by block:

    "model_type": "llama with a shape per block (load it with shortllm.load)"
    "per_block_shapes": [{"num_attention_heads": 4, ..., "projections": {...}}, ...]

The loader of transformers does not know this type, so it refuses the checkpoint and repeats what to
do, instead of filling tensors of the wrong shape with random numbers. structure.py builds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortllm.checkpoint.tensors import read_json, weight_files
from shortllm.errors import CheckpointError, UnsupportedModelError, first_line_of
from shortllm.records import MAX_BLOCKS
from shortllm.runtime import is_trusted

ADAPTER = "adapter_config.json"
FLAG = "--trust-remote-code"
CLASSES = ("AutoConfig", "AutoModelForCausalLM")
"""What the code of a checkpoint must provide."""

SHAPES = "per_block_shapes"
"""Config field with one entry per block."""

MARK = " with a shape per block (load it with shortllm.load)"
"""What the model type of such a checkpoint ends with."""

SEPARATORS = "|/"
"""Signs that some programs write between the letters of a pattern."""

DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
"""Where configs of encoder-decoders, also used for a decoder alone, keep the decoder's count."""

COUNT_BY_TYPE = {"longcat_flash": "num_layers"}
"""Types whose `num_hidden_layers` counts something other than blocks."""


# ---- reading


def checked_config(source: str, directory: Path) -> tuple[dict[str, Any], Any]:
    """config.json as it is in the file, and as a transformers object; messages name `source`."""
    raw_config = read_raw_config(source, directory)
    if brings_code(raw_config):
        require_trust(source, directory, raw_config)
    config = read_config(directory, raw_config)
    _require_decoder(config, raw_config)
    return raw_config, config


def read_raw_config(source: str, directory: Path) -> dict[str, Any]:
    """config.json as it is in the file, checked to be a model's; messages name `source`."""
    config_file = directory / "config.json"
    if not config_file.is_file():
        weights = directory.is_dir() and weight_files(directory)
        found = "weights but no config.json" if weights else "no config.json"
        raise CheckpointError(
            f"{source} is not a checkpoint: the directory has {found}. "
            "Give a directory that transformers' from_pretrained can load"
        )
    if (directory / ADAPTER).exists():
        raise CheckpointError(
            f"{source} has an adapter ({ADAPTER}), which transformers would add to another model. "
            "Merge it into its model, or give that model"
        )
    raw_config = read_json(config_file)
    model_type = raw_config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(f"{config_file} names no model_type: not a model's config")
    return raw_config


def read_config(directory: Path, raw: dict[str, Any]) -> Any:
    """The config.json `raw` in `directory` as a transformers object; runs code of its own."""
    from transformers import AutoConfig

    try:
        if SHAPES in raw:
            return per_block_config(raw)
        return AutoConfig.from_pretrained(directory, trust_remote_code=brings_code(raw))
    except Exception as error:  # config classes raise whatever their values lead to
        import transformers

        said = separated_pattern(raw) or first_line_of(error)
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot read the config of model type "
            f"'{raw['model_type']}': {said}"
        ) from error


def separated_pattern(raw: dict[str, Any]) -> str | None:
    """What to say of a pattern of letters that is parted by signs; None where there is none."""
    for field, value in raw.items():
        if isinstance(value, dict) and (said := separated_pattern(value)):
            return said
        if field.endswith("_pattern") and isinstance(value, str) and set(value) & set(SEPARATORS):
            return (
                f"{field} '{value}' has signs between the letters of the blocks ('|' between "
                "stages of a pipeline, '/' before the blocks of a prediction head). Write one "
                "letter for each block, and nothing else"
            )
    return None


def _require_decoder(config: Any, raw_config: dict[str, Any]) -> None:
    """Refuse what is not a decoder-only causal language model, alone or behind other towers."""
    from transformers import PretrainedConfig

    model_type = config.model_type
    try:
        parts = (config, text_config(config))
    except Exception:  # config classes raise whatever their values lead to
        parts = (config, None)
    if not all(isinstance(p, PretrainedConfig) and isinstance(p.model_type, str) for p in parts):
        raise UnsupportedModelError(
            f"model type '{model_type}': config.json lacks its text decoder. Download it again"
        )
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise UnsupportedModelError(
            f"model type '{model_type}' is an encoder-decoder; only decoders can be shortened"
        )
    if is_own_code(config):
        return
    text_only, wrapped = model_classes(model_type)
    classes = text_only | (wrapped if parts[1] is not config else set())
    if not classes:
        raise UnsupportedModelError(
            f"model type '{model_type}' has no causal language model in transformers; only "
            "decoders can be shortened"
        )
    named = raw_config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(
            f"config.json of a '{model_type}' must list names of classes as architectures"
        )
    if named and not classes.intersection(named):
        raise UnsupportedModelError(
            f"the checkpoint was saved as {named[0]}, not as a causal language model "
            f"({', '.join(sorted(classes))})"
        )


# ---- code of its own


def brings_code(raw_config: dict[str, Any]) -> bool:
    """Whether a config.json names code for a model type that transformers does not know."""
    from transformers import CONFIG_MAPPING

    return bool(raw_config.get("auto_map")) and raw_config.get("model_type") not in CONFIG_MAPPING


def is_own_code(config: Any) -> bool:
    """Whether a transformers config is of a class that came with a checkpoint."""
    return type(config).__module__.startswith("transformers_modules.")


def require_trust(source: str, directory: Path, raw_config: dict[str, Any]) -> None:
    """Refuse code that the user has not allowed, and code that is not in the checkpoint."""
    named = raw_config["auto_map"]
    if not isinstance(named, dict) or not all(isinstance(named.get(one), str) for one in CLASSES):
        raise UnsupportedModelError(
            f"{source}: auto_map in config.json must name classes for {' and '.join(CLASSES)}"
        )
    files = sorted({named[one].rpartition(".")[0] + ".py" for one in CLASSES})
    if not is_trusted():
        raise UnsupportedModelError(
            f"{source} comes with Python code of its own ({', '.join(files)}), as transformers "
            f"does not know its model type '{raw_config.get('model_type')}'. It was not run. Read "
            f"it, and if you trust it run the same command with {FLAG}"
        )
    for file in files:
        if "--" in file or "/" in file or file.startswith("."):
            raise CheckpointError(
                f"{source} names code of another repository ({file.removesuffix('.py')}), which "
                "no revision pins. Put that file next to config.json, and name it in auto_map"
            )
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{source} names the code {file}, which is missing. Finish the download"
            )


# ---- a shape per block


def marked(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the model type that transformers refuses."""
    return {**raw, "model_type": plain_type(raw) + MARK}


def plain_type(raw: dict[str, Any]) -> str:
    """The model type without the mark."""
    return str(raw["model_type"]).removesuffix(MARK)


def per_block_config(raw: dict[str, Any]) -> Any:
    """The transformers config of such a config.json: of the plain type, with the shapes."""
    from transformers import CONFIG_MAPPING

    model_type = plain_type(raw)
    return CONFIG_MAPPING[model_type].from_dict({**raw, "model_type": model_type})


def block_shapes(config: Any) -> list[dict[str, Any]] | None:
    """The entries of a transformers config, one per block; None for a plain checkpoint."""
    return getattr(config, SHAPES, None)


# ---- blocks and positions


def text_config(config: Any) -> Any:
    """The part of a config that describes the text decoder (the config itself for most)."""
    return config.get_text_config(decoder=True)


def count_field(config: Any) -> str:
    """Name under which a text decoder's config keeps its block count."""
    if config.model_type in COUNT_BY_TYPE:
        return COUNT_BY_TYPE[config.model_type]
    for name in DECODER_COUNTS:
        if hasattr(config, name):
            return name
    return type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")  # type: ignore[no-any-return]


def block_count(config: Any) -> int:
    """Number of blocks of the text decoder, under whichever name the config class keeps it."""
    text = text_config(config)
    field = count_field(text)
    count = getattr(text, field, None)
    if not isinstance(count, int) or not 1 <= count <= MAX_BLOCKS:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' states no block count: {field} is {count!r}"
        )
    return count


def context_length(config: Any) -> int | None:
    """Tokens of the longest text the model has positions for; None where the config names none."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


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
