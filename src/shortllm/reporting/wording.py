"""Numbers with their units, as a reader says them."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_SIDE_BY_SIDE = 2
"""Models beside the original whose changes get columns of their own; of more they stand below."""
NONE = "–"
"""Shown for what was not measured."""
THIN = "\N{NARROW NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 4) -> str:
    """`value` to about `digits` significant digits, thousands set apart: 5.123, 51.23, 5,123."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 7:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa} × 10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign."""
    return f"{'+' if value > 0 else ''}{number(value, digits)}"


def short_count(value: int | None) -> str:
    """6.74 B, 125 M, 5.10 k."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def short_bytes(value: int | None) -> str:
    """Decimal units, as disks and the Hub count: 13.5 GB."""
    return _scaled(value, ("bytes", "kB", "MB", "GB", "TB"))


def _scaled(value: int | None, units: Sequence[str]) -> str:
    if value is None:
        return NONE
    scaled, step = float(value), 0
    while abs(scaled) >= 999.5 and step < len(units) - 1:
        scaled, step = scaled / 1000, step + 1
    text = f"{value:,}" if step == 0 else number(scaled, 3)
    return f"{text}{THIN}{units[step]}".rstrip(THIN)


def percent(ratio: float) -> str:
    """A ratio as percent, one digit."""
    return f"{ratio * 100:.1f}{THIN}%".replace("-", "−")


def change(before: float | None, after: float | None) -> str:
    """Relative change as a reader says it: '−24.1 %', '+53.0 %', '× 12.3', '±0 %'."""
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
