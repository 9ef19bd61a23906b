"""sublayers.json: which sublayers went, why, and what became of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.results.record import Cost, ModelInfo, Record, ResultFile

RECORD = "sublayers.json"


class DroppedSublayer(Record):
    """One sublayer that went."""

    block: int = Field(description="in the source")
    part: Literal["attention", "mlp"]
    value: float | None = Field(
        description="perplexity without it and those before it, or 1 - cos of what it does to the "
        "stream; null where it was named"
    )


class SublayerDrop(ResultFile):
    """Attentions and MLPs removed from a checkpoint."""

    model: ModelInfo = Field(description="the checkpoint before")
    criterion: str | None = Field(description="null where the sublayers were named")
    options: dict[str, Any]
    dropped: list[DroppedSublayer] = Field(description="in the order in which they went")
    intact: float | None = Field(default=None, description="perplexity of the intact model")
    removed_blocks: list[int] = Field(
        description="blocks of the source that lost both, and are gone from the checkpoint"
    )
    zeroed_parameters: int = Field(description="stored as zeros: they take their space and time")
    parameters: int = Field(description="of all stored tensors, zeros included")
    bytes: int
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    dtype: str = Field(description="computation type of the scoring pass")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None

    def blocks(self, part: str) -> list[int]:
        """Blocks of the source that lost this part, ascending."""
        return sorted(one.block for one in self.dropped if one.part == part)
