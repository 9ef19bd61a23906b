"""Block criteria and their registry. A criterion is one decorated function in one file of this
folder.

A criterion takes the model and the calibration ids and returns one importance per block, *higher =
keep*. Adding one: write the function, decorate it, import its module at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortllm.errors import CriterionError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.model.resident import ResidentModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a criterion found, one number per block of the original model."""

    importance: list[float]
    """Higher = keep."""
    values: list[float]
    """The criterion's raw numbers."""
    intact: float | None = None
    """The raw number of the intact model, where there is one."""
    delta_nll: list[float] | None = None
    """Mean NLL without the block minus the intact one, nats per token."""


Advance = Callable[[float], None]
Score = Callable[["ResidentModel", "Tensor", Advance], Scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """A registered criterion."""

    name: str
    summary: str
    source: str
    """Where it was published."""
    score: Score
    """`(model, ids_BT, advance) -> Scores`"""
    flops: Callable[[ResidentModel, int, int], float]
    """Work of scoring `(model, samples, length)`: what the calls of `advance` add up to."""


_REGISTRY: dict[str, Criterion] = {}


def criterion(
    name: str, *, source: str, flops: Callable[[ResidentModel, int, int], float]
) -> Callable[[Score], Score]:
    """Register the decorated function as `name`; its docstring's first line is the summary."""

    def register(score: Score) -> Score:
        if name in _REGISTRY:
            owner = _REGISTRY[name].score.__module__
            raise ValueError(f"criterion '{name}' is already registered by {owner}")
        summary = (score.__doc__ or "").strip().splitlines()[0]
        _REGISTRY[name] = Criterion(
            name=name, summary=summary, source=source, score=score, flops=flops
        )
        return score

    return register


def get(name: str) -> Criterion:
    """The criterion registered as `name`.

    Raises:
        CriterionError: there is none; the message lists those that exist.
    """
    if name not in _REGISTRY:
        raise CriterionError(f"unknown criterion '{name}'.{did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def names() -> list[str]:
    """Names of all criteria, sorted."""
    return sorted(_REGISTRY)


def require_finite(name: str, values: list[float]) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        CriterionError: naming the first block whose score is NaN or infinite.
    """
    for block, value in enumerate(values):
        if not math.isfinite(value):
            raise CriterionError(
                f"criterion '{name}' gives {value} for block {block}, which cannot be ranked. "
                "Try --dtype float32, and look for extreme weights or calibration text"
            )


from shortllm.criteria import removal as removal  # noqa: E402  (registers its criteria)
