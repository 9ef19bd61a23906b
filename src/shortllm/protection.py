"""Protected blocks: the first and last ones, which stay unless you say otherwise."""

from __future__ import annotations

from shortllm.errors import BudgetError
from shortllm.records import ModelInfo

PROTECT_FIRST = 4
PROTECT_LAST = 2
"""Blocks at either end that are protected by default; at most a quarter of all."""


def protected_ends(count: int, first: int | None = None, last: int | None = None) -> list[int]:
    """Protected blocks of a model of `count` blocks, ascending."""
    if (first or 0) < 0 or (last or 0) < 0:
        raise BudgetError("--protect-first and --protect-last cannot be negative")
    first = min(PROTECT_FIRST, count // 4) if first is None else first
    last = min(PROTECT_LAST, count // 4) if last is None else last
    return [block for block in range(count) if block < first or block >= count - last]


def protected_in(model: ModelInfo, first: int | None = None, last: int | None = None) -> list[int]:
    """Protected blocks of a model, ascending: its ends, and those that other blocks depend on."""
    return sorted({*protected_ends(model.blocks, first, last), *model.fixed})
