"""Ways of damaging a file: its bytes, the tree of values it holds, or the text of that tree.

damaged(random, tree)        JSON text of a tree with one to three places changed
damaged_bytes(random, data)  the same for bytes that nothing is known of
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

DEEP = 100_000
"""Nesting that no recursive reader survives."""


@dataclass(frozen=True)
class Raw:
    """Text that goes into a JSON file as it is."""

    text: str


VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, -(2**31), 2**31, 2**53 + 1, 2**63, 2**64, 10**9, 10**30,
    0.0, -0.0, 0.5, 1.5, -3.25, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "1", "x", "NaN", "null", "true", "1e9", "../..", "/etc/passwd", "~", ".", "a/b",
    "\x00", "a\x00b", "\n", "\ud800", "💥", "é" * 300, "a" * 1000, "{}", "[]", "%s", "{0}",
    "__class__", "!!python/object/apply:os.system", "<script>alert(1)</script>",
    [], {}, [None], [[]], [0] * 1000, [1.5, "x"], [[1], [2]], {"": None}, {"a": {"b": {"c": []}}},
    {"0": 1}, list(range(6)), ["full_attention"] * 4, ["x"] * 4,
    Raw("1" * 5000), Raw("1e999"), Raw("-1e999"), Raw("0.1e-400"), Raw("[" * 50 + "]" * 50),
]  # fmt: skip
"""What takes the place of a value."""

BROKEN: list[Any] = [
    Raw("01"), Raw("undefined"),
    Raw("'x'"), Raw('"\\x"'), Raw('"\\ud800"'), Raw("1,"), Raw("/* */ 1"), Raw(""),
]  # fmt: skip
"""What makes a file no JSON."""

TOO_DEEP: list[Any] = [Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP)]
"""What only a hostile download contains."""

KEYS = ["", "x", "0", "-1", "__metadata__", "metadata", "a.b", "\ud800", "\x00", "k" * 500, "é"]

Place = tuple[Any, Any]
"""A list or dict, and the index or key in it."""


def places(tree: Any) -> list[Place]:
    """Every place below the top of a tree."""
    found: list[Place] = []
    stack = [tree]
    while stack:
        held = stack.pop()
        keys = held.keys() if isinstance(held, dict) else range(len(held))
        for key in list(keys):
            found.append((held, key))
            if isinstance(held[key], (dict, list)):
                stack.append(held[key])
    return found


def damaged(random: Random, tree: Any, *, values: list[Any] | None = None) -> str:
    """JSON text of a copy of `tree`, changed at one to three places.

    Args:
        values: further values to put in, tried as often as the common ones.
    """
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = damaged_tree(random, tree, values=values)
    return text_of(tree, random)


def damaged_tree(random: Random, tree: Any, *, values: list[Any] | None = None) -> Any:
    """One change to a tree, in place where the top stays."""
    found = places(tree) if isinstance(tree, (dict, list)) else []
    if not found or random.random() < 0.02:
        return random.choice([value for value in VALUES if value != tree])
    held, key = random.choice(found)
    change = random.choice(CHANGES)
    change(random, held, key, [*VALUES, *BROKEN] if not values or random.random() < 0.5 else values)
    return tree


def _replace(random: Random, held: Any, key: Any, values: list[Any]) -> None:
    held[key] = copy.deepcopy(random.choice(values))


def _nudge(random: Random, held: Any, key: Any, values: list[Any]) -> None:
    """A value that is nearly the same."""
    value = held[key]
    if isinstance(value, bool) or value is None:
        held[key] = random.choice([not value, str(value), int(bool(value)), [value]])
    elif isinstance(value, (int, float)):
        held[key] = random.choice(
            [value + 1, value - 1, -value, value * 2, value * 10, float(value), str(value), [value]]
        )
    elif isinstance(value, str):
        cut = random.randint(0, len(value))
        held[key] = random.choice(
            [value[:cut], value + "x", value.upper(), value[::-1], f" {value}", value * 2, [value]]
        )
    elif isinstance(value, list) and value:
        place = random.randrange(len(value))
        held[key] = random.choice(
            [value[:place], value[place:], value[::-1], value * 2, [*value, value[place]], [value]]
        )
        if random.random() < 0.3:
            random.shuffle(held[key])
    else:
        _replace(random, held, key, values)


def _delete(random: Random, held: Any, key: Any, values: list[Any]) -> None:
    del held[key]


def _rename(random: Random, held: Any, key: Any, values: list[Any]) -> None:
    if not isinstance(held, dict):
        held.insert(key, copy.deepcopy(random.choice(values)))
        return
    new = random.choice([*KEYS, f"{key}x", str(key)[:-1], str(key).upper(), *map(str, held)])
    held[new] = held.pop(key)


def _add(random: Random, held: Any, key: Any, values: list[Any]) -> None:
    value = copy.deepcopy(random.choice([*values, held[key]]))
    if isinstance(held, dict):
        held[random.choice([*KEYS, f"{key}2"])] = value
    else:
        held.insert(random.randint(0, len(held)), value)


def _swap(random: Random, held: Any, key: Any, values: list[Any]) -> None:
    other = random.choice(list(held) if isinstance(held, dict) else range(len(held)))
    held[key], held[other] = held[other], held[key]


def _twice(random: Random, held: Any, key: Any, values: list[Any]) -> None:
    """The same key a second time, with another value, which no dict can hold."""
    if not isinstance(held, dict) or not isinstance(key, str):
        _add(random, held, key, values)
        return
    other = text_of(copy.deepcopy(random.choice(VALUES)), random)
    held[key] = Raw(f"{text_of(held[key], random)}, {json.dumps(key)}: {other}")


Change = Callable[[Random, Any, Any, list[Any]], None]
CHANGES: list[Change] = [_replace, _replace, _nudge, _nudge, _delete, _rename, _add, _swap, _twice]


def text_of(tree: Any, random: Random) -> str:
    """A tree as JSON, `Raw` texts in their places."""
    raw: list[str] = []

    def outlined(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value.text)
            return f"\ue000{len(raw) - 1}\ue000"
        if isinstance(value, dict):
            return {key: outlined(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [outlined(item) for item in value]
        return value

    text = json.dumps(outlined(tree), indent=random.choice((None, None, 1)))
    for number, piece in enumerate(raw):
        text = text.replace(f'"\\ue000{number}\\ue000"', piece)
    return text


def damaged_bytes(random: Random, data: bytes) -> bytes:
    """One to four changes to bytes."""
    for _ in range(random.choice((1, 1, 2, 4))):
        data = random.choice(BYTE_CHANGES)(random, bytearray(data))
    return data


def _flip(random: Random, data: bytearray) -> bytes:
    for _ in range(random.choice((1, 1, 2, 8))):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _cut(random: Random, data: bytearray) -> bytes:
    return bytes(data[: random.randint(0, len(data))])


def _insert(random: Random, data: bytearray) -> bytes:
    place = random.randint(0, len(data))
    piece = random.choice(
        [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"{", b"]", b",", b"\\", b"9" * 400, b"\n",
         b"NaN", b"\xed\xa0\x80", b"\x1b[31m", random.randbytes(random.randint(1, 64))]
    )  # fmt: skip
    return bytes(data[:place] + piece + data[place:])


def _remove(random: Random, data: bytearray) -> bytes:
    start = random.randint(0, len(data))
    return bytes(data[:start] + data[start + random.randint(1, 200) :])


def _repeat(random: Random, data: bytearray) -> bytes:
    start = random.randint(0, len(data))
    stop = start + random.randint(1, 200)
    return bytes(data[:stop] + data[start:])


def _digit(random: Random, data: bytearray) -> bytes:
    found = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if found:
        data[random.choice(found)] = random.choice(b"0123456789-.e")
    return bytes(data)


def _recode(random: Random, data: bytearray) -> bytes:
    text = bytes(data).decode("utf-8", "replace")
    return text.encode(random.choice(["utf-16", "utf-8-sig", "utf-32", "latin-1"]), "replace")


def _empty(random: Random, data: bytearray) -> bytes:
    return random.choice([b"", b"\n", b"null", b"{}", b"[]", b"\x00" * len(data), b"0", b'""'])


BYTE_CHANGES = [_flip, _flip, _cut, _insert, _insert, _remove, _repeat, _digit, _recode, _empty]
