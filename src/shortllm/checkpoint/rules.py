"""What happens to each config field when blocks go: tables by field name, by type where needed.

A field can hold one entry per block (cut it), block numbers (renumber them), a count of blocks at
one end (count again), or something computed from all of these (write the list out). Which one a
field is cannot be told from its length, so the tables go by name. A list with one entry per block
that no table knows is refused, naming the field. Whatever the rules produce is then checked by the
structural guard (signature.py), which needs no table.

In a multimodal model the fields of the text decoder are changed and all others carried along.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from shortllm.errors import UnsupportedModelError
from shortllm.model.blocks import DECODER_COUNTS, block_count, count_field, text_config

Kept = Sequence[int]

PER_BLOCK = {
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "moe_layer_freq",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "per_block_shapes",
    "rope_scaling_layers",
    "swiglu_limits",
    "swiglu_limits_shared",
}
"""Fields with one entry (or letter) per block, if they hold a list: entries of kept blocks stay."""

BLOCK_NUMBERS = {
    "attn_layer_indices": 0,
    "cross_attention_layers": 0,
    "full_attn_idxs": 0,
    "hybrid_layer_ids": 0,
    "local_layer_ids": 0,
    "mlp_only_layers": 0,
    "moe_layers": 0,
    "ple_layer_ids": 1,
}
"""Fields that list block numbers, and the number they give the first block: removed ones go, kept
ones get their new number."""

BLOCK_KEYS = {"per_layer_config"}
"""Tables whose keys are block numbers as text, zero-padded in some types."""

LEADING = {
    "dense_mlp_idx",
    "first_k_dense_replace",
    "max_window_layers",
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
"""Fields that give a pattern by its period where the type knows no list: whole periods can go."""

PREDICTION_HEADS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Counts of the prediction heads that some checkpoints number as blocks behind the last one."""

SLICED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
"""Endings of tensors outside the blocks that hold an equal share of every block, and along which
axis."""

NOT_PER_BLOCK = {"architectures", "keys_to_ignore_at_inference"}
"""Lists of other things, whose length may equal the block count by chance."""

FOLLOWERS = {"longcat_flash": {"num_hidden_layers": 2}, "xlstm": {"num_blocks": 1}}
"""Type -> further fields that follow the block count, and how often they count each block."""


def _dense_blocks_listed(config: Any, kept: Kept) -> dict[str, Any]:
    """Every how-manieth block has experts -> the blocks without are listed."""
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
"""Fields that repeat a pattern or go with the block count -> the fields that say the same of the
kept blocks."""


def _first(reason: str) -> Callable[[Any, Kept], dict[int, str]]:
    return lambda config, kept: {} if kept[0] == 0 else {0: reason}


def _last(reason: str) -> Callable[[Any, Kept], dict[int, str]]:
    def rule(config: Any, kept: Kept) -> dict[int, str]:
        last = block_count(config) - 1
        return {} if kept[-1] == last else {last: reason}

    return rule


def _last_attends_fully(config: Any, kept: Kept) -> dict[int, str]:
    if config.layer_types[kept[-1]] == "full_attention":
        return {}
    return {block_count(config) - 1: "the model's last block must attend to all tokens"}


def _sources(
    users: Sequence[int], source_of: Callable[[int], int], kept: Kept, reason: str
) -> dict[int, str]:
    """Removed blocks that kept ones depend on, with those named in the reason."""
    result: dict[int, list[int]] = {}
    for block in users:
        source = source_of(block)
        if block in kept and source not in kept:
            result.setdefault(source, []).append(block)
    return {source: reason.format(", ".join(map(str, blocks))) for source, blocks in result.items()}


def _shared_keys(config: Any, kept: Kept) -> dict[int, str]:
    count, shared = block_count(config), config.num_kv_shared_layers or 0
    kinds = config.layer_types
    own = range(count - shared)

    def source(block: int) -> int:
        return max((b for b in own if kinds[b] == kinds[block]), default=block)

    return _sources(
        range(count - shared, count), source, kept, "its keys and values serve blocks {} too"
    )


def _shared_indexer(config: Any, kept: Kept) -> dict[int, str]:
    kinds = config.indexer_types or ()

    def source(block: int) -> int:
        return max((b for b in range(block) if kinds[b] == "full"), default=block)

    users = [block for block, kind in enumerate(kinds) if kind == "shared"]
    return _sources(users, source, kept, "the tokens its indexer picks serve blocks {} too")


def _first_hybrid(config: Any, kept: Kept) -> dict[int, str]:
    hybrid = [block for block, kind in enumerate(config.layers_block_type) if kind == "hybrid"]
    return _sources(
        hybrid, lambda block: hybrid[0], kept, "the attention weights stored in it serve blocks {}"
    )


def _every_hybrid(config: Any, kept: Kept) -> dict[int, str]:
    reason = "it is one use of a shared attention block, which holds adapters numbered by use"
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
            named = ", ".join(map(str, later))
            result[block] = (
                f"the n-gram tables of blocks {named} are hashed by how many come before"
            )
    return result


def _first_reads_text(config: Any, kept: Kept) -> dict[int, str]:
    crossing = config.cross_attention_layers or ()
    if kept[0] not in crossing:
        return {}
    reason = f"caches count the text by the first block, and block {kept[0]} reads images alone"
    return {block: reason for block in range(kept[0]) if block not in crossing}


PROTECTED_BY_FIELD: dict[str, Callable[[Any, Kept], dict[int, str]]] = {
    "cross_attention_layers": _first_reads_text,
    "indexer_types": _shared_indexer,
    "num_kv_shared_layers": _shared_keys,
    "ple_layer_ids": _numbered_tables,
}
PROTECTED_BY_TYPE: dict[str, Callable[[Any, Kept], dict[int, str]]] = {
    "gemma4_text": _last_attends_fully,
    "gemma4_unified_text": _last_attends_fully,
    "gpt_neox_japanese": _last("it alone has a bias behind its attention"),
    "modernbert-decoder": _first("it alone has no norm before its attention"),
    "rwkv": _first("it holds the norm behind the embeddings"),
    "zamba": _first_hybrid,
    "zamba2": _every_hybrid,
    "zaya": _first("its router alone takes nothing from an earlier router"),
}
"""Config field or type -> given the config and the kept blocks, the removed ones that cannot go,
with the reason."""


def _drafts(config: Any) -> str:
    return "it drafts for another model, whose keys and values all of its blocks read"


def _mixes_outputs(config: Any) -> str:
    return "its blocks mix the outputs of all groups of blocks before them, by tables of their own"


REFUSED: dict[str, Callable[[Any], str | None]] = {
    "gpt2": lambda config: (
        "scale_attn_by_inverse_layer_idx divides attention by the block's own number"
        if config.scale_attn_by_inverse_layer_idx
        else None
    ),
    "dory": lambda config: "its inner blocks run several times per token, in loops",
    "gemma4_assistant": _drafts,
    "gemma4_unified_assistant": _drafts,
    "inkling2_text": _mixes_outputs,
    "inkling2_loop_text": _mixes_outputs,
    "minimax": lambda config: "its attention decay depends on block number and count",
    "beam": lambda config: "its residuals are scaled by the block's number",
    "blt": lambda config: "its three decoders, of bytes and patches, are no single row of blocks",
    "diffllama": lambda config: "its lambda depends on the block's number",
    "hrm_text": lambda config: "its two stacks of blocks run several times per token, in cycles",
    "xlm": lambda config: "its sublayers stand in four lists, not in blocks",
}
"""Types whose blocks know their own number in a way no config field expresses: reason or None."""


def shorten_config(
    raw: dict[str, Any], config: Any, kept: Kept, *, heads: int = 0
) -> dict[str, Any]:
    """config.json of the model that keeps only the blocks `kept`.

    Args:
        raw: config.json as read; fields that do not concern blocks are carried over as they are.
        config: the same config as a transformers object, so that derived defaults are known too.
        kept: kept block numbers, ascending.
        heads: prediction heads stored behind the last block, which go.
    Returns:
        A new dict; explicit lists are written where the original derived them from a period.
    Raises:
        UnsupportedModelError: no rule says how this config is shortened.
    """
    refuse_type(config)
    result = copy.deepcopy(raw)
    text = text_config(config)
    part = _text_part(result, config, text)
    part.update(_shortened_fields(dict(part), text, kept))
    part.update(_counts(part, text, len(kept)))
    if heads:
        part.update({field: 0 for field in PREDICTION_HEADS if hasattr(text, field)})
    return result


def _text_part(raw: dict[str, Any], config: Any, text: Any) -> dict[str, Any]:
    """The part of config.json that describes the text decoder, in place.

    Older multimodal configs hold its fields at the top.
    """
    if text is config:
        return raw
    key = next(name for name in config.sub_configs if getattr(config, name, None) is text)
    if raw.get(key) is None and count_field(text) in raw:
        return raw
    if raw.get(key) is None:
        raw[key] = {"model_type": text.model_type}
    return raw[key]  # type: ignore[no-any-return]


def _shortened_fields(raw: dict[str, Any], config: Any, kept: Kept) -> dict[str, Any]:
    """The changed fields, by the tables."""
    count = block_count(config)
    new_number = {old: new for new, old in enumerate(kept)}
    result: dict[str, Any] = {}
    for field, value in {**raw, **config.to_dict()}.items():
        if field in LEADING and isinstance(value, int):
            result[field] = sum(block < value for block in kept)
        elif field in LAST_OF and isinstance(value, int):
            result[field] = sum(block <= value for block in kept) - 1
        elif field in TRAILING and isinstance(value, int):
            result[field] = sum(block >= count - value for block in kept)
        elif field in BLOCK_NUMBERS and isinstance(value, (list, tuple)):
            base = BLOCK_NUMBERS[field]
            numbers = [new_number[b - base] + base for b in value if b - base in new_number]
            result[field] = numbers
        elif field in BLOCK_KEYS and field in raw and isinstance(raw[field], dict):
            result[field] = {
                str(new_number[int(key)]).zfill(len(key)): entry
                for key, entry in raw[field].items()
                if int(key) in new_number
            }
        elif _per_block(field, value, count, removed=len(kept) < count):
            cut = [value[block] for block in kept]
            result[field] = "".join(cut) if isinstance(value, str) else cut
    for field, rule in REWRITTEN.items():
        if getattr(config, field, None) is not None:
            result |= rule(config, kept)
    return result


def _per_block(field: str, value: Any, count: int, *, removed: bool) -> bool:
    """Whether a field holds one entry per block, as the table says of its name.

    Raises:
        UnsupportedModelError: it is a list as long as the model, and the table does not say.
    """
    if field in PER_BLOCK:
        return isinstance(value, (list, tuple, str)) and len(value) == count
    if not isinstance(value, (list, tuple)) or len(value) != count or not removed:
        return False
    if field in NOT_PER_BLOCK or field.endswith(("_token_id", "_token_ids", "_tokens_ids")):
        return False
    raise UnsupportedModelError(
        f"config field '{field}' has as many entries as the model has blocks, and no rule says "
        "whether it holds one per block; shortening this model type is not supported yet"
    )


def _counts(raw: dict[str, Any], config: Any, count: int) -> dict[str, int]:
    """The block count under every name the file uses for it, or else the class's own name."""
    own = count_field(config)
    names = ["num_hidden_layers", own]
    if own in DECODER_COUNTS or config.model_type in FOLLOWERS:
        names = [own]
    counts = dict.fromkeys([name for name in names if name in raw] or [own], count)
    followers = FOLLOWERS.get(config.model_type, {})
    return counts | {field: factor * count for field, factor in followers.items()}


def prediction_heads(config: Any) -> int:
    """How many prediction heads a checkpoint of this config may hold behind its last block."""
    text = text_config(config)
    counts = (getattr(text, field, None) for field in PREDICTION_HEADS)
    return max((count for count in counts if isinstance(count, int)), default=0)


def refuse_type(config: Any) -> None:
    """Refuse types that no rule covers.

    Raises:
        UnsupportedModelError: with the reason.
    """
    for part in (config, text_config(config)):
        reason = REFUSED.get(part.model_type, lambda config: None)(part)
        if reason:
            raise UnsupportedModelError(
                f"model type '{part.model_type}' cannot be shortened rightly: {reason}"
            )


def _protected(config: Any, kept: Kept) -> dict[int, str]:
    """Removed blocks that cannot go while `kept` stay, with the reason."""
    rules = [rule for field, rule in PROTECTED_BY_FIELD.items() if hasattr(config, field)]
    rules += [PROTECTED_BY_TYPE[t] for t in [config.model_type] if t in PROTECTED_BY_TYPE]
    return {block: reason for rule in rules for block, reason in rule(config, kept).items()}


def structurally_protected(config: Any) -> dict[int, str]:
    """Blocks that cannot go while all others stay, with the reason: plans must avoid them.

    Args:
        config: the model's transformers config, of a multimodal model too.
    """
    text = text_config(config)
    count = block_count(config)
    found: dict[int, str] = {}
    for block in range(count if count > 1 else 0):
        found |= _protected(text, [*range(block), *range(block + 1, count)])
    return found


def refuse_protected(config: Any, kept: Kept) -> None:
    """Refuse the removal of a block that others depend on or that is built like no other.

    Raises:
        UnsupportedModelError: naming the block and the reason.
    """
    text = text_config(config)
    for block, reason in sorted(_protected(text, kept).items()):
        raise UnsupportedModelError(
            f"block {block} of model type '{text.model_type}' cannot be removed: {reason}. "
            "Choose other blocks"
        )


def period_hint(config: Any) -> str:
    """Why single blocks cannot go where a type gives its pattern by periods alone; else empty."""
    text = text_config(config)
    periods = {field: getattr(text, field, None) for field in PERIODS}
    given = {field: value for field, value in periods.items() if isinstance(value, int)}
    length = math.lcm(*given.values())
    if length == 1:
        return ""
    fields = " and ".join(f"{field} {value}" for field, value in given.items())
    return (
        f" The type gives its pattern by {fields}, with no list of blocks: remove whole periods "
        f"of {length} blocks, with --period-aligned"
    )


def sliced_axis(name: str) -> int | None:
    """The axis along which a tensor outside the blocks holds a share of every block, or None."""
    return next((axis for ending, axis in SLICED.items() if name.endswith(ending)), None)


def refuse_block_names_in_config(raw: dict[str, Any], prefix: str) -> None:
    """Refuse configs that name single blocks in their values (exclusion lists of quantizers do).

    Raises:
        UnsupportedModelError: naming the value.
    """

    def strings(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, dict):
            return [s for key, item in value.items() for s in (key, *strings(item))]
        if isinstance(value, list):
            return [s for item in value for s in strings(item)]
        return []

    head = prefix + "."
    for text in strings(raw):
        place = text.find(head)
        if place >= 0 and text[place + len(head) :][:1].isdigit():
            raise UnsupportedModelError(
                f"config.json names a single block ('{text}'), which surgery cannot renumber yet"
            )
