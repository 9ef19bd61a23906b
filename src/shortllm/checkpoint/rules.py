"""What happens to each config field when blocks go: a table by field name, never by model type.

A field can hold one entry per block (cut it), block numbers (renumber them), or a count of leading
blocks (count again). Which one a field is cannot be told from its length, so the table goes by
name. A list with one entry per block that the table does not know is refused, naming the field.
Whatever the rules produce is then checked by the structural guard (signature.py), which needs no
table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from shortllm.errors import UnsupportedModelError

PER_BLOCK = {
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "rope_scaling_layers",
}
"""Fields with one entry per block, if they hold a list: the entries of kept blocks stay."""

BLOCK_NUMBERS = {
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "kv_source_layers",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
}
"""Fields that list block numbers: removed ones go, kept ones get their new number."""

LEADING = {"first_k_dense_replace", "max_window_layers", "num_dense_layers"}
"""Counts of leading blocks: the new value is how many of those blocks are kept."""

NOT_PER_BLOCK = {"architectures", "keys_to_ignore_at_inference"}
"""Lists of other things, whose length may equal the block count by chance."""

REFUSED: dict[str, Callable[[Any], str | None]] = {
    "gpt2": lambda config: (
        "scale_attn_by_inverse_layer_idx divides attention by the block's own number"
        if config.scale_attn_by_inverse_layer_idx
        else None
    ),
    "minicpm3": lambda config: "its residual scale depends on the block count",
    "minimax": lambda config: "its attention decay depends on block number and count",
    "diffllama": lambda config: "its lambda depends on the block's number",
    "modernbert-decoder": lambda config: "its block 0 is built differently from the others",
    "rwkv": lambda config: "its blocks are rescaled by their number",
    "zamba": lambda config: "its blocks share one attention block by period",
    "zamba2": lambda config: "its blocks share attention blocks by period",
    "longcat_flash": lambda config: "its blocks hold two sublayers counted together",
}
"""Types whose blocks know their own number in a way no config field expresses: reason or None."""


def shorten_config(raw: dict[str, Any], config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """config.json of the model that keeps only the blocks `kept`.

    Args:
        raw: config.json as read; fields that do not concern blocks are carried over as they are.
        config: the same config as a transformers object, so that derived defaults are known too.
        kept: kept block numbers, ascending.
    Returns:
        A new dict; explicit lists are written where the original derived them from a period.
    Raises:
        UnsupportedModelError: no rule says how this config is shortened.
    """
    _refuse_by_type(config)
    count = config.num_hidden_layers
    removed = sorted(set(range(count)) - set(kept))
    new_number = {old: new for new, old in enumerate(kept)}
    full = config.to_dict()
    result = copy.deepcopy(raw)
    for field, value in full.items():
        if field in LEADING and isinstance(value, int):
            result[field] = sum(block < value for block in kept)
        elif field in BLOCK_NUMBERS and isinstance(value, list):
            result[field] = [new_number[block] for block in value if block in new_number]
        elif (
            isinstance(value, (list, tuple)) and len(value) == count and _per_block(field, removed)
        ):
            result[field] = [value[block] for block in kept]
    _set_count(result, config, len(kept))
    return result


def _per_block(field: str, removed: list[int]) -> bool:
    """Whether a list as long as the model holds one entry per block.

    Raises:
        UnsupportedModelError: it may, and the table does not say.
    """
    if field in NOT_PER_BLOCK or field.endswith(("_token_id", "_token_ids", "_tokens_ids")):
        return False
    if field in PER_BLOCK:
        return True
    if not removed:
        return False
    raise UnsupportedModelError(
        f"config field '{field}' has as many entries as the model has blocks, and no rule says "
        "whether it holds one per block; shortening this model type is not supported yet"
    )


def _set_count(result: dict[str, Any], config: Any, count: int) -> None:
    """Write the block count under every name the file uses for it, or else the class's own name."""
    own_name = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    names = [name for name in ("num_hidden_layers", own_name) if name in result] or [own_name]
    for name in names:
        result[name] = count


def _refuse_by_type(config: Any) -> None:
    """Types and layouts that no rule covers."""
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' wraps a text decoder in a multimodal model, "
            "which is not supported yet; give the text model alone"
        )
    reason = REFUSED.get(config.model_type, lambda config: None)(config)
    if reason:
        raise UnsupportedModelError(
            f"model type '{config.model_type}' cannot be shortened rightly: {reason}"
        )


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
