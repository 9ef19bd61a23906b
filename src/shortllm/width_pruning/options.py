"""The options of width pruning, and the record of what was removed."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from shortllm.data.options import SampledText
from shortllm.errors import ShortLLMError
from shortllm.options import Flag, Options
from shortllm.records import PROTECT_FIRST, PROTECT_LAST, DerivedRecord, Record
from shortllm.registry import described
from shortllm.width_pruning.methods import METHODS

Importance = Literal["first", "second", "mixed", "vectorised", "l1", "l2", "random"]

MethodName = Annotated[
    str,
    AfterValidator(lambda name: METHODS.get(name).name),
    Field(json_schema_extra={"enum": METHODS.names()}),
    Flag(metavar="|".join(METHODS.names())),
]

SAMPLE_LENGTH = 128
"""Tokens per calibration sample, unless the method has a number of its own."""

PROTECTING = ", ".join(one.name for one in METHODS if one.protects_ends)


class WidthCalibration(SampledText):
    """Calibration text; the number of tokens depends on the method."""

    length: int | None = Field(  # type: ignore[assignment]
        default=None,
        ge=2,
        description="Tokens per calibration sample. Default: "
        + "".join(f"{one.sample_length} for {one.name}, " for one in METHODS if one.sample_length)
        + f"otherwise {SAMPLE_LENGTH}.",
    )


class WidthOptions(Options):
    """Which heads and neurons to remove; defaults that are not given depend on the method."""

    panel: ClassVar[str] = "Heads and neurons"

    method: MethodName = Field(
        default="llm-pruner", description="How to choose. " + described(METHODS)
    )
    ratio: float = Field(
        gt=0,
        lt=1,
        description="Part of the heads and neurons of each block to remove; of a method that ranks "
        "all blocks in one list, part of their parameters.",
    )
    neuron_ratio: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Part of the neurons of each block to remove. Default: as --ratio.",
    )
    start: int | None = Field(
        default=None,
        description=f"First block to make narrower. Default: 0, for {PROTECTING} 4, at most a "
        "quarter of the blocks.",
    )
    end: int | None = Field(
        default=None,
        description="The block after the last one to make narrower. Default: all blocks, for "
        f"{PROTECTING} all but 2.",
    )
    importance: Importance | None = Field(
        default=None,
        description="What llm-pruner ranks by: the first or second order of the expansion of the "
        "loss, both (mixed), the first summed with its sign (vectorised), weights alone (l1, l2), "
        "or nothing (random). Default: first.",
    )
    bias: bool | None = Field(
        default=None,
        description="Whether flap keeps the mean of what it removes as a bias. Default: yes.",
    )
    repair: bool = Field(
        default=False,
        description="Heal without training: refit the weights that stay in each output projection, "
        "by least squares on the calibration text, so that they make up for those that go.",
    )
    shapes: Literal["auto", "uniform", "per-block"] = Field(
        default="auto",
        description="uniform: all blocks alike, a plain checkpoint. per-block: for shortllm.load. "
        "auto: plain where possible.",
    )
    calibration: WidthCalibration = WidthCalibration()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        """Refuse options that the method does not have."""
        METHODS.require_own_options(self.method, self)
        if self.neuron_ratio is not None and self.one_list:
            raise ValueError(
                f"{self.method} ranks heads and neurons in one list, so --neuron-ratio has no "
                "effect. Leave it out, or give --shapes uniform"
            )
        return self

    @property
    def needs_text(self) -> bool:
        """Whether the method, or the repair, looks at calibration text."""
        return self.repair or METHODS.get(self.method).needs_text(self)

    @property
    def one_list(self) -> bool:
        """Whether all blocks are ranked in one list, so that they get different shapes."""
        return METHODS.get(self.method).one_list and self.shapes != "uniform"

    @property
    def choices(self) -> dict[str, Any]:
        """What the result depends on besides the text; random importance depends on the seed."""
        chosen = self.model_dump(mode="json", exclude={"calibration"})
        on_text = METHODS.get(self.method).needs_text(self)
        return chosen if on_text else {**chosen, "seed": self.calibration.seed}

    def resolved(self, blocks: int) -> WidthOptions:
        """The same options with every default filled in, for a model of this many blocks."""
        method, start, end = METHODS.get(self.method), self.start, self.end
        if start is None:
            start = min(PROTECT_FIRST, blocks // 4) if method.protects_ends else 0
        if end is None:
            end = blocks - (min(PROTECT_LAST, blocks // 4) if method.protects_ends else 0)
        if not 0 <= start < end <= blocks:
            raise ShortLLMError(
                f"blocks {start} to {end} (not included) were requested, but the model has "
                f"{blocks}. Give --start below --end, and --end {blocks} or less"
            )
        if self.shapes == "uniform" and (start, end) != (0, blocks):
            raise ShortLLMError(
                f"--shapes uniform makes all blocks alike, but only blocks {start} to {end - 1} of "
                f"{blocks} become narrower. Give --start 0 --end {blocks}, or --shapes per-block"
            )
        length = self.calibration.length or method.sample_length or SAMPLE_LENGTH
        text = self.calibration.model_copy(update={"length": length})
        own = {name: one for name, one in method.options.items() if getattr(self, name) is None}
        update = {"start": start, "end": end, "calibration": text, **own}
        return self.model_copy(update=update)


class RepairedProjection(Record):
    """New weights of one output projection.

    Errors are those of its output on held-out samples, compared with the same block before the
    removal: squares, relative to the square of that output.
    """

    projection: str = Field(description="its name within the block")
    ridge: float | None = Field(
        description="ridge strength, relative to the mean squared input; null: no change does "
        "better on held-out samples"
    )
    error_before: float = Field(description="without new weights; with the mean as a bias, if any")
    error_after: float = Field(description="with those solved on the other samples")


class NarrowedBlock(Record):
    """What was removed from one block; numbers are those of the source."""

    block: int
    query_heads: int = Field(description="before")
    kv_heads: int = Field(description="before; each is removed with its query heads")
    neurons: int = Field(description="before")
    removed_query_heads: list[int]
    removed_kv_heads: list[int]
    removed_neurons: list[int]
    head_importance: list[float] = Field(
        description="of every kv head with its query heads; higher = keep"
    )
    neuron_importance: list[float] = Field(description="of the removed neurons, in their order")
    repaired: list[RepairedProjection] = Field(
        default_factory=list, description="output projections whose weights were fitted again"
    )


class WidthSize(Record):
    """How many parameters were removed."""

    parameters: int = Field(description="of all stored tensors of the narrower checkpoint")
    removed: int = Field(description="added biases are subtracted from it")
    removed_ratio: float = Field(description="part of the source's parameters")


class WidthPruning(DerivedRecord):
    """width.json: heads and neurons removed from a checkpoint."""

    FILE: ClassVar[str] = "width.json"

    method: str
    shapes: Literal["uniform", "per-block"] = Field(
        description="uniform: a plain checkpoint; per-block: loaded by shortllm.load"
    )
    blocks: list[NarrowedBlock]
    biases: bool = Field(
        description="whether the mean of what was removed was added as output biases"
    )
    reached: WidthSize
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    dtype: str = Field(description="computation type of the scoring pass")
