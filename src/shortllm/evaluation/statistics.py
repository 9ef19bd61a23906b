"""Standard errors of what is measured on independent parts: segments, exercises."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt
from statistics import fmean


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for a single one."""
    if len(values) < 2:
        return None
    mean, count = fmean(values), len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
