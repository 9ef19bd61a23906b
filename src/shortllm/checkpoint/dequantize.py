"""Dequantize a GGUF file once into the cache, from where it is a checkpoint like any other.

    model.gguf, directory/model.gguf, OWNER/MODEL:model.gguf (a file of a Hub repository)

The copy is what `save_pretrained` writes: config, bfloat16 safetensors, tokenizer, chat template.
Its config.json names the file and its sha256 under `gguf`. transformers dequantizes the tensors. It
reads only a part of the metadata, and splits text in its own way: what changes the computation is
added to the config here, and the tokenizer is corrected. A file of which transformers would drop
tensors is refused.
"""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from filelock import FileLock

from shortllm.checkpoint.gguf import (
    ORIGIN,
    SCALED_BY_COUNT,
    GgufFile,
    cached_directory,
    is_rope_table,
    read_gguf,
)
from shortllm.checkpoint.tensors import read_json, write_json
from shortllm.errors import (
    CheckpointError,
    ShortLLMError,
    UnsupportedModelError,
    first_line_of,
)
from shortllm.files import (
    follow_umask,
    partial_directory,
    require_writable,
    translate_os_errors,
)
from shortllm.format import in_bytes
from shortllm.records import GgufOrigin
from shortllm.runtime import available_memory, quiet_transformers

log = logging.getLogger(__name__)

MEMORY_PER_WEIGHTS = 3
"""Memory that dequantizing takes, as a multiple of the bfloat16 weights."""

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

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_BY = {
    "llama-bpe": WORDS.replace("NUMBERS", r"\p{N}{1,3}"),
    "llama3": WORDS.replace("NUMBERS", r"\p{N}{1,3}"),
    "qwen2": WORDS.replace("NUMBERS", r"\p{N}"),
    "stablelm2": WORDS.replace("NUMBERS", r"\p{N}"),
}
"""Name of a way to split text before byte-pair encoding -> its regular expression."""

WHOLE_WORDS = {"llama-bpe", "llama3"}
"""Ways where a word that is a token is not merged from its parts; text begins with BOS."""

DIGITS_FIRST = {"codeshell", "command-r", "exaone", "refact", "smollm", "starcoder"}
"""Those that split off every digit, and then split as GPT-2 does."""

LIKE_GPT2 = {"default", "gpt-2", "jais", "mpt", "olmo"}

CONTROL_TOKEN, WHOLE_TOKEN = 3, 4
"""Types in `tokenizer.ggml.token_type`: special tokens, and others that are found first."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in pieces of sentencepiece."""

DEFAULT_TOKENS = {"bos": 1, "eos": 2, "unknown": 0}
"""Special tokens of a sentencepiece vocabulary that names none, as in llama.cpp."""


def dequantized(path: Path) -> Path:
    """The directory in the cache with the model of a GGUF file, written if it is missing.

    A file that was moved or changed since is dequantized again.
    """
    target = cached_directory(path)
    if (target / "config.json").is_file():
        return target
    file = read_gguf(path)
    with translate_os_errors(target.parent, hint="set SHORTLLM_CACHE to another directory"):
        target.parent.mkdir(parents=True, exist_ok=True)
    # wait for a process that is writing it
    with FileLock(target.with_name(target.name + ".lock")):
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
            follow_umask(directory)
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
    from transformers import AutoConfig, AutoModelForCausalLM

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
            tokenizer = tokenizer_of(file)
    except ShortLLMError:
        raise
    except Exception as error:  # readers of architectures raise whatever a file leads to
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
        tokenizer.save_pretrained(directory)
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


def tokenizer_of(file: GgufFile) -> Any:
    """The tokenizer of the file, built from its vocabulary: it splits text as llama.cpp does."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    start = "tokenizer.ggml."
    kind, split = file.value(start + "model"), file.value(start + "pre") or "default"
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{file.path} has a tokenizer of the kind '{kind}', for which there is no rule. Give "
            "the model's safetensors instead"
        )
    backend = _sentencepiece(file) if kind == "llama" else _byte_pairs(file, split)
    defaults = DEFAULT_TOKENS if kind == "llama" else {}
    special: dict[str, str] = {}
    for name, stored in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = file.value(f"{start}{stored}_token_id", defaults.get(stored))
        if number is not None and backend.id_to_token(number) is not None:
            special[f"{name}_token"] = backend.id_to_token(number)
    begins = file.value(start + "add_bos_token", kind == "llama" or split in WHOLE_WORDS)
    if begins and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_pairs(file: GgufFile, split: str) -> Any:
    """A byte-level tokenizer by the stored merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = file.value("tokenizer.ggml.tokens")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(one.split(" ", 1)) for one in file.value("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split in WHOLE_WORDS))
    if split in SPLIT_BY:
        words = pre_tokenizers.Split(Regex(SPLIT_BY[split]), "isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, by_bytes])
    else:
        if split not in DIGITS_FIRST | LIKE_GPT2:
            log.warning("%s splits text by '%s', which may be read inexactly", file.path, split)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split in DIGITS_FIRST else []
        like_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, like_gpt2])
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, file, pieces)
    return backend


def _sentencepiece(file: GgufFile) -> Any:
    """A byte-pair tokenizer of sentencepiece: of two neighbours that make a piece, those that make
    the one with the highest score are merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    start = "tokenizer.ggml."
    pieces = [
        piece.replace(" ", SPACE) if not piece.strip(" ") else piece
        for piece in file.value(start + "tokens")
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    scores = dict(zip(pieces, file.value(start + "scores"), strict=True))
    whole = {piece for piece, _ in _marked(file, pieces)}
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores, whole),
            unk_token=pieces[file.value(start + "unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = file.value(start + "add_space_prefix", True)
    normal = [normalizers.Prepend(SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*normal, normalizers.Replace(" ", SPACE)])
    read = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*read, decoders.Strip(" ", 1, 0)] if prefixed else read)
    _add_tokens(backend, file, pieces)
    return backend


def _marked(file: GgufFile, pieces: list[str]) -> list[tuple[str, int]]:
    """The special tokens and others that are found before anything is merged, with their types."""
    types = file.value("tokenizer.ggml.token_type") or []
    return [
        (piece, kind)
        for piece, kind in zip(pieces, types, strict=False)
        if kind in (CONTROL_TOKEN, WHOLE_TOKEN)
    ]


def _add_tokens(backend: Any, file: GgufFile, pieces: list[str]) -> None:
    from tokenizers import AddedToken

    for piece, kind in _marked(file, pieces):
        special = kind == CONTROL_TOKEN
        token = AddedToken(piece, special=special, normalized=not special)
        (backend.add_special_tokens if special else backend.add_tokens)([token])


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
    if rope := getattr(config, "rope_parameters", None):
        rope.get("full_attention", rope).update(_rope_scaling(config, file))
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
