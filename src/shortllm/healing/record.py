"""heal.json and merge.json: what was folded into what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.results.record import Cost, ModelInfo, Record, ResultFile

HEAL_FILE = "heal.json"
MERGE_FILE = "merge.json"


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


class Merge(Record):
    """One try; block numbers are those of the source."""

    block: int = Field(description="what the others were folded into")
    merged: list[int] = Field(description="the others, which go")
    cosine: float = Field(
        description="mean over tokens of the cosine between the final hidden states of the merged "
        "and the original model"
    )
    kept: bool = Field(description="whether the cosine exceeds the threshold")


class Merging(ResultFile):
    """merge.json: blocks folded into one another."""

    model: ModelInfo = Field(description="the checkpoint before")
    options: dict[str, Any]
    tries: list[Merge] = Field(description="in their order, from the top down")
    kept: list[int]
    removed: list[int]
    sums: dict[int, dict[int, int]] = Field(
        description="for each changed block how often each original block is in it"
    )
    cosine: float = Field(description="of the model that was written")
    calibration: str = Field(description="tokens_fingerprint of the calibration")
    dtype: str = Field(description="computation type of the comparison; sums are float32")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None
