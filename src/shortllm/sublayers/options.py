"""The options of removing single sublayers, and the record of what was removed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from shortllm.data.options import SampledText
from shortllm.options import Flag, Options
from shortllm.records import DerivedRecord, Record
from shortllm.registry import described
from shortllm.sublayers.criteria import CRITERIA

CriterionName = Annotated[
    str,
    AfterValidator(lambda name: CRITERIA.get(name).name),
    Field(json_schema_extra={"enum": CRITERIA.names()}),
]

BLOCK_LIST = Flag(metavar="3,4")


class SublayerOptions(Options):
    """Which sublayers to remove: a number of them by a criterion, or named ones."""

    panel: ClassVar[str] = "Sublayers"

    criterion: Annotated[CriterionName | None, Flag(metavar="|".join(CRITERIA.names()))] = Field(
        default=None, description="How to choose. " + described(CRITERIA)
    )
    remove: int | None = Field(default=None, description="Number of sublayers to remove.")
    parts: Literal["joint", "attention", "mlp"] = Field(
        default="joint",
        description="What a criterion may remove: both kinds in one ranking, or one kind.",
    )
    attention: Annotated[list[int], BLOCK_LIST] = Field(
        default_factory=list, description="Remove the attention of exactly these blocks."
    )
    mlp: Annotated[list[int], BLOCK_LIST] = Field(
        default_factory=list, description="Remove the MLP of exactly these blocks."
    )
    protect_first: int | None = Field(
        default=None,
        description="Keep this many blocks at the start whole. Default: 4, at most a quarter.",
    )
    protect_last: int | None = Field(
        default=None,
        description="Keep this many blocks at the end whole. Default: 2, at most a quarter.",
    )
    calibration: SampledText = SampledText()


class DroppedSublayer(Record):
    """A sublayer that was removed."""

    block: int = Field(description="in the source")
    part: Literal["attention", "mlp"]
    value: float | None = Field(
        description="perplexity without it and those before it, or 1 - cosine similarity of the "
        "hidden state before and after it; null if it was named"
    )


class SublayerDrop(DerivedRecord):
    """sublayers.json: attentions and MLPs removed from a checkpoint."""

    FILE: ClassVar[str] = "sublayers.json"

    criterion: str | None = Field(description="null if the sublayers were named")
    dropped: list[DroppedSublayer] = Field(description="in the order of removal")
    intact: float | None = Field(default=None, description="perplexity of the intact model")
    removed_blocks: list[int] = Field(
        description="blocks of the source that lost both sublayers and were removed"
    )
    zeroed_parameters: int = Field(description="parameters stored as zeros")
    parameters: int = Field(description="of all stored tensors, zeros included")
    bytes: int
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    dtype: str = Field(description="computation type of the scoring pass")

    def blocks(self, part: str) -> list[int]:
        """Blocks of the source that lost this part, ascending."""
        return sorted(one.block for one in self.dropped if one.part == part)
