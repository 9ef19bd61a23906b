"""What the JSON files of a checkpoint say of single blocks, found by shape, and rewritten by rules.

A value can refer to blocks in these ways:

    name, pattern      "model.layers.4.mlp" and "re:.*layers\\\\.[0-3].*", also as keys (names.py)
    table of blocks    {"04": ...}: its keys are block numbers
    pairs              "alignment_heads": [[4, 1], ...]: a block and something in it
    block numbers      a list of them, or one, under a name that speaks of layers or blocks
    entry per block    a list as long as the model has blocks, or a letter for each

The tables of rules.py say what becomes of a field, names and patterns are rewritten wherever they
are, and a field that no rule covers is reported without a rule. A part of a config that has a block
count of its own (a vision tower, a draft) describes another model: its lists count its own blocks,
unless they go beyond that count, or it drafts for this model.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import Field

from shortllm.checkpoint.config import count_field, text_config
from shortllm.checkpoint.heads import speaks_of_heads
from shortllm.checkpoint.names import BlockTexts
from shortllm.checkpoint.rules import (
    BLOCK_KEYS,
    BLOCK_NUMBERS,
    COUNTS,
    ENTRANCES,
    FOLLOWERS,
    HARMLESS,
    LAST_OF,
    LEADING,
    NOT_PER_BLOCK,
    PAIRS,
    PER_BLOCK,
    PERIOD_OF,
    PERIODS,
    REWRITTEN,
    TRAILING,
    Kept,
)
from shortllm.checkpoint.shorten_config import names_tokens, text_part
from shortllm.errors import UnsupportedModelError
from shortllm.records import Record

LAYERS = re.compile(r"(?:^|[^a-z])(?:layer|block)s?(?:$|[^a-z])|(?:layer|block)(?:id|idx|ind|num)")
"""In the name of a field: it speaks of blocks."""

INDICES = re.compile(r"(?:^|_)(?:idxs?|indices|indexes)$|exit")
"""In the name of a field with numbers: it may speak of blocks."""

TARGET = re.compile(r"target|aux|accept|verifier|teacher|early_exit|hidden_state")
"""In the name of a field: it speaks of another model's blocks."""

MAPS = re.compile(r"(?:^|_)(?:from|map|source|to)s?(?:$|_)|shar(?:e|ing)")
"""In the name of a table of blocks: its values may be blocks too."""

OF_ALL = re.compile(r"per_(?:layer|block)$")
"""In the name of a field with one number: it is the same for each block."""

NUMBERS = re.compile(r"[\d\s,;:-]*\d[\d\s,;:-]*")
"""Text with nothing but numbers."""

DRAFTS = re.compile(r"draft|eagle|medusa|specul|assistant|dflash")
"""In the name of a field or file: what it describes works for this model."""

PLACES, RENUMBERED = "entry per block", "renumbered"

TABLES: tuple[tuple[Collection[str], str, str], ...] = (
    (PER_BLOCK, PLACES, "cut"),
    (BLOCK_NUMBERS, "block numbers", RENUMBERED),
    (BLOCK_KEYS, "table of blocks", RENUMBERED),
    (LEADING, "block number", "counted again"),
    (LAST_OF, "block number", "counted again"),
    (TRAILING, "block number", "counted again"),
    (REWRITTEN, "pattern of blocks", "written again"),
    (PERIOD_OF, "period", "dropped or set right"),
    (PERIODS, "period", "whole periods go"),
)
"""Fields of a text decoder's config with rules of their own, how they refer to blocks, and what
becomes of them."""

LONGEST = 60
"""Characters of a value that is shown."""

Value = TypeVar("Value")

GONE: Any = object()
"""In place of a value that speaks of removed blocks alone."""


class Reference(Record):
    """A field of a file that refers to blocks."""

    file: str
    field: str = Field(description="place in the file, e.g. `quantization_config.ignore`")
    kind: str = Field(description="name, pattern, table of blocks, pairs, block numbers, ...")
    value: str = Field(description="as JSON, cut short")
    rule: str | None = Field(description="what becomes of it; null if no rule covers it")
    problem: str = Field(default="", description="why not, where that is known")

    def __str__(self) -> str:
        """'generation_config.json: `alignment_heads` refers to blocks; no rule for it'."""
        why = f" ({self.problem})" if self.problem else ""
        said = f"{self.rule}" if self.rule else f"no rule for it{why}"
        return f"{self.file}: `{self.field}` refers to blocks; {said}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value is."""

    path: tuple[str, ...] = ()
    name: str = ""
    """Of the nearest field above that has one."""
    own: int | None = None
    """Block count of the other model that it is a part of."""
    drafts: bool = False
    """Whether that model works for this one."""
    inside: bool = False
    """Whether it belongs to one block."""
    listed: bool = False
    """Whether it is an item of a list."""

    def below(self, key: str, *, inside: bool = False) -> _Place:
        """The place of the value under a key of a dictionary."""
        name = self.name if key.isdigit() else key
        return replace(
            self,
            path=(*self.path, key),
            name=name,
            drafts=self.drafts or DRAFTS.search(key.lower()) is not None,
            inside=self.inside or inside,
            listed=False,
        )


@dataclass
class Survey:
    """Walks the content of files; what was found is in `found`."""

    texts: BlockTexts
    kept: Kept
    count: int
    config: Any
    """Of config.json, with all defaults."""
    file: str = ""
    found: dict[tuple[str, str, str | None], Reference] = field(default_factory=dict)
    _text: Any = None
    """The text decoder's part of config.json."""

    def of_config(self, raw: dict[str, Any], skip: Sequence[str]) -> dict[str, Any]:
        """config.json with new names; the fields that the rules for configs change stay."""
        self.file = "config.json"
        given = {key: value for key, value in raw.items() if key not in skip}
        self._text = text_part(given, self.config, text_config(self.config))
        result = self._table(given, _Place())
        return {**result, **{key: raw[key] for key in skip if key in raw}}

    def of_file(self, file: str, content: Any) -> Any:
        """The content of another file with new names and numbers."""
        self.file, self._text = file, None
        return self._value(content, _Place(drafts=DRAFTS.search(file.lower()) is not None))

    # ---- by shape

    def _value(self, value: Any, place: _Place) -> Any:
        if isinstance(value, dict):
            return self._table(value, place)
        if isinstance(value, list):
            return self._list(value, place)
        if isinstance(value, str):
            return self._one_text(value, place)
        if type(value) is int:
            return self._number(value, place)
        return value

    def _table(self, table: dict[str, Any], place: _Place) -> Any:
        if _is_harmless(place.name):
            return table
        if table is not self._text:
            place = self._as_part(table, place)
        numbers = self._numbers_of(table, place)
        if numbers is not None:
            return self._by_number(table, numbers, place)
        result: dict[str, Any] = {}
        for key, value in table.items():
            if table is self._text and self._is_covered(key, value, place):
                result[key] = value
                continue
            if key in ENTRANCES and self.file == "config.json" and not place.path:
                result[key] = self._report(
                    place.below(key), "block numbers", value, rule=RENUMBERED
                )
                continue
            renamed = self._renamed(key, place, key)
            below = place.below(key, inside="." in key or self.texts.renamed(key) is not None)
            new = self._value(value, below)
            if new is GONE and place.listed:
                return GONE
            if new is GONE:
                self._report(below, "name", value, problem="it names a removed block")
                new = value
            for text in renamed:
                result[text] = new
        return result

    def _list(self, values: list[Any], place: _Place) -> Any:
        if values and not place.inside and not _is_harmless(place.name):
            ruled = self._by_rule(values, place)
            if ruled is not None:
                return ruled
        result: list[Any] = []
        for value in values:
            if isinstance(value, str):
                if not self._lists_blocks(value, place):
                    result += self._renamed(value, place, values)
                    continue
                self._report(place, "block numbers", values)
            elif type(value) is int and any(isinstance(one, str) for one in values):
                self._number(value, place)
            new = value
            if isinstance(value, (dict, list)):
                new = self._value(value, replace(place, listed=True))
            if new is not GONE:
                result.append(new)
        return result

    def _one_text(self, text: str, place: _Place) -> Any:
        if self._lists_blocks(text, place):
            return self._report(place, "block numbers", text)
        if self._speaks_of_blocks(place) and self._may_count_blocks([0], place):
            if len(text) == self.count and re.fullmatch(r"[A-Z*+.|/-]{4,}", text):
                return self._report(place, PLACES, text)
        texts = self._renamed(text, place, text)
        if len(texts) > 1:
            return self._report(place, "name", text, problem="it would name other blocks too")
        return texts[0] if texts else GONE

    def _lists_blocks(self, text: str, place: _Place) -> bool:
        """Whether a text may be a list of block numbers, or of one number for each: `0,3,5`."""
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        return (
            NUMBERS.fullmatch(text) is not None
            and self._speaks_of_blocks(place)
            and self._may_count_blocks([0] if len(numbers) == self.count else numbers, place)
        )

    def _speaks_of_blocks(self, place: _Place) -> bool:
        name = _words(place.name)
        return LAYERS.search(name) is not None or "pattern" in name

    def _number(self, value: int, place: _Place) -> Any:
        name = _words(place.name)
        if place.path and place.path[-1] in COUNTS and place.own is None and not place.drafts:
            return len(self.kept) if value == self.count else value
        if place.name in LEADING and not place.inside:
            if place.own is not None:
                return value
            self._report(place, "block number", value, rule="counted again")
            return sum(block < value for block in self.kept)
        if OF_ALL.search(name) or (value == 0 and name.startswith(("n_", "num_"))):
            return value
        speaks = LAYERS.search(name) or (TARGET.search(name) and INDICES.search(name))
        if speaks and self._may_count_blocks([value], place):
            self._report(place, "block number", value)
        return value

    # ---- tables and lists of blocks

    def _as_part(self, table: dict[str, Any], place: _Place) -> _Place:
        """The place as one in another model's config, if the table is one."""
        counts = [table[name] for name in COUNTS if type(table.get(name)) is int]
        wrapped = place.path and place.path[-1] in getattr(self.config, "sub_configs", {})
        if wrapped and self.file == "config.json":
            return replace(place, own=max([self.count, *counts]))
        is_model = "model_type" in table or "architectures" in table or place.drafts
        if counts and (place.path or self.file != "config.json"):
            return (
                replace(place, own=max(counts)) if is_model or self.count not in counts else place
            )
        return place

    def _numbers_of(self, table: dict[str, Any], place: _Place) -> int | None:
        """The number of the first block, if keys of a table are block numbers."""
        keys = {int(key) for key in table if key.isdecimal()}
        ranges = {key for key in table if NUMBERS.fullmatch(key.lstrip("lL"))}
        within = any(LAYERS.search(_words(part)) for part in place.path[:-1])
        within = within and max(keys, default=0) <= self.count
        name = _words(place.name)
        speaks = place.name in BLOCK_KEYS or LAYERS.search(name)
        if not ranges or (len(keys) < len(table) and not speaks):
            return None
        every = keys in (set(range(self.count)), set(range(1, self.count + 1)))
        if place.inside or not (speaks or within or "head" in name or every and self.count > 1):
            return None
        if place.own is not None and not place.drafts and max(keys, default=0) < place.own:
            return None
        if len(keys) < len(ranges):
            self._report(place, "table of blocks", table)
            return None
        base = int(self.count in keys and 0 not in keys)
        fits = base <= min(keys) and max(keys) < self.count + base
        values = list(table.values())
        onto = MAPS.search(name) and self._may_count_blocks(values, place)
        if not (speaks and fits) or onto or place.own is not None:
            self._report(place, "table of blocks", table)
            return None
        self._report(place, "table of blocks", table, rule=RENUMBERED)
        return base

    def _by_number(self, table: dict[str, Any], base: int, place: _Place) -> dict[str, Any]:
        new_number = {old: new for new, old in enumerate(self.kept)}
        result: dict[str, Any] = {}
        for key, value in table.items():
            new = self._value(value, place.below(key, inside=True))
            if not key.isdecimal():  # of the other blocks
                result[key] = new
            elif int(key) - base in new_number:
                number = str(new_number[int(key) - base] + base)
                result[number.zfill(len(key) * key.startswith("0"))] = new
        return result

    def _by_rule(self, values: list[Any], place: _Place) -> list[Any] | None:
        """A list that refers to blocks by numbers or places, after its rule or as it is; else
        None."""
        new_number = {old: new for new, old in enumerate(self.kept)}
        name, ruled = _words(place.name), place.own is None
        speaks = LAYERS.search(name) is not None
        if all(map(_is_pair, values)):
            fits = self._may_count_blocks([one[0] for one in values], place)
            if place.name in PAIRS and ruled and not fits:
                problem = f"the model has {self.count} blocks"
                return self._report(place, "pairs", values, problem=problem)
            if not fits or not (place.name in PAIRS or speaks or "head" in name):
                return None
            if place.name not in PAIRS or not ruled:
                return self._report(place, "pairs", values)
            self._report(place, "pairs", values, rule=RENUMBERED)
            left = [[new_number[b], *rest] for b, *rest in values if b in new_number]
            return self._not_empty(left, values, place)
        numbers = place.name in BLOCK_NUMBERS or speaks or INDICES.search(name)
        if numbers and self._may_count_blocks(values, place):
            base = BLOCK_NUMBERS.get(place.name)
            if base is None or not ruled:
                return self._report(place, "block numbers", values)
            self._report(place, "block numbers", values, rule=RENUMBERED)
            some = [new_number[b - base] + base for b in values if b - base in new_number]
            return self._not_empty(some, values, place)
        names = any(self.texts.renamed(one) for one in values if isinstance(one, str))
        if speaks and len(values) == self.count and ruled and not names:
            return self._report(place, PLACES, values)
        return None

    def _not_empty(self, left: list[Any], values: list[Any], place: _Place) -> list[Any]:
        """What is left of a list: without entries it could mean all blocks."""
        if not left:
            raise UnsupportedModelError(
                f"{self.file}: `{place.name}` names only removed blocks: "
                f"{json.dumps(values)}. Choose other blocks, or delete the field"
            )
        return left

    def _may_count_blocks(self, values: Sequence[int], place: _Place) -> bool:
        """Whether numbers can be of this model's blocks, by their size and place."""
        if _is_harmless(place.name) or place.inside:
            return False
        if not all(type(one) is int and -self.count <= one <= self.count for one in values):
            return False
        if place.own is None or place.drafts or TARGET.search(_words(place.name)):
            return place.name not in COUNTS
        return max(values) > place.own

    # ---- what has a rule

    def _is_covered(self, key: str, value: Any, place: _Place) -> bool:
        """Whether the rules for configs, or the class that reads it, take care of a field of the
        text decoder's config."""
        text = text_config(self.config)
        if key in {"num_hidden_layers", count_field(text), *FOLLOWERS.get(text.model_type, {})}:
            return True
        for kind, rule in ((kind, rule) for table, kind, rule in TABLES if key in table):
            if kind == PLACES and isinstance(value, list) and 0 < len(value) < self.count:
                return False
            if value not in (None, [], {}) and (kind != PLACES or isinstance(value, (list, str))):
                self._report(place.below(key), kind, value, rule=rule)
            return True
        if key in NOT_PER_BLOCK or speaks_of_heads(key) or _is_harmless(key):
            return True
        if isinstance(value, list) and len(value) == self.count > 1 and not names_tokens(key):
            named = any(self.texts.renamed(one) for one in value if isinstance(one, str))
            if not named and not any(isinstance(one, (dict, list)) for one in value):
                self._report(place.below(key), PLACES, value)
                return True
        # the structural guard compares what the class builds
        return type(value) in (int, float, bool) and key in known_fields(text)

    def _renamed(self, text: str, place: _Place, value: Any) -> tuple[str, ...]:
        """What becomes of a text that may name blocks."""
        found = self.texts.renamed(text)
        if found is None:
            return (text,)
        problem = found.problem
        if place.own is not None and found.texts != (text,):
            problem = problem or "it is in the config of another model"
        if problem:
            self._report(place, found.kind, text, problem=problem)
            return (text,)
        self._report(place, found.kind, value, rule=RENUMBERED)
        return found.texts

    def _report(
        self, place: _Place, kind: str, value: Value, *, rule: str | None = None, problem: str = ""
    ) -> Value:
        """Note a reference, and return the value."""
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."
        found = Reference(
            file=self.file,
            field=".".join(place.path),
            kind=kind,
            value=shown,
            rule=rule,
            problem=problem,
        )
        self.found.setdefault((self.file, found.field, rule), found)
        return value


def known_fields(config: Any) -> set[str]:
    """Names of the fields that a config's class has itself."""
    names = set(inspect.signature(type(config).__init__).parameters)
    if dataclasses.is_dataclass(config):
        names |= {one.name for one in dataclasses.fields(config)}
    return names | set(type(config).attribute_map)


def _words(name: str) -> str:
    """A name with its words apart, in small letters."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _is_harmless(name: str) -> bool:
    return any(re.fullmatch(one, name.lower()) for one in HARMLESS)


def _is_pair(value: Any) -> bool:
    """Whether it is a number and something."""
    return isinstance(value, list) and len(value) > 1 and type(value[0]) is int
