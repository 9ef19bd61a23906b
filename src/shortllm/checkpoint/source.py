"""Open a checkpoint (local directory, Hub id, embedded model), checked before heavy work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shortllm.checkpoint.names import BlockNames, find_block_names
from shortllm.checkpoint.tensors import (
    TensorEntry,
    read_json,
    read_tensor_table,
    weight_files,
)
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.results import ModelInfo

EMBEDDED = "embedded"
"""The name of the model that comes with the package."""

SAMPLE_BYTES = 4096
"""How much of either end of each tensor goes into a checkpoint's fingerprint."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory that `from_pretrained` loads, seen without building the model."""

    id: str
    """Hub id or directory, as the user gave it."""
    directory: Path
    revision: str | None
    raw_config: dict[str, Any]
    """config.json as it stands in the file."""
    config: Any
    """The Hugging Face config object, with every default filled in."""
    tensors: dict[str, TensorEntry]

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def block_count(self) -> int:
        from shortllm.model.blocks import block_count

        return block_count(self.config)

    @cached_property
    def block_names(self) -> BlockNames:
        """Where the blocks stand among the tensor names."""
        from shortllm.model.blocks import block_list_name

        return find_block_names(self.tensors, self.block_count, block_list_name(self.config))

    @cached_property
    def parameters_per_block(self) -> list[int]:
        """Stored elements of each block."""
        totals = [0] * self.block_count
        for entry in self.tensors.values():
            block = self.block_names.block_of(entry.name)
            if block is not None:
                totals[block] += entry.elements
        return totals

    @property
    def parameters(self) -> int:
        """Stored elements; tied tensors are stored once."""
        return sum(entry.elements for entry in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.bytes for entry in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config, the tensor table and both ends of every tensor's data."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for entry in self.tensors.values():
            digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
            start = entry.offset or 0  # a pickled file is sampled at its own two ends
            stop = start + entry.bytes if entry.offset else entry.file.stat().st_size
            with open(entry.file, "rb") as stream:
                for place in (start, max(start, stop - SAMPLE_BYTES)):
                    stream.seek(place)
                    digest.update(stream.read(min(SAMPLE_BYTES, stop - place)))
        return digest.hexdigest()

    def info(self) -> ModelInfo:
        """Identity and size, as result files carry them."""
        return ModelInfo(
            id=self.id,
            revision=self.revision,
            model_type=self.model_type,
            blocks=self.block_count,
            parameters=self.parameters,
            parameters_per_block=self.parameters_per_block,
            bytes=self.bytes,
            fingerprint=self.fingerprint,
        )


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a local directory, a Hub id (downloaded, or taken from the local cache) or `embedded`.

    Reads config and tensor headers only.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        UnsupportedModelError: not a decoder-only causal language model that transformers knows.
    """
    directory, commit = _locate(str(source), revision)
    config_file = directory / "config.json"
    if not config_file.is_file():
        held = "weights but no config.json" if weight_files(directory) else "no config.json"
        raise CheckpointError(
            f"{source} is not a checkpoint: the directory holds {held}. "
            "Give a directory that transformers' from_pretrained can load"
        )
    raw_config = read_json(config_file)
    if not isinstance(raw_config, dict):
        raise CheckpointError(f"{config_file} is not a model config")
    tensors = read_tensor_table(directory)
    config = _load_config(directory, raw_config)
    _require_decoder(config, raw_config)
    return Checkpoint(str(source), directory, commit, raw_config, config, tensors)


def _locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Directory and, for a Hub id, the commit of the snapshot."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        raise CheckpointError(
            f"{source} is a file. Give the checkpoint's directory: {path.parent or Path('.')}"
        )
    if source == EMBEDDED:
        from shortllm.embedded import MODEL_DIR

        return MODEL_DIR, None
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_like_path:
        raise CheckpointError(
            f"no such directory: {source}. Give a checkpoint directory, a Hub id such as "
            f"Qwen/Qwen3-0.6B, or '{EMBEDDED}'"
        )
    return _download(source, revision)


def _download(hub_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Snapshot of a Hub repository, safetensors preferred; from the cache alone when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    text_files = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]
    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=[*text_files, "*.safetensors"]
        )
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(
                hub_id, revision=revision, allow_patterns=[*text_files, "*.bin"]
            )
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{hub_id}' is gated: accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{hub_id}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no directory and no Hub repository is called '{hub_id}' (or it is private: `hf "
            "auth login`)"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"'{hub_id}' is neither a directory nor a possible Hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"'{hub_id}' is not a local directory, not in the local Hub cache, and could not be "
            f"downloaded ({type(error).__name__}). Check the name and the network, or give a "
            "local directory"
        ) from error
    return Path(folder), Path(folder).name


def _load_config(directory: Path, raw_config: dict[str, Any]) -> Any:
    """The transformers config object of a checkpoint directory."""
    model_type = raw_config.get("model_type")
    if not model_type:
        raise CheckpointError(
            f"{directory / 'config.json'} names no model_type; it is not a transformers checkpoint"
        )
    return read_config(directory, model_type)


def read_config(directory: Path, model_type: str) -> Any:
    """config.json as a transformers object, every default filled in.

    Raises:
        UnsupportedModelError: transformers does not know the model type, or refuses its values.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        import transformers

        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot read the config of model type "
            f"'{model_type}': {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _require_decoder(config: Any, raw_config: dict[str, Any]) -> None:
    """Refuse what is not a decoder-only causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model type '{model_type}' is an encoder-decoder; shortllm shortens decoder-only "
            "models"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    classes = {known} if isinstance(known, str) else set(known or ())
    if not classes:
        raise UnsupportedModelError(
            f"model type '{model_type}' has no causal language model in transformers; "
            "shortllm shortens decoder-only models"
        )
    named = raw_config.get("architectures") or []
    if named and not classes.intersection(named):
        raise UnsupportedModelError(
            f"the checkpoint was saved as {named[0]}, not as a causal language model "
            f"({', '.join(sorted(classes))})"
        )
