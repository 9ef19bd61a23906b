"""GGUF files: what they say of a model, and the cache of the models that were made of them.

~/.cache/shortllm/gguf/model-0123456789ab/    or below SHORTLLM_CACHE
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from shortllm.checkpoint.tensors import read_json
from shortllm.errors import (
    CheckpointError,
    ShortLLMError,
    UnsupportedModelError,
    first_line_of,
    install_hint,
)
from shortllm.files import PARTIAL, fingerprint
from shortllm.records import GgufOrigin

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"

OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
"""Types that the converter of llama.cpp writes matrices in."""

ORIGIN = "gguf"
"""Key in the cached config.json that names the file the weights come from."""

PROVENANCE_KEY = "shortllm.provenance"
"""Key in the metadata of a shortened GGUF file, with JSON as text."""

FORMAT = 1
"""Number of the way in which models are dequantized; another one makes them again."""

READ_BYTES = 2**22
"""Bytes per read while a file is hashed."""

SCALED_BY_COUNT = {"gemma2": 46, "gemma3": 62}
"""Architecture -> the block count whose attention is scaled by width / heads, not by head size."""


# ---- the file


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: its metadata and where its tensors lie; no tensor is read."""

    path: Path
    reader: GGUFReader

    @cached_property
    def architecture(self) -> str:
        """The name of the model type in llama.cpp."""
        return str(self.value("general.architecture"))

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata."""
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def number(self, key: str, default: int) -> int:
        """A value of the metadata that counts something."""
        value = self.value(key, default)
        if type(value) is not int or value < 0:
            raise self.damaged(key, value)
        return value

    def damaged(self, key: str, value: Any) -> CheckpointError:
        """The error about a value of the metadata."""
        return CheckpointError(
            f"{self.path} is damaged: its metadata say {key} = {reprlib.repr(value)}. Download it "
            "again"
        )

    def setting(self, name: str, default: Any = None) -> Any:
        """A value of the metadata that belongs to the architecture, e.g. `block_count`."""
        return self.value(f"{self.architecture}.{name}", default)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All values of the metadata that belong to the architecture, by their short names."""
        start = self.architecture + "."
        return {
            key.removeprefix(start): field.contents()
            for key, field in self.reader.fields.items()
            if key.startswith(start)
        }

    @property
    def alignment(self) -> int:
        """Multiple of bytes at which tensors begin."""
        return int(self.reader.alignment)

    @property
    def byte_order(self) -> str:
        """`<` for little-endian, `>` for big-endian."""
        return ">" if self.reader.endianess.name == "BIG" else "<"

    @property
    def heads(self) -> int:
        """Prediction heads, which are numbered as blocks after the last one."""
        return self.number(f"{self.architecture}.nextn_predict_layers", 0)

    @property
    def blocks(self) -> int:
        """Blocks of the decoder."""
        return self.number(f"{self.architecture}.block_count", 0) - self.heads

    @cached_property
    def provenance(self) -> dict[str, Any] | None:
        """The entry of the removal that wrote the file; None for others."""
        text = self.value(PROVENANCE_KEY)
        try:
            found = None if text is None else json.loads(text)
        except (TypeError, ValueError) as error:
            raise self.damaged(PROVENANCE_KEY, text) from error
        if not isinstance(found, dict | None):
            raise self.damaged(PROVENANCE_KEY, text)
        return found

    @cached_property
    def sha256(self) -> str:
        """Of the whole file; where it was dequantized before, as recorded then."""
        with suppress(OSError, ValueError):
            if known := origin_in(read_json(cached_directory(self.path) / "config.json")):
                return known.sha256
        digest = hashlib.sha256()
        with open(self.path, "rb") as stream:
            while part := stream.read(READ_BYTES):
                digest.update(part)
        return digest.hexdigest()

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors, without tables of rotary factors."""
        return sum(int(t.n_elements) for t in self.reader.tensors if not is_rope_table(t.name))

    @property
    def types(self) -> dict[str, int]:
        """How many matrices are stored in each type."""
        found = Counter(t.tensor_type.name for t in self.reader.tensors if len(t.shape) > 1)
        return dict(found.most_common())


def is_rope_table(name: str) -> bool:
    """Whether a tensor has rotary factors, which transformers computes from the config."""
    return name.startswith(("rope_freqs", "rope_factors"))


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file; one that is damaged or not a single decoder is an error."""
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise ShortLLMError(
            f"GGUF files need the package {missing[0]}. Install it with: {install_hint('gguf')}"
        )
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        """Reads a header of 100,000 tokens in a third of the time: slices of a memmap are slow."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    with open(path, "rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    try:
        file = GgufFile(path, Reader(path))
        end = max((int(t.data_offset + t.n_bytes) for t in file.reader.tensors), default=0)
    except Exception as error:  # the reader raises whatever a damaged header leads to
        raise CheckpointError(
            f"{path} cannot be read ({first_line_of(error)}). Download it again, or install a "
            "newer gguf package: pip install --upgrade gguf"
        ) from error
    if end > path.stat().st_size:
        raise CheckpointError(f"{path} is shorter than its header says. Download it again")
    if (parts := file.number("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path} is one part of {parts}. Join them first: "
            "llama-gguf-split --merge FIRST_PART JOINED"
        )
    if file.value("general.type", "model") != "model" or file.blocks < 1:
        raise UnsupportedModelError(f"{path} does not contain a language model with blocks")
    return file


def origin_in(raw_config: dict[str, Any]) -> GgufOrigin | None:
    """The GGUF file that a checkpoint was dequantized from, by its config.json."""
    try:
        return GgufOrigin.model_validate(raw_config[ORIGIN])
    except (LookupError, ValidationError):
        return None


# ---- the cache


def cache_directory() -> Path:
    """Where dequantized models are kept: SHORTLLM_CACHE, or `shortllm` in the user's cache."""
    named = os.environ.get("SHORTLLM_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """One dequantized model of the cache."""

    directory: Path
    file: str
    """The GGUF file it was made of."""
    bytes: int


def cached_models() -> list[CachedModel]:
    """The models of the cache, by name."""
    found = []
    for config in sorted((cache_directory() / "gguf").glob("*/config.json")):
        if config.parent.name.endswith(PARTIAL):
            continue
        size = sum(path.stat().st_size for path in config.parent.iterdir())
        origin = origin_in(read_json(config))
        name = config.parent.name if origin is None else origin.file
        found.append(CachedModel(directory=config.parent, file=name, bytes=size))
    return found


def clear_cache() -> int:
    """Delete the models of the cache but those that are being written; returns the freed bytes."""
    freed = 0
    for model in cached_models():
        lock = FileLock(model.directory.with_name(model.directory.name + ".lock"), timeout=0)
        with suppress(Timeout), lock:
            shutil.rmtree(model.directory)
            freed += model.bytes
    return freed


def cached_directory(path: Path) -> Path:
    """Where the cache has the model of a file, if it was not moved or changed since."""
    state = path.stat()
    key = fingerprint([FORMAT, str(path.resolve()), state.st_size, state.st_mtime_ns])[:12]
    return cache_directory() / "gguf" / f"{path.stem}-{key}"
