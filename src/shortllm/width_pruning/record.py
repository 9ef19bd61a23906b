"""width.json: what went from which block, and how the checkpoint became narrower."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.results.record import Cost, ModelInfo, Record, ResultFile
from shortllm.width_pruning.options import Method

RECORD = "width.json"


class NarrowedBlock(Record):
    """What went from one block; numbers are those of the source."""

    block: int
    query_heads: int = Field(description="before")
    kv_heads: int = Field(description="before; each goes with its query heads")
    neurons: int = Field(description="before")
    removed_query_heads: list[int]
    removed_kv_heads: list[int]
    removed_neurons: list[int]
    head_importance: list[float] = Field(
        description="of every kv head with its query heads; higher = keep"
    )
    neuron_importance: list[float] = Field(description="of the removed neurons, in their order")


class WidthSize(Record):
    """How many parameters went."""

    parameters: int = Field(description="of all stored tensors of the narrower checkpoint")
    removed: int = Field(description="added biases are counted against it")
    removed_ratio: float = Field(description="part of the source's parameters")


class WidthPruning(ResultFile):
    """width.json: heads and neurons removed from a checkpoint."""

    model: ModelInfo = Field(description="the checkpoint before")
    method: Method
    options: dict[str, Any]
    shapes: Literal["uniform", "per-block"] = Field(
        description="uniform: a plain checkpoint; per-block: loaded by shortllm.load"
    )
    blocks: list[NarrowedBlock]
    biases: bool = Field(description="whether the mean of what went was added as output biases")
    reached: WidthSize
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    dtype: str = Field(description="computation type of the scoring pass")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None
