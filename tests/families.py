"""Tiny real models of many decoder families, which exercise what is special about each.

Six or seven blocks of width 32; where a family's blocks differ by position (sliding windows,
rotary-free blocks) the pattern is set so that it shows on sequences of 20 tokens. Matrices are
redrawn with standard deviation 0.2, norms are far from one and biases from zero: at the library's
own initialisation removing a block hardly moves the loss, and a broken test passes.

    saved("qwen2")            directory with the checkpoint, written once per process
    token_ids()               calibration ids `[3, 20]`
    build("qwen2")            the model itself, float32; `build(config)` for any other config
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from shortllm.checkpoint.source import Checkpoint, open_checkpoint
from shortllm.checkpoint.structure import auto_class, block_structure
from shortllm.criteria import Scores, resolve
from shortllm.files import overwriting
from shortllm.model.decoder import Decoder
from shortllm.model.streamed import open_streamed
from shortllm.pruning.prune import write_pruned
from shortllm.pruning.scoring import Scorer
from shortllm.pruning.search_space import score_all
from shortllm.runtime import quiet_transformers

VOCABULARY = 97
WINDOW = 5
LENGTH = 20

_DIRECTORY = tempfile.TemporaryDirectory(prefix="shortllm-families-")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}
_FALCON: dict[str, Any] = {
    **_COMMON,
    "ffn_hidden_size": 48,
    "multi_query": True,
    "bias": True,
    "new_decoder_architecture": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "attention_bias": True, "mlp_bias": True},
    "llama-tied": {**_GROUPED, "tie_word_embeddings": True},
    "mistral": {**_GROUPED, "sliding_window": WINDOW, "head_dim": 8},
    # as many experts as blocks: their numbers must not be taken for block numbers
    "mixtral": {**_GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2": {
        **_GROUPED,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 3,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        **_GROUPED,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "gemma": {**_GROUPED, "head_dim": 16},
    "gemma2": {
        **_GEMMA,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_GEMMA,
        "num_hidden_layers": 7,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
    },
    "phi": {**_COMMON, "qk_layernorm": True},
    "phi3": {**_GROUPED, "sliding_window": WINDOW, "original_max_position_embeddings": 64},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 6,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_COMMON, "use_parallel_residual": True},
    "gpt_neox-serial": {**_COMMON, "use_parallel_residual": False, "tie_word_embeddings": True},
    "opt": {**_COMMON, "ffn_dim": 48, "do_layer_norm_before": True},
    "opt-projected": {
        **_COMMON,
        "ffn_dim": 48,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 16,
    },
    "olmo2": _GROUPED,
    "smollm3": {
        **_GROUPED,
        "no_rope_layer_interval": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "granite": {
        **_GROUPED,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
    },
    "starcoder2": {**_GROUPED, "sliding_window": WINDOW},
    "falcon": _FALCON,
    "falcon-heads": {**_FALCON, "multi_query": False, "parallel_attn": False},
    "falcon-new": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": {**_FALCON, "alibi": True, "tie_word_embeddings": False},
    # their blocks return the attention weights beside the stream
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 6, "n_head": 4},
    "mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layers": 6,
        "n_heads": 4,
        "max_seq_len": 64,
    },
    "gptj": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 6,
        "n_head": 4,
        "rotary_dim": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""Variant name (`type` or `type-what`) -> arguments of the type's config class."""

REPRESENTATIVES = [
    "llama", "qwen3", "gemma3_text", "gpt2", "falcon", "mixtral", "opt-projected", "bloom",
]  # fmt: skip
"""Variants for what hardly depends on the family; the others are tested under `slow`."""

BY_TIER = [
    pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow)
    for name in VARIANTS
]


def config_of(variant: str, **changes: Any) -> Any:
    """The transformers config of a variant, with some of its arguments changed."""
    return AutoConfig.for_model(variant.split("-")[0], **{**VARIANTS[variant], **changes})


def build(source: Any, *, seed: int = 0) -> nn.Module:
    """The model of a variant name or a config object, redrawn (see the top), not training."""
    config = config_of(source) if isinstance(source, str) else source
    torch.manual_seed(seed)
    model: nn.Module = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:  # norms start at one (or at zero where one is added), biases at zero
                parameter.add_(0.3 * noise)
    return model.eval()


def save(model: nn.Module, directory: Path, **kwargs: Any) -> Path:
    """`save_pretrained` without its progress bar; returns `directory`."""
    with quiet_transformers():
        model.save_pretrained(directory, **kwargs)  # type: ignore[operator]
    return directory


@cache
def saved(variant: str) -> Path:
    """Directory of a variant's checkpoint, written at the first call. To change it, copy it."""
    return save(build(variant), Path(_DIRECTORY.name) / variant)


@cache
def opened(variant: str) -> Checkpoint:
    """The checkpoint of a variant; its tensor table and block names are found once."""
    return open_checkpoint(saved(variant))


def load(directory: Path) -> nn.Module:
    """A checkpoint as transformers itself loads it, float32, every tensor accounted for."""
    with quiet_transformers():
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        model, loading = auto_class(config).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not loading.get(kind), (kind, loading[kind])
    model.eval()
    return model  # type: ignore[no-any-return]


@cache
def loaded(variant: str) -> nn.Module:
    """The model of a variant as read from its checkpoint. Not to be changed."""
    return load(saved(variant))


def shortened(checkpoint: Checkpoint, removed: Iterable[int], target: Path, **kwargs: Any) -> Path:
    """Surgery to disk by the blocks to remove, in place of an earlier one; returns `target`."""
    gone = set(removed)
    kept = [block for block in range(checkpoint.block_count) if block not in gone]
    with overwriting():
        write_pruned(checkpoint, kept, target, **kwargs)
    return target


def by_tier(variants: Iterable[str], *more: str) -> list[Any]:
    """Parameters: the representatives and `more`; the other variants are tested under `slow`."""
    first = {*REPRESENTATIVES, *more}
    return [
        pytest.param(name, marks=() if name in first else pytest.mark.slow) for name in variants
    ]


def score(
    decoder: Decoder,
    ids_BT: Tensor,
    *names: str,
    checkpoint: Checkpoint | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    **kwargs: Any,
) -> dict[str, Scores]:
    """Scores by criteria; the checkpoint is needed for those that look at stored weights."""
    source: Any = checkpoint or SimpleNamespace(
        block_count=decoder.block_count,
        raw_config={},
        structure=block_structure(decoder.model.config),
    )
    scorer = Scorer(
        checkpoint=source, open_decoder=lambda: decoder, ids_BT=ids_BT, **kwargs
    )  # fmt: skip
    return score_all(scorer, [resolve(name, (options or {}).get(name)) for name in names])


def streamed(variant: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a variant's checkpoint with its blocks read one at a time."""
    return open_streamed(opened(variant), device=torch.device("cpu"), dtype=dtype)


def token_ids(samples: int = 3, length: int = LENGTH, *, seed: int = 7) -> Tensor:
    """Fixed random token ids `[samples, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator)
