"""Open a checkpoint (local directory, Hub id, embedded model) and check it before heavy work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shortllm.checkpoint.config import block_count, checked_config
from shortllm.checkpoint.hub import locate, named_revision
from shortllm.checkpoint.names import BlockNames, find_block_names, is_weight
from shortllm.checkpoint.shorten_config import prediction_heads, structurally_protected
from shortllm.checkpoint.structure import BlockStructure, block_structure
from shortllm.checkpoint.tensors import TensorEntry, read_tensor_table, unpacked_elements
from shortllm.records import ModelInfo, SpecialToken

SAMPLE_BYTES = 4096
"""Bytes that go into a checkpoint's fingerprint at each sampled place."""

SAMPLE_STEP = 2**20
"""Distance of the sampled places in a file, besides both ends of each tensor."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory that `from_pretrained` loads, seen without building the model."""

    id: str
    """Hub id or directory, as the user gave it."""
    directory: Path
    revision: str | None
    raw_config: dict[str, Any]
    """config.json as it is in the file, except for `special_tokens`."""
    config: Any
    """The Hugging Face config object, with every default filled in."""
    tensors: dict[str, TensorEntry]
    special_tokens: dict[SpecialToken, int] = field(default_factory=dict)
    """Token ids that replace those in the files, e.g. `{"bos": 1}`."""

    @property
    def model_type(self) -> str:
        """The type that config.json names."""
        return str(self.config.model_type)

    @property
    def block_count(self) -> int:
        """Blocks of the (text) decoder."""
        return block_count(self.config)

    @cached_property
    def structure(self) -> BlockStructure:
        """The blocks of the model that the config describes."""
        return block_structure(self.config)

    @cached_property
    def block_names(self) -> BlockNames:
        """Which tensor names belong to which block."""

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
        """Stored elements, packed ones counted singly; tied tensors are stored once."""
        return sum(self.elements.values())

    @cached_property
    def elements(self) -> dict[str, int]:
        """How many parameters each stored tensor represents."""
        return unpacked_elements(self.tensors, self.raw_config)

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.bytes for entry in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config, the tensor table, and samples of the data.

        The samples are both ends of every tensor and 4 KiB of every MiB of each file, so a
        retrained or repaired copy differs, but a large model need not be read as a whole.
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
    """Start and length of the samples for the fingerprint, by file of weights."""
    places: dict[Path, set[tuple[int, int]]] = {}
    spans: dict[Path, tuple[int, int]] = {}
    for entry in entries:
        found = places.setdefault(entry.file, set())
        if entry.offset is None:  # the place of the data in a pickled file is not known
            size = entry.file.stat().st_size
            spans[entry.file] = (0, size)
            # such a file ends with a checksum of each tensor
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

    Reads only config and tensor headers. The text `embedded` always means the built-in model; a
    directory of that name is `./embedded`.

    Args:
        source: a directory or a Hub id, also as `MODEL@REVISION`.
        revision: branch, tag or commit of a Hub id.
        special_tokens: correct ids of `bos`, `eos`, `unk`, `pad`, if the files name wrong ones.
    Returns:
        Its config and tensor table, by which all stages read it.
    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        UnsupportedModelError: not a decoder-only causal language model that transformers knows, or
            one with code of its own that is not allowed.
    """
    source, revision = named_revision(source, revision)
    directory, commit = locate(source, revision)
    raw_config, config = checked_config(str(source), directory)
    tensors = read_tensor_table(directory)
    special = dict(special_tokens or {})
    raw_config = raw_config | token_ids(special)
    for name, number in token_ids(special).items():
        setattr(config, name, number)
    return Checkpoint(str(source), directory, commit, raw_config, config, tensors, special)


def token_ids(special_tokens: Mapping[SpecialToken, int]) -> dict[str, int]:
    """Special tokens under the names of config files, e.g. `{"bos_token_id": 1}`, without `unk`."""
    return {f"{kind}_token_id": number for kind, number in special_tokens.items() if kind != "unk"}
