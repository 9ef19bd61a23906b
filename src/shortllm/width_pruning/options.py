"""Every choice of a width pruning in one record.

width.json: what went from which block, and how the checkpoint became narrower.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.errors import BudgetError, ShortLLMError
from shortllm.records import Cost, ModelInfo, Record, ResultFile

Method = Literal["llm-pruner", "wanda-sp", "flap"]

Importance = Literal["first", "second", "mixed", "vectorised", "l1", "l2", "random"]

Shapes = Literal["auto", "uniform", "per-block"]

WITHOUT_TEXT = ("l1", "l2", "random")
"""Importances of llm-pruner that look at no text."""

KEPT_FIRST = 4

KEPT_LAST = 2
"""Blocks at both ends that llm-pruner leaves alone, never more than a quarter of all at each."""

SAMPLE_LENGTH = {"llm-pruner": 64}
"""Method -> tokens per calibration sample; others take the default."""


class WidthOptions(Record):
    """How a checkpoint is made narrower; what is not given depends on the method."""

    method: Method = "llm-pruner"
    ratio: float = Field(
        description="part of the heads and neurons of each block that goes; for flap part of the "
        "parameters of all of them together"
    )
    neuron_ratio: float | None = Field(
        default=None,
        description="part of the neurons of each block that goes, where that is not to be `ratio`; "
        "not where one list of all blocks decides",
    )
    start: int | None = Field(
        default=None, description="first block made narrower; llm-pruner: 4, others: 0"
    )
    end: int | None = Field(
        default=None, description="the one behind the last; llm-pruner: all but 2, others: all"
    )
    importance: Importance | None = Field(
        default=None, description="of llm-pruner alone; default first"
    )
    bias: bool | None = Field(
        default=None, description="of flap alone: keep the mean of what goes as a bias; default yes"
    )
    shapes: Shapes = Field(
        default="auto",
        description="uniform: every block alike, a plain checkpoint; per-block: loaded by "
        "shortllm.load; auto: plain where the method makes all blocks alike and the config can "
        "say it",
    )
    seed: int = Field(default=1234, description="of random importance")

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is looked at."""
        return self.importance not in WITHOUT_TEXT

    def filled(self, blocks: int) -> WidthOptions:
        """The same options with every default filled in, for a model of so many blocks.

        Raises:
            ShortLLMError: an option of another method, blocks that are not there, or shapes that
                the method cannot give.
            BudgetError: a ratio that is none.
        """
        pruner = self.method == "llm-pruner"
        if not 0 < self.ratio < 1:
            raise BudgetError(f"--ratio {self.ratio} is not between 0 and 1. Give e.g. 0.25")
        for name, owner in (("importance", "llm-pruner"), ("bias", "flap")):
            if getattr(self, name) is not None and self.method != owner:
                raise ShortLLMError(
                    f"--{name} is an option of {owner}, and --method is {self.method}. Leave it out"
                )
        if self.neuron_ratio is not None:
            if not 0 < self.neuron_ratio < 1:
                raise BudgetError(
                    f"--neuron-ratio {self.neuron_ratio} is not between 0 and 1. Give e.g. 0.25"
                )
            if self.by_list:
                raise ShortLLMError(
                    "flap ranks heads and neurons in one list, in which --neuron-ratio has no "
                    "meaning. Leave it out, or give --shapes uniform"
                )
        start, end = self.start, self.end
        if start is None:
            start = min(KEPT_FIRST, blocks // 4) if pruner else 0
        if end is None:
            end = blocks - (min(KEPT_LAST, blocks // 4) if pruner else 0)
        if not 0 <= start < end <= blocks:
            raise ShortLLMError(
                f"blocks {start} to {end} (not included) were asked for, and the model has "
                f"{blocks}. Give --start below --end, and --end {blocks} or less"
            )
        if self.shapes == "uniform" and (start, end) != (0, blocks):
            raise ShortLLMError(
                f"--shapes uniform makes all blocks alike, but only blocks {start} to {end - 1} of "
                f"{blocks} are to be made narrower. Give --start 0 --end {blocks}, or --shapes "
                "per-block"
            )
        return self.model_copy(
            update={
                "start": start,
                "end": end,
                "importance": (self.importance or "first") if pruner else None,
                "bias": (self.bias is not False) if self.method == "flap" else None,
            }
        )

    @property
    def by_list(self) -> bool:
        """Whether what goes is chosen from one list of all blocks, so that they differ."""
        return self.method == "flap" and self.shapes != "uniform"


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
