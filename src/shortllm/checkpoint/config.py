"""config.json, as it stands and as an object of transformers, of a decoder for certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shortllm.checkpoint.shapes import SHAPES, per_block_config
from shortllm.checkpoint.tensors import read_json, weight_files
from shortllm.checkpoint.trust import brings_code, is_own_code, require_trust
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.results.record import MAX_BLOCKS

COUNTS = ("layers", "layer", "blocks", "depth", "iters", "iterations", "loops", "cycles")
"""What the names of config fields end with that count blocks, or how often some are run."""

ADAPTER = "adapter_config.json"


def checked_config(source: str, directory: Path) -> tuple[dict[str, Any], Any]:
    """config.json as it stands and as a transformers object.

    Args:
        source: what messages call the checkpoint.
    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        UnsupportedModelError: not a decoder-only causal language model that transformers knows, or
            one that brings code which the user has not asked for.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        weights = directory.is_dir() and weight_files(directory)
        held = "weights but no config.json" if weights else "no config.json"
        raise CheckpointError(
            f"{source} is not a checkpoint: the directory holds {held}. "
            "Give a directory that transformers' from_pretrained can load"
        )
    if (directory / ADAPTER).exists():
        raise CheckpointError(
            f"{source} holds an adapter ({ADAPTER}), which transformers would lay over another "
            "model. Merge it into its model, or give that model"
        )
    raw_config = read_json(config_file)
    if not isinstance(raw_config, dict):
        raise CheckpointError(f"{config_file} is not a model config")
    model_type = raw_config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"{config_file} names no model_type; it is not a transformers checkpoint"
        )
    _require_possible(raw_config, config_file)
    if brings_code(raw_config):
        require_trust(source, directory, raw_config)
    config = read_config(directory, model_type)
    _require_decoder(config, raw_config)
    return raw_config, config


def _require_possible(raw: dict[str, Any], file: Path) -> None:
    """Refuse a config with more blocks than any model has, which would be built one by one, or run
    as often.

    Raises:
        CheckpointError: naming the field.
    """
    for name, value in raw.items():
        if isinstance(value, dict):
            _require_possible(value, file)
        counts = isinstance(value, (int, float)) and name.endswith(COUNTS)
        if counts and value > MAX_BLOCKS:
            raise CheckpointError(
                f"{file} says {name} {value:g}, and no model has more than {MAX_BLOCKS:,}. "
                "Download it again"
            )


def read_config(directory: Path, model_type: str) -> Any:
    """config.json as a transformers object, every default filled in.

    Code beside it is run where `checked_config` has let it through, and for no type that
    transformers knows.

    Raises:
        UnsupportedModelError: transformers does not know the model type, or refuses its values.
    """
    from transformers import AutoConfig

    raw = read_json(directory / "config.json")
    try:
        if SHAPES in raw:
            return per_block_config(raw)
        return AutoConfig.from_pretrained(directory, trust_remote_code=brings_code(raw))
    except Exception as error:  # config classes raise whatever their values lead to
        import transformers

        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot read the config of model type "
            f"'{model_type}': {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _require_decoder(config: Any, raw_config: dict[str, Any]) -> None:
    """Refuse what is not a decoder-only causal language model, alone or behind other towers."""
    from transformers import PretrainedConfig

    from shortllm.model.blocks import model_classes, text_config

    model_type = config.model_type
    parts = (config, _text_part(config, text_config))
    whole = all(isinstance(part, PretrainedConfig) for part in parts)
    if not (whole and all(isinstance(part.model_type, str) for part in parts)):
        raise UnsupportedModelError(
            f"model type '{model_type}': the part of config.json that describes its text decoder "
            "is none. Download it again"
        )
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise UnsupportedModelError(
            f"model type '{model_type}' is an encoder-decoder; shortllm shortens decoder-only "
            "models"
        )
    if is_own_code(config):
        return
    text_only, wrapped = model_classes(model_type)
    classes = text_only | (wrapped if parts[1] is not config else set())
    if not classes:
        raise UnsupportedModelError(
            f"model type '{model_type}' has no causal language model in transformers; "
            "shortllm shortens decoder-only models"
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


def _text_part(config: Any, text_config: Any) -> Any:
    """The text decoder's part; None where the config does not let one be found."""
    try:
        return text_config(config)
    except Exception:  # of a type whose parts are not what its class takes them for
        return None
