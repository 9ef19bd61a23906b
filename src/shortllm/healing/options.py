"""options."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.records import Cost, ModelInfo, Record, ResultFile

LENGTH = 256
"""Tokens per sample where nothing is said; fewer where the model has fewer positions."""


class HealOptions(Record):
    """How a shortened checkpoint is healed without training.

    A map has the square of the model's width as unknowns, so that it takes more text than scores.
    """

    method: Literal["linear"] = "linear"
    ridge: float | None = Field(
        default=None,
        gt=0,
        description="how strongly maps are held to do nothing, in parts of the mean square of what "
        "they are given; default: for each gap what does best on held-out samples",
    )
    weighting: Literal["norm", "none"] = Field(
        default="norm",
        description="norm: the error of each token in parts of its stream's mean square; none: all "
        "tokens alike, as published",
    )
    samples: int = Field(
        default=64, ge=2, description="calibration samples; a quarter of them is held out"
    )
    length: int | None = Field(
        default=None, ge=2, description="tokens per sample; default: 256, or all positions"
    )

    def sample_length(self, positions: int | None) -> int:
        """Tokens per sample for a model with so many positions; None: it has no limit."""
        return self.length or min(LENGTH, positions or LENGTH)


HEAL_FILE = "heal.json"


class HealedGap(Record):
    """One gap; block numbers are those of the source."""

    block: int | None = Field(
        description="the block before the gap; null where there is none, which cannot be healed"
    )
    removed: list[int]
    projection: str | None = Field(
        default=None, description="what the map was folded into, by its name within the block"
    )
    scale: float | None = Field(
        default=None, description="what the block multiplies the projection's output with"
    )
    ridge: float | None = Field(
        default=None,
        description="parts of the mean square of what the map is given; null: left as it was, as "
        "no map does better on held-out samples",
    )
    penalty: float | None = Field(default=None, description="the λ that comes to")
    effective_rank: float | None = Field(
        default=None, description="directions the map is free in: sum of e / (e + λ)"
    )
    error_before: float | None = Field(
        default=None,
        description="squared distance to the source's stream on held-out samples, in parts of its "
        "square",
    )
    error_after: float | None = Field(
        default=None, description="the same with the map of the other samples"
    )


class HeldOut(Record):
    """Mean next-token loss on the held-out samples, nats."""

    samples: int
    source: float
    shortened: float
    healed: float


class Healing(ResultFile):
    """heal.json: how a shortened checkpoint was healed without training."""

    model: ModelInfo = Field(description="the checkpoint before")
    source: ModelInfo = Field(description="the one it was shortened from")
    method: Literal["linear"]
    options: dict[str, Any]
    gaps: list[HealedGap] = Field(description="in the order in which they were healed")
    held_out: HeldOut
    calibration: str = Field(description="tokens_fingerprint of the calibration")
    data: str = Field(description="where the calibration came from")
    samples: int
    length: int = Field(description="tokens per sample")
    dtype: str = Field(description="computation type of the walk; sums are float64")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None
