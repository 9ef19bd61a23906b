"""The options of healing without training, and the record of what was healed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from shortllm.data.options import SampledText
from shortllm.healing.methods import METHODS
from shortllm.options import Flag, Options
from shortllm.records import DerivedRecord, ModelInfo, Record
from shortllm.registry import described

SAMPLE_LENGTH = 256
"""Tokens per calibration sample; fewer if the model has fewer positions."""

MethodName = Annotated[
    str,
    AfterValidator(lambda name: METHODS.get(name).name),
    Field(json_schema_extra={"enum": METHODS.names()}),
    Flag(metavar="|".join(METHODS.names())),
]


class HealCalibration(SampledText):
    """Calibration text: more than for scoring, since a map has as many unknowns as a matrix."""

    sampler: Literal["random", "packed"] = Field(
        default="packed",
        description="How windows are cut. random: from random documents. packed: one after the "
        "other from all documents joined.",
    )
    samples: int = Field(
        default=64, ge=2, description="Number of calibration samples; a quarter is held out."
    )
    length: int | None = Field(  # type: ignore[assignment]
        default=None,
        ge=2,
        description=f"Tokens per calibration sample. Default: {SAMPLE_LENGTH}, at most the model's "
        "positions.",
    )


class HealOptions(Options):
    """How to heal a shortened checkpoint without training."""

    panel: ClassVar[str] = "Healing"

    method: MethodName = Field(
        default="regression", description="How to heal. " + described(METHODS)
    )
    ridge: float | None = Field(
        default=None,
        gt=0,
        description="Ridge strength: keeps weights near what they were, relative to the mean "
        "squared input. Default: for each gap what does best on held-out samples.",
    )
    weighting: Literal["norm", "none"] = Field(
        default="norm",
        description="norm: the error of each token relative to the mean square of its hidden "
        "state. none: all tokens alike, as published.",
    )
    attention: bool = Field(
        default=True,
        description="Refit the output projection of the attention before each gap too.",
    )
    gain: bool = Field(
        default=True,
        description="Also multiply the hidden state behind each gap by a factor, by dividing what "
        "all later blocks add; only where every norm ignores its scale.",
    )
    before: int = Field(
        default=3,
        ge=1,
        description="Refit the output projection of the MLP in this many blocks before each gap, "
        "solved together: fewer where they have more than 8,192 inputs, and one where a norm "
        "follows.",
    )
    behind: int = Field(
        default=0,
        ge=0,
        description="Refit the output projections of this many blocks behind each gap too, one "
        "after the other.",
    )
    calibration: HealCalibration = HealCalibration()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        """Refuse options that the method does not have."""
        METHODS.require_own_options(self.method, self)
        return self


class HealedGap(Record):
    """One gap; block numbers are those of the source."""

    block: int | None = Field(
        description="the block before the gap; null if there is none, so it cannot be healed"
    )
    removed: list[int] = Field(description="empty: a block behind a gap, refitted too")
    changed: list[str] = Field(
        default_factory=list,
        description="projections, norms and matrices of experts with new weights, by their names "
        "within the block",
    )
    earlier: list[int] = Field(
        default_factory=list,
        description="blocks further before the gap whose output projection has new weights too",
    )
    scale: float | None = Field(
        default=None, description="factor that the block multiplies their output with"
    )
    gain: float = Field(default=1.0, description="factor of the whole hidden state behind the gap")
    ridge: float | None = Field(
        default=None,
        description="ridge strength of the last fit, relative to the mean squared input; null: no "
        "change does better on held-out samples",
    )
    penalty: float | None = Field(default=None, description="the λ of that ridge")
    effective_rank: float | None = Field(
        default=None, description="directions in which the map is free: sum of e / (e + λ)"
    )
    error_before: float | None = Field(
        default=None,
        description="squared distance to the source's hidden state on held-out samples, relative "
        "to its square",
    )
    error_after: float | None = Field(
        default=None, description="the same with the map solved on the other samples"
    )


class HeldOut(Record):
    """Mean next-token loss on the held-out samples, nats."""

    samples: int
    source: float
    shortened: float
    healed: float


class Healing(DerivedRecord):
    """heal.json: how a shortened checkpoint was healed without training."""

    FILE: ClassVar[str] = "heal.json"

    source: ModelInfo = Field(description="the checkpoint it was shortened from")
    method: str
    gaps: list[HealedGap] = Field(description="in the order in which they were healed")
    strength: float = Field(
        default=1.0,
        description="part of the change that was kept: below 1 where the whole of it would raise "
        "the loss on held-out samples",
    )
    held_out: HeldOut
    calibration: str = Field(description="tokens_fingerprint of the calibration")
    data: str = Field(description="where the calibration came from")
    samples: int
    length: int = Field(description="tokens per sample")
    dtype: str = Field(description="computation type of the hidden states; sums are float64")
