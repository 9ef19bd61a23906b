"""Prediction heads (multi-token prediction): what a checkpoint stores to draft further tokens.

transformers builds none of them with the model. They are stored in one of two forms:

under their own name    mtp.layers.0.mlp.up_proj.weight, model.mtp_block.0.norm.weight
as further blocks       model.layers.61.eh_proj.weight, of a model of 61 blocks

Fields of config.json that count or describe them have `mtp` or `nextn` in their names too.
"""

from __future__ import annotations

import re
from typing import Any

NAMED = re.compile(r"(?<![a-z])(mtp|nextn)(?![a-z])", re.IGNORECASE)
"""What names of tensors and of config fields say of prediction heads."""

COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Config fields that count prediction heads."""


def speaks_of_heads(name: str) -> bool:
    """Whether the name of a tensor or of a config field says that it is of a prediction head."""
    return NAMED.search(name) is not None


def head_count(text: Any) -> int:
    """How many prediction heads a text decoder's config object counts."""
    counts = (getattr(text, field, None) for field in COUNTS)
    return max((count for count in counts if isinstance(count, int)), default=0)


def head_fields(raw: Any) -> list[str]:
    """The fields that speak of prediction heads in the content of a JSON file, at any depth."""
    if isinstance(raw, list):
        return [field for one in raw for field in head_fields(one)]
    if not isinstance(raw, dict):
        return []
    inner = [field for key, one in raw.items() for field in head_fields(one)]
    return [*filter(speaks_of_heads, raw), *inner]


def without_heads(raw: Any) -> Any:
    """The content of a JSON file without fields and listed names that speak of prediction heads."""
    if isinstance(raw, dict):
        return {key: without_heads(one) for key, one in raw.items() if not speaks_of_heads(key)}
    if isinstance(raw, list):
        named = (one for one in raw if not (isinstance(one, str) and speaks_of_heads(one)))
        return [without_heads(one) for one in named]
    return raw


def fields_set_to_none(text_class: type) -> dict[str, int]:
    """Counts that a config class sets where the file has none, by their names in a file -> 0."""
    names = getattr(text_class, "attribute_map", {})
    return {
        names.get(name, name): type(default)(0)
        for name, default in ((name, getattr(text_class, name)) for name in dir(text_class))
        if speaks_of_heads(name) and isinstance(default, int) and default
    }


def place_of(name: str) -> str:
    """Where a head with a name of its own is stored: `model.mtp_block` for one of its tensors."""
    start, found, rest = re.split(NAMED, name, maxsplit=1)
    return start + found + rest.partition(".")[0]
