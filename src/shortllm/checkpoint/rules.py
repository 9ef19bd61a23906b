"""What happens to each config field when blocks go: tables by field name, by type where needed.

A field can contain one entry per block (cut it), block numbers (renumber them), a count of blocks
at one end (count again), or a value derived from all of these (write the list out). The length of a
field does not tell which, so the tables go by name. A list as long as the model that no table knows
is refused, naming the field (shorten_config.py). The structural guard (surgery/apply.py) then
checks the result without any table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from shortllm.checkpoint.config import block_count
from shortllm.format import named_blocks

Kept = Sequence[int]

PER_BLOCK = {
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "attn_type_list",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "moe_intermediate_size",
    "moe_layer_freq",
    "moe_topk",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_shared_expert",
    "per_block_shapes",
    "rope_scaling_layers",
    "swiglu_limits",
    "swiglu_limits_shared",
}
"""Fields with one entry (or letter) per block, if they are lists: entries of kept blocks stay."""

BLOCK_NUMBERS = {
    "attn_layer_indices": 0,
    "cross_attention_layers": 0,
    "full_attn_idxs": 0,
    "hybrid_layer_ids": 0,
    "layers_to_transform": 0,
    "local_layer_ids": 0,
    "mlp_only_layers": 0,
    "moe_layers": 0,
    "ple_layer_ids": 1,
}
"""Fields that list block numbers -> the number of the first block: removed ones go, kept ones get
their new number."""

BLOCK_KEYS = {"per_layer_config", "pruned_heads"}
"""Tables whose keys are block numbers as text, zero-padded in some types."""

PAIRS = {"alignment_heads"}
"""Lists of pairs, of a block's number and something in that block: pairs of removed blocks go."""

LEADING = {
    "assistant_early_exit",
    "dense_mlp_idx",
    "first_k_dense_replace",
    "max_window_layers",
    "moe_layer_num_skipped",
    "moe_layer_start_index",
    "num_dense_layers",
    "num_hash_layers",
}
"""Counts of leading blocks: the new value is how many of those blocks are kept."""

LAST_OF = {"moe_layer_end_index"}
"""The number of the last block of a kind: the new value is the number of the last kept one."""

TRAILING = {"num_kv_shared_layers"}
"""Counts of trailing blocks: the new value is how many of those blocks are kept."""

PERIODS = ("attn_layer_period", "expert_layer_period", "moe_layer_interval")
"""Fields that give a pattern by its period if the type has no list: whole periods can go."""

PERIOD_OF = {
    "_sliding_window_pattern": "layer_types",
    "attn_layer_offset": "layers_block_type",
    "attn_layer_period": "layers_block_type",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "layer_group_size": "layer_types",
    "layer_switch": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "prefix_dense_sliding_window_pattern": "layer_types",
    "sliding_window_pattern": "layer_types",
}
"""Fields that give by a period what a list says in full, where a type has both -> the list."""

SLICED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
"""Endings of tensors outside the blocks that consist of equal shares, one per block -> the axis."""

NOT_PER_BLOCK = {"architectures", "keys_to_ignore_at_inference"}
"""Lists of other things whose length may equal the block count by chance."""

COUNTS = {
    "depth",
    "n_layer",
    "n_layers",
    "num_blocks",
    "num_hidden_layers",
    "num_layers",
}
"""Fields in which a part of a config, or another file, states how many blocks a model has."""

HARMLESS = {
    r"id2label|label2id|architectures": "labels and classes",
    r".*block_(size|shape|length|structure).*|.*(layer|block)s?_per_.*|.*(row|col)_block": (
        "how weights, tokens or blocks are grouped"
    ),
    r".*(token|frame|[cg]pu)_(id|idx|ind|block).*": "tokens, frames, or blocks of memory",
    r".*(layer_?norm|layer_?scale(?!s)|layer_?drop).*": "a property of all blocks",
    r".*(vision|visual|image|video|audio|speech|encoder).*|vit_.*": "blocks of another tower",
    r".*(nextn|mtp).*": "the prediction heads have numbers of their own",
    r".*_size_per_layer.*": "a width",
}
"""What is known to refer to no block of the decoder, although its name speaks of blocks or its
values look so -> what it is."""

FOLLOWERS = {"longcat_flash": {"num_hidden_layers": 2}, "xlstm": {"num_blocks": 1}}
"""Type -> further fields that follow the block count, and how often they count each block."""


def _dense_blocks_listed(config: Any, kept: Kept) -> dict[str, Any]:
    """Every n-th block has experts -> list the blocks without."""
    step = config.decoder_sparse_step
    listed = set(config.mlp_only_layers or ())
    dense = [block in listed or (block + 1) % step != 0 for block in range(block_count(config))]
    new_dense = [new for new, old in enumerate(kept) if dense[old]]
    return {"decoder_sparse_step": 1, "mlp_only_layers": new_dense}


REWRITTEN: dict[str, Callable[[Any, Kept], dict[str, Any]]] = {
    "attention_types": lambda config, kept: {
        "attention_types": [[[config.attention_layers[block] for block in kept], 1]]
    },
    "block_types": lambda config, kept: {
        "block_types": [config.block_types[block % len(config.block_types)] for block in kept]
    },
    "decoder_sparse_step": _dense_blocks_listed,
    # residuals are scaled by scale_depth / sqrt(block count)
    "scale_depth": lambda config, kept: {
        "scale_depth": config.scale_depth * math.sqrt(len(kept) / block_count(config))
    },
}
"""Fields that repeat a pattern or depend on the block count -> fields that say the same of the kept
blocks."""


BEHIND_FIRST = ("deepstack_visual_indexes",)
"""Fields of any part of a config with one entry per set of image features, of which set i enters
behind block i by its number."""

ENTRANCES: dict[str, int | None] = {"deepstack_layer_map": 1, "spatial_target_layers": None}
"""Fields next to the text decoder's config that list the blocks that image features enter: by their
numbers (None), or by pairs with the number at this place."""

Protect = Callable[[Any, Kept], dict[int, str]]
"""Function of the config and the kept blocks -> removed blocks that cannot go, and why."""


def _at(block: int, reason: str) -> Protect:
    """The first block (0) or the last one (-1) must stay."""

    def rule(config: Any, kept: Kept) -> dict[int, str]:
        number = block % block_count(config)
        return {} if kept[block] == number else {number: reason}

    return rule


def _last_attends_fully(config: Any, kept: Kept) -> dict[int, str]:
    if config.layer_types[kept[-1]] == "full_attention":
        return {}
    return {block_count(config) - 1: "the model's last block must attend to all tokens"}


def _sources(
    users: Sequence[int], source_of: Callable[[int], int], kept: Kept, reason: str
) -> dict[int, str]:
    """Removed blocks that kept ones depend on -> the reason, which names these."""
    result: dict[int, list[int]] = {}
    for block in users:
        source = source_of(block)
        if block in kept and source not in kept:
            result.setdefault(source, []).append(block)
    return {source: reason.format(named_blocks(blocks)) for source, blocks in result.items()}


def _shared_keys(config: Any, kept: Kept) -> dict[int, str]:
    count, shared = block_count(config), config.num_kv_shared_layers or 0
    kinds = config.layer_types
    own = range(count - shared)

    def source(block: int) -> int:
        return max((b for b in own if kinds[b] == kinds[block]), default=block)

    return _sources(range(count - shared, count), source, kept, "its keys and values serve {} too")


def _shared_indexer(config: Any, kept: Kept) -> dict[int, str]:
    kinds = config.indexer_types or ()

    def source(block: int) -> int:
        return max((b for b in range(block) if kinds[b] == "full"), default=block)

    users = [block for block, kind in enumerate(kinds) if kind == "shared"]
    return _sources(users, source, kept, "the tokens its indexer picks serve {} too")


def _first_hybrid(config: Any, kept: Kept) -> dict[int, str]:
    hybrid = [block for block, kind in enumerate(config.layers_block_type) if kind == "hybrid"]
    return _sources(
        hybrid, lambda block: hybrid[0], kept, "the attention weights stored in it serve {}"
    )


def _every_hybrid(config: Any, kept: Kept) -> dict[int, str]:
    reason = "it is one use of a shared attention block, which has adapters numbered by use"
    return {
        block: reason
        for block, kind in enumerate(config.layers_block_type)
        if kind == "hybrid" and block not in kept
    }


def _numbered_tables(config: Any, kept: Kept) -> dict[int, str]:
    ids = [number - BLOCK_NUMBERS["ple_layer_ids"] for number in config.ple_layer_ids or ()]
    result: dict[int, str] = {}
    for place, block in enumerate(ids):
        later = [other for other in ids[place + 1 :] if other in kept]
        if block not in kept and later:
            result[block] = (
                f"the n-gram tables of {named_blocks(later)} are hashed by how many come before"
            )
    return result


def _first_reads_text(config: Any, kept: Kept) -> dict[int, str]:
    crossing = config.cross_attention_layers or ()
    if kept[0] not in crossing:
        return {}
    reason = f"caches count the text by the first block, and block {kept[0]} reads only images"
    return {block: reason for block in range(kept[0]) if block not in crossing}


PROTECTED_BY_FIELD: dict[str, Protect] = {
    "cross_attention_layers": _first_reads_text,
    "indexer_types": _shared_indexer,
    "num_kv_shared_layers": _shared_keys,
    "ple_layer_ids": _numbered_tables,
}
PROTECTED_BY_TYPE: dict[str, Protect] = {
    "gemma4_text": _last_attends_fully,
    "gemma4_unified_text": _last_attends_fully,
    "gpt_neox_japanese": _at(-1, "only this block has a bias after its attention"),
    "modernbert-decoder": _at(0, "only this block has no norm before its attention"),
    "rwkv": _at(0, "it contains the norm after the embeddings"),
    "zamba": _first_hybrid,
    "zamba2": _every_hybrid,
    "zaya": _at(0, "only its router takes nothing from an earlier router"),
}
"""Config field, or type -> blocks that cannot go."""


_DRAFTS = "it drafts for another model, whose keys and values all of its blocks read"
_MIXES = "its blocks mix the outputs of all groups of blocks before them, by tables of their own"

REFUSED = {
    "dory": "its inner blocks run several times per token, in loops",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "inkling2_text": _MIXES,
    "inkling2_loop_text": _MIXES,
    "minimax": "its attention decay depends on block number and count",
    "beam": "its residuals are scaled by the block's number",
    "blt": "its three decoders, of bytes and patches, are not a single row of blocks",
    "diffllama": "its lambda depends on the block's number",
    "hrm_text": "its two stacks of blocks run several times per token, in cycles",
    "xlm": "its sublayers are in four lists, not in blocks",
}
"""Types whose blocks use their own number in a way no config field expresses -> the reason."""

REFUSED_IF = {
    "scale_attn_by_inverse_layer_idx": (
        "scale_attn_by_inverse_layer_idx divides attention by the block's own number"
    ),
}
"""Config fields that say the same where they are set -> the reason."""
