"""The options of merging blocks, and the record of what was merged."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from shortllm.data.options import SampledText
from shortllm.format import number, plain
from shortllm.options import Flag, Options
from shortllm.records import DerivedRecord, Record

ALIKE = 0.65
"""Mean cosine from which on final hidden states are called alike; the threshold of LaCo."""

RUINED = 10.0
"""How many times the original's perplexity is that of a broken model."""


class MergeOptions(Options):
    """Which blocks to fold into others: named ones, or those that a sweep from the top finds."""

    panel: ClassVar[str] = "Merging"

    blocks: Annotated[list[int] | None, Flag(metavar="6,7,9")] = Field(
        default=None,
        description="Fold exactly these blocks into the block before each gap they leave. Default: "
        "a sweep from the top finds which, with the six options below.",
    )
    threshold: float = Field(
        default=ALIKE,
        ge=-1,
        lt=1,
        description="Keep a merge if the mean cosine between the final hidden states of the merged "
        "and the original model exceeds this.",
    )
    interval: int = Field(
        default=2, ge=1, description="Blocks to go down after a merge that is kept; otherwise 1."
    )
    max_merged: int = Field(
        default=3, ge=1, description="Fold at most this many blocks into another one at once."
    )
    remove: int | None = Field(
        default=None,
        ge=1,
        description="Stop once this many blocks are gone. Default: at the lowest block.",
    )
    protect_first: int = Field(
        default=1, ge=0, description="Leave this many blocks at the start as they are."
    )
    protect_last: int = Field(
        default=0, ge=0, description="Leave this many blocks at the end as they are."
    )
    calibration: SampledText = SampledText()

    @field_validator("blocks")
    @classmethod
    def _named_once(cls, named: list[int] | None) -> list[int] | None:
        if named is not None and (not named or len(set(named)) != len(named)):
            raise ValueError("name each block to fold into the one before it once, e.g. 6,7,9")
        return named

    @model_validator(mode="after")
    def _named_or_swept(self) -> Self:
        """Refuse options of the sweep next to named blocks."""
        sweep = ("threshold", "interval", "max_merged", "remove", "protect_first", "protect_last")
        given = [
            name for name in sweep if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.blocks is not None and given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(
                f"--blocks names what to fold, so there is no sweep and {flags} has no effect. "
                "Leave out one or the other"
            )
        return self


class Merge(Record):
    """One try; block numbers are those of the source."""

    block: int = Field(description="what the others were folded into")
    merged: list[int] = Field(description="the others, which are removed")
    cosine: float = Field(
        description="mean over tokens of the cosine between the final hidden states of the merged "
        "and the original model"
    )
    perplexity: float | None = Field(
        default=None, description="of the merged model on the calibration text"
    )
    kept: bool = Field(
        description="whether it is in the written model: its cosine exceeds the threshold, or its "
        "blocks were named"
    )


class Merging(DerivedRecord):
    """merge.json: blocks folded into one another."""

    FILE: ClassVar[str] = "merge.json"

    tries: list[Merge] = Field(description="in their order, from the top down")
    kept: list[int]
    removed: list[int]
    sums: dict[int, dict[int, int]] = Field(
        description="for each changed block how often each original block is in it"
    )
    cosine: float = Field(description="of the written model, as in `tries`")
    intact_perplexity: float = Field(description="of the original model on the calibration text")
    perplexity: float = Field(description="of the written model on the calibration text")
    calibration: str = Field(description="tokens_fingerprint of the calibration")
    dtype: str = Field(description="computation type of the comparison; sums are float32")

    def verdict(self, one: Merge) -> str:
        """What became of a try, in a few words."""
        if self.options.get("blocks") is None:
            return "kept" if one.kept else ""
        return "as named" if one.cosine > ALIKE else f"as named, not alike (below {ALIKE})"

    @property
    def broken(self) -> str | None:
        """What to say of a merge that ruined the model; None of any other."""
        rise = self.perplexity / self.intact_perplexity
        if rise < RUINED:
            return None
        before, after = (plain(number(one)) for one in (self.intact_perplexity, self.perplexity))
        return (
            f"this merge breaks the model: perplexity on the calibration text rises from {before} "
            f"to {after}. Fold fewer blocks, or remove them with `shortllm prune`"
        )
