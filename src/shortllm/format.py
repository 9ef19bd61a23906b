"""Numbers, ratios, bytes, counts, durations and names as text, for reports, tables and messages.

Imports nothing but the standard library. Texts use typographic signs (−, ×, – and a narrow space
before a unit); `plain` turns them into ASCII for messages and logs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

NONE = "–"
"""Shown for a value that was not measured."""
THIN = "\N{NARROW NO-BREAK SPACE}"
SPACE = "\N{NO-BREAK SPACE}"
ABSOLUTE = r"(~|\.{1,2}|[A-Za-z]:)?[/\\]"
"""How a path begins that only its own machine understands."""

HUB_FILE = r"[\w.-]+/[\w.-]+:"
"""How a file in a repository of the Hub begins."""

MOST_NATS = 700.0
"""Differences in nats above this are shown as this; exp of more is not a float."""

SINGULAR = {"are": "is", "come": "comes", "have": "has", "were": "was"}
"""Verb of several things -> of one."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ASCII = str.maketrans({THIN: " ", SPACE: " ", "−": "-", NONE: "-", "×": "x", "±": "+-"})


def number(value: float | None, digits: int = 4) -> str:
    """`value` to about `digits` significant digits with thousands separators: 5.123, 5,123."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 7:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def figure(value: float | None) -> str:
    """A figure of any size for a column: counts from a million in full, others to five digits."""
    return f"{value:,.0f}" if value is not None and value >= 1e6 else number(value, 5)


def fixed(value: float | None, decimals: int = 2) -> str:
    """`value` with exactly `decimals` decimals, for columns of like numbers."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{decimals}f}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign."""
    return f"{'+' if value > 0 else ''}{number(value, digits)}"


def with_error(value: float | None, error: float | None) -> str:
    """A value with its standard error: '36.02 ± 0.41'."""
    shown = number(value)
    return shown if error is None or shown == NONE else f"{shown} ± {number(error, 2)}"


def change_of_perplexity(nll: float, error: float | None) -> str:
    """A difference in nats as the relative change of the perplexity: '+53.04 ± 0.82 %'."""
    ratio = math.exp(min(nll, MOST_NATS))
    if not error:
        return change(1.0, ratio)
    if ratio >= 10:
        return f"{change(1.0, ratio)} ± {number(ratio * error, 2)}"
    said = number(100 * ratio * error, 2)
    changed = fixed(100 * (ratio - 1), len(said.partition(".")[2]))
    return f"{'+' if ratio > 1 else ''}{changed} ± {said}{THIN}%"


def percent(ratio: float | None, decimals: int = 1) -> str:
    """A ratio in percent: 0.241 is '24.1 %'."""
    if ratio is None:
        return NONE
    return f"{fixed(100 * ratio, decimals)}{THIN}%"


def point_change(before: float, after: float) -> str:
    """The difference of two ratios: '−3.20 points'."""
    difference = 100 * (after - before)
    return f"{signed(difference, 3) if abs(difference) >= 0.005 else '±0'}{SPACE}points"


def change(before: float | None, after: float | None) -> str:
    """The relative change: '−24.1 %', '+53.0 %', '× 12.3', '±0 %'."""
    if before is None or after is None or before <= 0:
        return NONE
    ratio = after / before
    if ratio >= 10:
        return f"×{THIN}{number(ratio, 3)}"
    if ratio == 1:
        return f"±0{THIN}%"
    sign = "+" if ratio > 1 else "−"
    size = percent(abs(ratio - 1))
    return f"{sign}{f'<0.1{THIN}%' if size.startswith('0.0') else size}"


def counted(count: int, word: str) -> str:
    """'1 block', '2,048 tokens'."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def short_count(value: int | None) -> str:
    """A count to three digits: '6.74 B', '125 M', '5.10 k'."""
    return _scaled(value, 1000, ("", "k", "M", "B", "T"))


def short_bytes(value: int | None) -> str:
    """Bytes in decimal units, as disks and the Hub count: '13.5 GB'."""
    return _scaled(value, 1000, ("bytes", "kB", "MB", "GB", "TB"))


def binary_bytes(value: int | None) -> str:
    """Bytes in binary units, as memory is counted and options are typed: '1.50 GiB'."""
    return _scaled(value, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def in_bytes(value: float) -> str:
    """Bytes for a message or a log: '1.50 GiB' in ASCII."""
    return plain(binary_bytes(round(value)))


def _scaled(value: int | None, step: int, units: Sequence[str]) -> str:
    """Three digits and the largest unit that leaves at least one of them before the point."""
    if value is None:
        return NONE
    scaled, place = float(value), 0
    while abs(scaled) >= step - 0.5 and place < len(units) - 1:
        scaled, place = scaled / step, place + 1
    text = f"{value:,}" if place == 0 else number(scaled, 3)
    return f"{text}{THIN}{units[place]}".rstrip(THIN)


def duration(seconds: float | None) -> str:
    """'350 ms', '12.3 s', '5.2 min', '3.1 h'."""
    if seconds is None:
        return NONE
    if seconds < 1:
        return f"{number(1000 * seconds, 3)}{THIN}ms"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{fixed(seconds / size, 1)}{THIN}{unit}"
    return f"{fixed(seconds, 1)}{THIN}s"


def listed(names: Sequence[object], last: str = "and") -> str:
    """'a', 'a and b', 'a, b and c'."""
    words = [str(name) for name in names]
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def named_blocks(numbers: Sequence[int], verb: str = "") -> str:
    """'blocks 5, 6', 'block 6'; with a verb of several ('have'), that of their number follows."""
    one = len(numbers) == 1
    words = ["block" if one else "blocks", ", ".join(map(str, numbers))]
    return " ".join([*words, *([SINGULAR[verb] if one else verb] if verb else [])])


def spans(blocks: Sequence[int]) -> str:
    """Block numbers, with three or more consecutive ones as a span: '2, 3, 7–10'."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(
        f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def what_is_left(
    model: str, blocks: int, removed: Sequence[int], before_bytes: int, after_bytes: int
) -> str:
    """What a removal did to a model: blocks, and bytes of its weights."""
    gone = ", ".join(map(str, sorted(removed)))
    return (
        f"{model}: {blocks} -> {counted(blocks - len(removed), 'block')}, without {gone}; "
        f"{in_bytes(before_bytes)} -> {in_bytes(after_bytes)}"
    )


def model_name(model_id: str) -> str:
    """A Hub id unchanged, the last part of a directory, the Hub id of a Hub cache directory."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)", model_id)
    return f"{cached[1]}/{cached[2]}" if cached else without_directories(model_id)


def without_directories(text: str) -> str:
    """The last part of a path, also of each in a list; any other text unchanged."""
    return ",".join(map(_last_part, text.split(",")))


def without_paths(sentence: str) -> str:
    """A sentence with the last part of each absolute path in it."""
    directories = r"(?<![\w/.:~])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+(?=[^\s/\\])"
    return re.sub(directories, "", sentence)


def _last_part(text: str) -> str:
    absolute, hub = re.match(ABSOLUTE, text), re.match(HUB_FILE, text)
    relative = text.count("/") > 1 and " " not in text and "://" not in text and not hub
    if not absolute and not relative:
        return text
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or text


def plain(text: str) -> str:
    """The same text in ASCII, except for names in it."""
    return text.translate(_ASCII)
