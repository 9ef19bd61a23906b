"""The config of a shorter model, by the tables of rules.py, and the blocks that must not go.

In a multimodal model only the fields of the text decoder change.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from shortllm.checkpoint.config import (
    DECODER_COUNTS,
    block_count,
    count_field,
    separated_pattern,
    text_config,
)
from shortllm.checkpoint.heads import fields_set_to_none, head_count, without_heads
from shortllm.checkpoint.options import accepts_unknown_references
from shortllm.checkpoint.rules import (
    BEHIND_FIRST,
    BLOCK_KEYS,
    BLOCK_NUMBERS,
    ENTRANCES,
    FOLLOWERS,
    LAST_OF,
    LEADING,
    NOT_PER_BLOCK,
    PER_BLOCK,
    PERIOD_OF,
    PERIODS,
    PROTECTED_BY_FIELD,
    PROTECTED_BY_TYPE,
    REFUSED,
    REFUSED_IF,
    REWRITTEN,
    SLICED,
    TRAILING,
    Kept,
)
from shortllm.errors import UnsupportedModelError
from shortllm.runtime import quiet_transformers


def shorten_config(
    raw: dict[str, Any], config: Any, kept: Kept, *, heads: int = 0, drop_heads: bool = False
) -> dict[str, Any]:
    """config.json of the model that keeps only the blocks `kept`; other fields stay as they are.

    Args:
        raw: config.json as read; `config` is the same with derived defaults.
        heads: prediction heads stored behind the last block.
        drop_heads: whether nothing may speak of prediction heads; otherwise they stay.
    """
    result = copy.deepcopy(raw)
    text = text_config(config)
    part = text_part(result, config, text)
    part.update(_shortened_fields(dict(part), text, kept, heads, drop_heads=drop_heads))
    part.update(_counts(part, text, len(kept)))
    _correct_periods(part, text)
    if text is not config:
        result.update(_moved_entrances(config, kept))
    if drop_heads:
        result = without_heads(result)
        text_part(result, config, text).update(fields_set_to_none(type(text)))
    return result


def text_part(raw: dict[str, Any], config: Any, text: Any) -> dict[str, Any]:
    """The text decoder's part of config.json, in place; the top level in older configs."""
    if text is config:
        return raw
    key = next(name for name in config.sub_configs if getattr(config, name, None) is text)
    if raw.get(key) is None and count_field(text) in raw:
        return raw
    if raw.get(key) is None:
        raw[key] = {"model_type": text.model_type}
    return raw[key]  # type: ignore[no-any-return]


def _shortened_fields(
    raw: dict[str, Any], config: Any, kept: Kept, heads: int, *, drop_heads: bool
) -> dict[str, Any]:
    """The changed fields, by the tables; lists may have entries of prediction heads at the end.

    Args:
        heads: those stored behind the last block; the config may count others.
    """
    count, removed = block_count(config), len(kept) < block_count(config)
    behind = max(heads, head_count(config))
    stays = [*kept, *([] if drop_heads else range(count, count + behind))]
    new_number = {old: new for new, old in enumerate(stays)}
    result: dict[str, Any] = {}
    for field, read in {**raw, **config.to_dict()}.items():
        # a config class may cut off what is of heads
        longer = behind > 0 and _per_block(
            field, raw.get(field), count + behind, removed=removed and heads > 0
        )
        value = raw[field] if longer else read
        if field in LEADING and isinstance(value, int):
            result[field] = sum(block < value for block in kept)
        elif field in LAST_OF and isinstance(value, int):
            result[field] = sum(block <= value for block in kept) - 1
        elif field in TRAILING and isinstance(value, int):
            result[field] = sum(block >= count - value for block in kept)
        elif field in BLOCK_NUMBERS and isinstance(value, (list, tuple)):
            base = BLOCK_NUMBERS[field]
            result[field] = [new_number[b - base] + base for b in value if b - base in new_number]
        elif field in BLOCK_KEYS and field in raw and isinstance(raw[field], dict):
            result[field] = {
                str(new_number[int(key)]).zfill(len(key)): entry
                for key, entry in raw[field].items()
                if int(key) in new_number
            }
        elif longer or _per_block(field, value, count, removed=removed):
            cut = [value[block] for block in stays if block < len(value)]
            result[field] = "".join(cut) if isinstance(value, str) else cut
    for field, rule in REWRITTEN.items():
        if getattr(config, field, None) is not None:
            result |= rule(config, kept)
    return result


def _moved_entrances(config: Any, kept: Kept) -> dict[str, Any]:
    """The fields of `ENTRANCES` with the new numbers of the blocks, all of which stay."""
    new_number = {old: new for new, old in enumerate(kept)}
    result: dict[str, Any] = {}
    for field, place in ENTRANCES.items():
        if value := getattr(config, field, None):
            entries = [[entry] if place is None else list(entry) for entry in value]
            for entry in entries:
                number = entry[place or 0]
                entry[place or 0] = new_number.get(number, number)
            result[field] = [entry[0] for entry in entries] if place is None else entries
    return result


def _image_features(config: Any, kept: Kept) -> dict[int, str]:
    """Removed blocks that image features enter by number, with the reason."""
    reason = "image features enter the blocks by number ({})"
    entered: dict[int, str] = {}
    for field in BEHIND_FIRST:
        for value in _values_of(config.to_dict(), field):
            entered |= dict.fromkeys(range(len(value or ())), reason.format(field))
    for field, place in ENTRANCES.items():
        for entry in getattr(config, field, None) or ():
            entered[entry if place is None else entry[place]] = reason.format(field)
    count = block_count(config)
    return {b: why for b, why in entered.items() if b < count and b not in kept}


def _values_of(config: Any, field: str) -> Iterator[Any]:
    """What a config has under this name, also within it."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from [value] if name == field else _values_of(value, field)


def _per_block(field: str, value: Any, count: int, *, removed: bool) -> bool:
    """Whether a field has one entry per block, by the table of names; unknown lists are refused."""
    if field in PER_BLOCK and isinstance(value, str) and removed and len(value) != count:
        said = separated_pattern({field: value}) or f"{field} '{value}' has {len(value)} letters"
        raise UnsupportedModelError(
            f"the pattern in config.json cannot be shortened with the model's {count} blocks: "
            f"{said}"
        )
    if field in PER_BLOCK:
        return isinstance(value, (list, tuple, str)) and len(value) == count
    if not isinstance(value, (list, tuple)) or len(value) != count or not removed:
        return False
    if field in NOT_PER_BLOCK or names_tokens(field) or accepts_unknown_references():
        return False
    raise UnsupportedModelError(
        f"config field '{field}' has as many entries as the model has blocks, and no rule says "
        "whether it has one per block; shortening this model type is not supported yet"
    )


def names_tokens(field: str) -> bool:
    """Whether a field has token ids."""
    return field.endswith(("_token_id", "_token_ids", "_tokens_ids"))


def _correct_periods(raw: dict[str, Any], config: Any) -> None:
    """Set each period right that the list next to it does not follow any more, or drop it.

    The class of the config is asked which list it makes of a period.
    """
    for name in dict.fromkeys(PERIOD_OF.values()):
        fields = [field for field, other in PERIOD_OF.items() if other == name and field in raw]
        if not isinstance(raw.get(name), list):
            continue
        fields = [field for field in fields if not _spells(raw[field], raw[name])]
        if not fields:
            continue
        plain = {key: value for key, value in raw.items() if key != name}
        found = next(
            (
                one
                for one in _periods({field: raw[field] for field in fields}, len(raw[name]))
                if _list_of(config, {**plain, **one}, name) == raw[name]
            ),
            None,
        )
        raw.update(found or {})
        for field in fields if found is None else ():
            del raw[field]


def _spells(pattern: Any, kinds: list[Any]) -> bool:
    """Whether letters, repeated, say the kind of each block: `LLLG`."""
    if not isinstance(pattern, str) or not pattern:
        return False
    pairs = {(pattern[place % len(pattern)], str(kind)) for place, kind in enumerate(kinds)}
    return len(pairs) == len({letter for letter, _ in pairs}) == len({kind for _, kind in pairs})


def _periods(given: dict[str, Any], count: int) -> Iterator[dict[str, int]]:
    """Other values of fields with a period, none first; a file may say one under several names."""
    yield {}
    for value in dict.fromkeys(map(str, given.values())):
        for period in range(1, count + 1):
            yield {field: period for field, one in given.items() if str(one) == value}


def _list_of(config: Any, raw: dict[str, Any], name: str) -> Any:
    """The list that a config class makes of what is given; None if it makes none of it."""
    try:
        with quiet_transformers():
            # some classes write into what they are given
            return getattr(type(config).from_dict(copy.deepcopy(raw)), name, None)
    except Exception:  # config classes raise whatever their values lead to
        return None


def _counts(raw: dict[str, Any], config: Any, count: int) -> dict[str, int]:
    """The block count under every name the file uses for it, or else the class's own name."""
    own = count_field(config)
    names = ["num_hidden_layers", own]
    if own in DECODER_COUNTS or config.model_type in FOLLOWERS:
        names = [own]
    counts = dict.fromkeys([name for name in names if name in raw] or [own], count)
    followers = FOLLOWERS.get(config.model_type, {})
    return counts | {field: factor * count for field, factor in followers.items()}


def refuse_type(config: Any) -> None:
    """Refuse types whose blocks cannot be renumbered."""
    for part in (config, text_config(config)):
        reasons = [reason for field, reason in REFUSED_IF.items() if getattr(part, field, False)]
        if reason := next(iter(reasons), REFUSED.get(part.model_type)):
            raise UnsupportedModelError(
                f"model type '{part.model_type}' cannot be shortened correctly: {reason}"
            )


def _protected(config: Any, kept: Kept) -> dict[int, str]:
    """Removed blocks that cannot go while `kept` stay, with the reason."""
    text = text_config(config)
    rules = [rule for field, rule in PROTECTED_BY_FIELD.items() if hasattr(text, field)]
    rules += [PROTECTED_BY_TYPE[t] for t in [text.model_type] if t in PROTECTED_BY_TYPE]
    found = {block: reason for rule in rules for block, reason in rule(text, kept).items()}
    return found | _image_features(config, kept)


def structurally_protected(config: Any) -> dict[int, str]:
    """Blocks that cannot go while all others stay, with the reason: plans must avoid them."""
    count = block_count(config)
    found: dict[int, str] = {}
    for block in range(count if count > 1 else 0):
        found |= _protected(config, [*range(block), *range(block + 1, count)])
    return found


def refuse_protected(config: Any, kept: Kept) -> None:
    """Refuse the removal of a block that others depend on or that has a structure of its own."""
    text = text_config(config)
    for block, reason in sorted(_protected(config, kept).items()):
        raise UnsupportedModelError(
            f"block {block} of model type '{text.model_type}' cannot be removed: {reason}. "
            "Choose other blocks"
        )


def period_hint(config: Any) -> str:
    """Why single blocks cannot go if a type gives its pattern only by periods; else empty."""
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
    """The axis along which a tensor outside the blocks has a share for every block, or None."""
    return next((axis for ending, axis in SLICED.items() if name.endswith(ending)), None)
