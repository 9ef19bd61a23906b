"""Open a checkpoint (local directory, Hub id, embedded model), checked before heavy work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortllm.checkpoint.names import BlockNames, find_block_names, is_weight
from shortllm.checkpoint.packed import unpacked_elements
from shortllm.checkpoint.shapes import SHAPES, per_block_config
from shortllm.checkpoint.tensors import (
    TensorEntry,
    read_json,
    read_tensor_table,
    weight_files,
)
from shortllm.errors import CheckpointError, UnsupportedModelError
from shortllm.results.record import ModelInfo, SpecialToken

if TYPE_CHECKING:
    from shortllm.checkpoint.signature import BlockStructure

EMBEDDED = "embedded"
"""The name of the model that comes with the package."""

SAMPLE_BYTES = 4096
"""How much goes into a checkpoint's fingerprint at each place that is looked at."""

SAMPLE_STEP = 2**20
"""Distance of such places in a file of weights, besides both ends of each tensor."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory that `from_pretrained` loads, seen without building the model."""

    id: str
    """Hub id or directory, as the user gave it."""
    directory: Path
    revision: str | None
    raw_config: dict[str, Any]
    """config.json as it stands in the file, but for `special_tokens`."""
    config: Any
    """The Hugging Face config object, with every default filled in."""
    tensors: dict[str, TensorEntry]
    special_tokens: dict[SpecialToken, int] = field(default_factory=dict)
    """Token ids that take the place of what the files name, e.g. `{"bos": 1}`."""

    @property
    def model_type(self) -> str:
        """The type that config.json names."""
        return str(self.config.model_type)

    @property
    def block_count(self) -> int:
        """Blocks of the (text) decoder."""
        from shortllm.model.blocks import block_count

        return block_count(self.config)

    @cached_property
    def structure(self) -> BlockStructure:
        """The blocks of the model that the config describes."""
        from shortllm.checkpoint.signature import block_structure

        return block_structure(self.config)

    @cached_property
    def block_names(self) -> BlockNames:
        """Where the blocks stand among the tensor names."""
        from shortllm.checkpoint.shortening import prediction_heads

        def fits(prefix: str) -> bool:
            found = (t.elements for key, t in self.tensors.items() if key.startswith(prefix + "."))
            return sum(found) == self.structure.elements

        return find_block_names(
            self.tensors,
            self.block_count,
            self.structure.name,
            heads=prediction_heads(self.config),
            fits=fits,
        )

    @cached_property
    def parameters_per_block(self) -> list[int]:
        """Parameters of each block."""
        totals = [0] * self.block_count
        for name, elements in self.elements.items():
            block = self.block_names.block_of(name)
            if block is not None:
                totals[block] += elements
        return totals

    @cached_property
    def bytes_per_block(self) -> list[int]:
        """Stored bytes of each block."""
        totals = [0] * self.block_count
        for entry in self.tensors.values():
            block = self.block_names.block_of(entry.name)
            if block is not None:
                totals[block] += entry.bytes
        return totals

    def block_weights(self, block: int) -> list[TensorEntry]:
        """The stored weights of a block: see `is_weight`."""
        return [
            entry
            for entry in self.tensors.values()
            if self.block_names.block_of(entry.name) == block
            and is_weight(entry.name, len(entry.shape))
        ]

    @property
    def parameters(self) -> int:
        """Stored elements, packed ones each by itself; tied tensors are stored once."""
        return sum(self.elements.values())

    @cached_property
    def elements(self) -> dict[str, int]:
        """How many parameters each stored tensor stands for."""
        return unpacked_elements(self.tensors, self.raw_config)

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.bytes for entry in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config, the tensor table, and samples of the data.

        Sampled are both ends of every tensor and 4 KiB of every MiB of each file of weights, so
        that a retrained or repaired copy differs while a large model need not be read as a whole.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for entry in self.tensors.values():
            digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
        for file, places in _sampled_places(self.tensors.values()).items():
            with open(file, "rb", buffering=0) as stream:
                for start, count in sorted(places):
                    stream.seek(start)
                    digest.update(stream.read(count))
        return digest.hexdigest()

    def info(self) -> ModelInfo:
        """Identity and size, as result files carry them."""
        from shortllm.checkpoint.shortening import structurally_protected

        return ModelInfo(
            id=self.id,
            revision=self.revision,
            model_type=self.model_type,
            blocks=self.block_count,
            parameters=self.parameters,
            parameters_per_block=self.parameters_per_block,
            bytes=self.bytes,
            period=self.structure.period,
            fixed=structurally_protected(self.config),
            fingerprint=self.fingerprint,
        )


def _sampled_places(entries: Iterable[TensorEntry]) -> dict[Path, set[tuple[int, int]]]:
    """Start and length of what goes into the fingerprint, for each file of weights."""
    places: dict[Path, set[tuple[int, int]]] = {}
    spans: dict[Path, tuple[int, int]] = {}
    for entry in entries:
        found = places.setdefault(entry.file, set())
        if entry.offset is None:  # where the data lies in a pickled file is not known
            size = entry.file.stat().st_size
            spans[entry.file] = (0, size)
            # at its end such a file lists a checksum of each tensor
            found.add((max(0, size - SAMPLE_STEP), SAMPLE_STEP))
            continue
        start, stop = entry.offset, entry.offset + entry.bytes
        count = min(SAMPLE_BYTES, entry.bytes)
        found |= {(start, count), (stop - count, count)}
        first, last = spans.get(entry.file, (start, stop))
        spans[entry.file] = (min(first, start), max(last, stop))
    for file, (start, stop) in spans.items():
        places[file] |= {
            (place, min(SAMPLE_BYTES, stop - place)) for place in range(start, stop, SAMPLE_STEP)
        }
    return places


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    special_tokens: Mapping[SpecialToken, int] | None = None,
) -> Checkpoint:
    """Open a local directory, a Hub id (downloaded, or taken from the local cache) or `embedded`.

    Reads config and tensor headers only. The text `embedded` always means the built-in model; a
    directory of that name is `./embedded`.

    Args:
        special_tokens: ids of `bos`, `eos`, `unk`, `pad` where the files name wrong ones.
    Returns:
        Its config and tensor table, by which all stages read it.
    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        UnsupportedModelError: not a decoder-only causal language model that transformers knows.
    """
    directory, commit = _locate(source, revision)
    raw_config, config = _checked_config(str(source), directory)
    tensors = read_tensor_table(directory)
    special = dict(special_tokens or {})
    raw_config = raw_config | token_ids(special)
    for name, number in token_ids(special).items():
        setattr(config, name, number)
    return Checkpoint(str(source), directory, commit, raw_config, config, tensors, special)


def token_ids(special_tokens: Mapping[SpecialToken, int]) -> dict[str, int]:
    """As config files call them, e.g. `{"bos_token_id": 1}`; of unknown words they say nothing."""
    return {f"{kind}_token_id": number for kind, number in special_tokens.items() if kind != "unk"}


def _locate(source: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """Directory and, for a Hub id, the commit of the snapshot."""
    if source == EMBEDDED:
        from shortllm.embedded import MODEL_DIR

        return MODEL_DIR, None
    path = Path(source).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        raise CheckpointError(
            f"{source} is a file. Give the checkpoint's directory: {path.parent or Path('.')}"
        )
    name = str(source)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise CheckpointError(
            f"no such directory: {source}. Give a checkpoint directory, a Hub id (it needs its "
            f"owner, e.g. openai-community/gpt2), or '{EMBEDDED}'"
        )
    return _download(name, revision)


def _download(hub_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Snapshot of a Hub repository, safetensors preferred; from the cache alone when offline.

    The config comes first, so that what cannot be shortened costs no download of weights.
    """
    folder = _snapshot(hub_id, revision, ["config.json"])
    _checked_config(hub_id, folder)
    commit = folder.name
    text_files = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*.tiktoken"]
    folder = _snapshot(hub_id, commit, [*text_files, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(hub_id, commit, ["*.bin"])
    return folder, commit


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot's directory, with the files of the repository's top level that fit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    second_copies = ["consolidated*", "*/*"]
    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=second_copies
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
    return Path(folder)


def _checked_config(source: str, directory: Path) -> tuple[dict[str, Any], Any]:
    """config.json as it stands and as a transformers object, of a decoder for certain."""
    config_file = directory / "config.json"
    if not config_file.is_file():
        weights = directory.is_dir() and weight_files(directory)
        held = "weights but no config.json" if weights else "no config.json"
        raise CheckpointError(
            f"{source} is not a checkpoint: the directory holds {held}. "
            "Give a directory that transformers' from_pretrained can load"
        )
    raw_config = read_json(config_file)
    if not isinstance(raw_config, dict):
        raise CheckpointError(f"{config_file} is not a model config")
    config = _load_config(directory, raw_config)
    _require_decoder(config, raw_config)
    return raw_config, config


def _load_config(directory: Path, raw_config: dict[str, Any]) -> Any:
    """The transformers config object of a checkpoint directory."""
    model_type = raw_config.get("model_type")
    if not model_type:
        raise CheckpointError(
            f"{directory / 'config.json'} names no model_type; it is not a transformers checkpoint"
        )
    return read_config(directory, model_type)


def read_config(directory: Path, model_type: str) -> Any:
    """config.json as a transformers object, every default filled in; never by code beside it.

    Raises:
        UnsupportedModelError: transformers does not know the model type, or refuses its values.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    raw = read_json(directory / "config.json")
    try:
        if SHAPES in raw:
            return per_block_config(raw)
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        import transformers

        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot read the config of model type "
            f"'{model_type}': {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _require_decoder(config: Any, raw_config: dict[str, Any]) -> None:
    """Refuse what is not a decoder-only causal language model, alone or behind other towers."""
    from shortllm.model.blocks import model_classes, text_config

    model_type = config.model_type
    parts = (config, text_config(config))
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise UnsupportedModelError(
            f"model type '{model_type}' is an encoder-decoder; shortllm shortens decoder-only "
            "models"
        )
    text_only, wrapped = model_classes(model_type)
    classes = text_only | (wrapped if text_config(config) is not config else set())
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
