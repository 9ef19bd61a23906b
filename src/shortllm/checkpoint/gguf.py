"""GGUF files as checkpoints: dequantized once into a cache, then opened like any directory.

    model.gguf, directory/model.gguf, OWNER/MODEL:model.gguf (a file of a Hub repository)

The cached copy is what `save_pretrained` writes: config, bfloat16 safetensors, tokenizer, chat
template. Its config.json names the file and its sha256 under `gguf`. Transformers reads only a part
of the metadata; `supplement` adds to the config what changes the computation, and `_unread` refuses
what neither of them covers.

    ~/.cache/shortllm/gguf/model-0123456789ab/    or below SHORTLLM_CACHE
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections import Counter
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock
from pydantic import ValidationError

from shortllm.checkpoint.tensors import read_json, write_json
from shortllm.errors import (
    CheckpointError,
    ShortLLMError,
    UnsupportedModelError,
    first_line_of,
)
from shortllm.files import fingerprint, partial_directory, require_writable
from shortllm.format import in_bytes
from shortllm.records import GgufOrigin
from shortllm.runtime import available_memory, quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader

log = logging.getLogger(__name__)

SUFFIX = ".gguf"

OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
"""Types that the converter of llama.cpp writes matrices in."""

ORIGIN = "gguf"
"""Key in the cached config.json that names the file the weights come from."""

PROVENANCE_KEY = "shortllm.provenance"
"""Key in the metadata of a shortened GGUF file, with JSON as text."""

MEMORY_PER_WEIGHTS = 2
"""Memory that dequantizing takes, as a multiple of the bfloat16 weights."""

READ_BYTES = 2**22
"""Bytes per read while a file is hashed."""

FIELDS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "embedding_length": "hidden_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Setting of the architecture -> field of the config, where transformers leaves its default."""

SPLIT_BY = {
    name: (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for name, digits in {
        "llama-bpe": r"\p{N}{1,3}",
        "llama3": r"\p{N}{1,3}",
        "qwen2": r"\p{N}",
        "stablelm2": r"\p{N}",
    }.items()
}
"""Name of a way to split text before byte-pair encoding -> its regular expression."""

DIGITS_FIRST = {"codeshell", "command-r", "exaone", "refact", "smollm", "starcoder"}
"""Those that split off every digit, and then split as GPT-2 does."""

CONTROL_TOKEN, WHOLE_TOKEN = 3, 4
"""Types in `tokenizer.ggml.token_type`: special tokens, and others that are found first."""

LIKE_GPT2 = {"default", "gpt-2", "jais", "mpt", "olmo"}

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
    def heads(self) -> int:
        """Prediction heads, which are numbered as blocks after the last one."""
        return int(self.setting("nextn_predict_layers", 0))

    @property
    def blocks(self) -> int:
        """Blocks of the decoder."""
        return int(self.setting("block_count")) - self.heads

    @cached_property
    def provenance(self) -> dict[str, Any] | None:
        """The entry of the removal that wrote the file; None for others."""
        text = self.value(PROVENANCE_KEY)
        return None if text is None else json.loads(text)

    @cached_property
    def sha256(self) -> str:
        """Of the whole file; where it was dequantized before, as recorded then."""
        with suppress(OSError, ValueError):
            if known := origin_in(read_json(_cached(self.path) / "config.json")):
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
            f"GGUF files need the package {missing[0]}. Install it with: pip install "
            "'shortllm[gguf]'"
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
    if file.value("split.count", 1) > 1:
        raise CheckpointError(
            f"{path} is one part of {file.value('split.count')}. Join them first: "
            "llama-gguf-split --merge FIRST_PART JOINED"
        )
    if file.value("general.type", "model") != "model" or not file.setting("block_count"):
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
        size = sum(path.stat().st_size for path in config.parent.iterdir())
        origin = origin_in(read_json(config))
        name = config.parent.name if origin is None else origin.file
        found.append(CachedModel(directory=config.parent, file=name, bytes=size))
    return found


def clear_cache() -> int:
    """Delete the models of the cache, and unfinished ones; returns the freed bytes."""
    directory = cache_directory() / "gguf"
    freed = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    shutil.rmtree(directory, ignore_errors=True)
    return freed


def _cached(path: Path) -> Path:
    """Where the cache has the model of a file, if it was not moved or changed since."""
    state = path.stat()
    key = fingerprint([str(path.resolve()), state.st_size, state.st_mtime_ns])[:12]
    return cache_directory() / "gguf" / f"{path.stem}-{key}"


def dequantized(path: Path) -> Path:
    """The directory in the cache with the model of a GGUF file, written if it is missing.

    A file that was moved or changed since is dequantized again.
    """
    target = _cached(path)
    if (target / "config.json").is_file():
        return target
    file = read_gguf(path)
    require_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # another process may be at it: wait for its result
        if (target / "config.json").is_file():
            return target
        needed = 2 * file.parameters
        _require_memory(file, MEMORY_PER_WEIGHTS * needed)
        require_writable(target.parent, needed)
        log.info(
            "dequantizing %s (%s) into %s, %s", path.name, ", ".join(file.types), target,
            in_bytes(needed),
        )  # fmt: skip
        with partial_directory(target, needed_bytes=needed) as directory:
            _dequantize(file, directory)
    return target


def _require_memory(file: GgufFile, needed: int) -> None:
    import torch

    free = available_memory(torch.device("cpu"))
    if free is not None and free < needed:
        raise CheckpointError(
            f"dequantizing {file.path} needs {in_bytes(needed)} of memory, {in_bytes(free)} are "
            "free. Use a machine with more memory, or the model's safetensors"
        )


def _dequantize(file: GgufFile, directory: Path) -> None:
    """Write the model of a GGUF file as a checkpoint, its config as in config.json at the end."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.path.name, "local_files_only": True}
    try:
        with quiet_transformers(), redirect_stderr(io.StringIO()):  # a bar of its own
            config = AutoConfig.from_pretrained(file.path.parent, **where)
            supplement(config, file)
            model, loading = AutoModelForCausalLM.from_pretrained(
                file.path.parent,
                config=config,
                dtype=torch.bfloat16,
                output_loading_info=True,
                **where,
            )
            tokenizer = AutoTokenizer.from_pretrained(file.path.parent, **where)
    except (KeyError, NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(
            f"transformers cannot dequantize {file.path} (architecture '{file.architecture}'): "
            f"{first_line_of(error)}. Give the model's safetensors. Blocks can be removed from the "
            "GGUF file itself: shortllm prune --blocks ... --out NAME.gguf"
        ) from error
    _require_complete(file, model, loading)
    model.hf_quantizer = None  # the weights are plain tensors now
    vars(model.config).pop("quantization_config", None)
    model.generation_config.eos_token_id = end_tokens(file) or None
    with quiet_transformers():
        model.save_pretrained(directory)
        _tokenizer(file, tokenizer).save_pretrained(directory)
    origin = GgufOrigin(file=file.path.name, sha256=file.sha256, types=file.types)
    written = read_json(directory / "config.json") | {ORIGIN: origin.model_dump()}
    written.pop("_model_name_or_path", None)
    if file.provenance is not None:
        written["shortllm"] = file.provenance
    write_json(directory / "config.json", written)


def _require_complete(file: GgufFile, model: Any, loading: dict[str, Any]) -> None:
    """Refuse a model that lacks tensors of the file, or got random ones."""
    missing = sorted(loading["missing_keys"])
    held = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in model.parameters()}.values())
    if missing or held != file.parameters:
        example = f"; '{missing[0]}' is missing" if missing else ""
        raise UnsupportedModelError(
            f"transformers reads {held:,} of the {file.parameters:,} parameters of {file.path}"
            f"{example}. Give the model's safetensors instead"
        )


# ---- what transformers does not read, or reads incorrectly


def _tokenizer(file: GgufFile, converted: Any) -> Any:
    """The tokenizer that splits text as llama.cpp does, from what transformers made of it."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    start = "tokenizer.ggml."
    kind, split = file.value(start + "model"), file.value(start + "pre")
    if kind == "llama":
        backend = _sentencepiece(file)
    else:
        backend = converted.backend_tokenizer
        _split_text(backend, str(split), file.path)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special: dict[str, str] = {}
    for name, stored in names.items():
        number = file.value(f"{start}{stored}_token_id")
        if number is not None:
            special[f"{name}_token"] = backend.id_to_token(number)
    if file.value(start + "add_bos_token", kind == "llama" or split in ("llama3", "llama-bpe")):
        bos = (special["bos_token"], file.value(start + "bos_token_id"))
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _split_text(backend: Any, split: str, path: Path) -> None:
    """Split text before byte-pair encoding in the way that the file names."""
    from tokenizers import Regex, pre_tokenizers

    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if split in SPLIT_BY:
        first = pre_tokenizers.Split(Regex(SPLIT_BY[split]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, by_bytes])
    elif split in DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif split not in LIKE_GPT2:
        log.warning("%s: its way to split text, '%s', may be read inexactly", path, split)


def _sentencepiece(file: GgufFile) -> Any:
    """A byte-pair tokenizer of sentencepiece: of two neighbours that make a piece, those that make
    the one with the highest score are merged first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    start, mark = "tokenizer.ggml.", "\N{LOWER ONE EIGHTH BLOCK}"
    types = file.value(start + "token_type")
    pieces = [
        piece.replace(" ", mark) if not piece.strip(" ") else piece
        for piece in file.value(start + "tokens")
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    control, whole = (
        [piece for piece, kind in zip(pieces, types, strict=True) if kind == wanted]
        for wanted in (CONTROL_TOKEN, WHOLE_TOKEN)
    )
    scores = dict(zip(pieces, file.value(start + "scores"), strict=True))
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores, {*control, *whole}),
            unk_token=pieces[file.value(start + "unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    backend.add_tokens([AddedToken(piece, normalized=True) for piece in whole])
    prefixed = file.value(start + "add_space_prefix", True)
    normal = [normalizers.Prepend(mark)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", mark)])
    read = [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*read, decoders.Strip(" ", 1, 0)] if prefixed else read)
    return backend


def end_tokens(file: GgufFile) -> list[int]:
    """The tokens that end an answer."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [file.value(f"tokenizer.ggml.{name}") for name in names]
    return sorted({token for token in found if token is not None})


def supplement(config: Any, file: GgufFile) -> None:
    """Add to a config what the file says and transformers does not read from it."""
    for name in ("bos", "eos", "padding"):
        token = file.value(f"tokenizer.ggml.{name}_token_id")
        setattr(config, f"{name.removesuffix('ding')}_token_id", token)
    for setting, field in FIELDS.items():
        value = file.setting(setting)
        if value is not None and hasattr(config, field) and not isinstance(value, list):
            setattr(config, field, value or None)  # a window of 0 is none
    scaling = _rope_scaling(config, file)
    by_kind = config.rope_parameters.get("full_attention", config.rope_parameters)
    by_kind.update(scaling)
    blocks, usual = file.setting("block_count"), SCALED_BY_COUNT.get(file.architecture)
    if usual is not None:
        whole = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = whole if blocks == usual else config.head_dim


def _rope_scaling(config: Any, file: GgufFile) -> dict[str, Any]:
    """The entries of `rope_parameters` for the file's rotary position code."""
    found: dict[str, Any] = {}
    rotated, width = file.setting("rope.dimension_count"), getattr(config, "head_dim", None)
    if rotated is not None and width and rotated < width:
        found["partial_rotary_factor"] = rotated / width
    tables = {t.name: t.data.tolist() for t in file.reader.tensors if is_rope_table(t.name)}
    scaling = {
        key.removeprefix("rope.scaling."): value
        for key, value in file.settings.items()
        if key.startswith("rope.scaling.")
    }
    original = scaling.get("original_context_length")
    kind = scaling.get("type", "none")
    if "rope_freqs.weight" in tables:
        return found | _llama3_scaling(config, file, tables["rope_freqs.weight"])
    if "rope_factors_long.weight" in tables:
        return found | {
            "rope_type": "longrope",
            "long_factor": tables["rope_factors_long.weight"],
            "short_factor": tables["rope_factors_short.weight"],
            "original_max_position_embeddings": original,
        }
    if kind in ("linear", "yarn"):
        found |= {"rope_type": kind, "factor": scaling["factor"]}
        if kind == "yarn":
            found["original_max_position_embeddings"] = original
            for name in ("beta_fast", "beta_slow"):
                if f"yarn_{name}" in scaling:
                    found[name] = scaling[f"yarn_{name}"]
    elif kind != "none":
        raise UnsupportedModelError(
            f"{file.path} scales its rotary positions by '{kind}', for which there is no rule. "
            "Give the model's safetensors instead"
        )
    return found


def _llama3_scaling(config: Any, file: GgufFile, factors: list[float]) -> dict[str, Any]:
    """The scaling of Llama 3.1, of which the file has only the resulting factors."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": max(factors),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = config.rope_parameters["rope_theta"]
    steps = torch.arange(len(factors), dtype=torch.float64) / len(factors)
    trial = type(config).from_dict(config.to_dict())
    trial.rope_parameters = {**config.rope_parameters, **scaling}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, torch.device("cpu"))
    expected = 1 / (base**steps * torch.tensor(factors, dtype=torch.float64))
    if not torch.allclose(frequencies.double(), expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{file.path} scales its rotary positions by factors that are not Llama 3's. Give the "
            "model's safetensors instead"
        )
    return scaling
