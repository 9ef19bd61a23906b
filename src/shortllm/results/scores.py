"""calibration.json and scores.json: the text scored on, and one importance per block."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm.results.record import Cost, ModelInfo, Record, ResultFile


class CalibrationInfo(ResultFile):
    """Where the calibration ids came from; they lie beside it in calibration.safetensors."""

    source: str = Field(description="data source as given, or the file the ids were taken from")
    rows: tuple[int, int] | None = Field(
        default=None, description="the span [start, stop) of rows the samples were drawn from"
    )
    sampler: Literal["random", "packed", "given"]
    samples: int
    length: int = Field(description="tokens per sample")
    seed: int | None = None
    bos: Literal["tokenizer", "every-sample", "none"]
    tokens_fingerprint: str = Field(
        description="sha256 of the ids as little-endian int64, with their shape"
    )


class CandidateSet(Record):
    """One removal that a search began with, chose from, or found."""

    criterion: str
    removed: list[int] = Field(description="ascending")
    value: float | None = Field(
        description="on the search samples: perplexity, or KL(intact || without) in nats per token"
    )
    held_out: float | None = Field(
        default=None, description="perplexity on the samples that were kept apart"
    )


class NotTried(Record):
    """A criterion that has no removal of the kind asked for."""

    criterion: str
    reason: str


class Search(Record):
    """How a searched set of blocks came about."""

    fitness: Literal["ppl", "kl"]
    candidates: list[CandidateSet] = Field(description="in the order in which they were asked for")
    found: CandidateSet = Field(description="what is removed")
    start: str | None = Field(description="the candidate that swaps or children began with")
    ordered_by: str = Field(description="the criterion whose scores order the blocks")
    rounds: list[float] = Field(
        description="mean fitness of the best set after each round, in nats per token"
    )
    stopped: str | None = Field(description="why there were no more rounds")
    evaluations: float = Field(
        description="sets measured; one measured on a part of the samples counts as that part"
    )
    search_samples: int
    held_out_samples: int
    left_out: list[NotTried] = Field(default_factory=list)


class BlockScores(ResultFile):
    """scores.json: one importance per block of the original model; higher = keep."""

    model: ModelInfo
    criterion: str
    options: dict[str, Any] = Field(default_factory=dict)
    importance: list[float]
    values: list[float] = Field(
        description="the criterion's raw numbers, e.g. perplexity without the block"
    )
    intact: float | None = Field(default=None, description="the raw number of the intact model")
    delta_nll: list[float] | None = Field(
        default=None,
        description="mean NLL without the block minus that of the intact model, in nats per token",
    )
    spans: list[list[float]] | None = Field(
        default=None,
        description="`spans[n-1][start]` is the importance of the n blocks from start on",
    )
    order: list[int] | None = Field(
        default=None,
        description="removal order, where each block was chosen with the ones before it gone; of a "
        "searched set its blocks, least important first",
    )
    removed: list[int] | None = Field(
        default=None, description="the set of blocks that was searched for; answers its size alone"
    )
    search: Search | None = Field(default=None, description="how that set came about")
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    dtype: str = Field(description="computation type of the scoring pass")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None

    @model_validator(mode="after")
    def _is_of_every_block(self) -> Self:
        """One number for each block, one for each span, and an order of blocks that there are."""
        count = self.model.blocks
        for name, numbers in (
            ("importance", self.importance),
            ("values", self.values),
            ("delta_nll", self.delta_nll),
        ):
            if numbers is not None and len(numbers) != count:
                raise ValueError(f"{name} has {len(numbers)} entries, and the model {count} blocks")
        lengths = [len(starts) for starts in self.spans or ()]
        if lengths != list(range(count, 0, -1))[: len(lengths)]:
            raise ValueError(f"spans must have one entry for each start in {count} blocks")
        for name, blocks in (("order", self.order or []), ("removed", self.removed or [])):
            if len(set(blocks)) != len(blocks) or not set(blocks) <= set(range(count)):
                raise ValueError(f"{name} must hold block numbers below {count}, once each")
        if self.removed is not None and sorted(self.order or self.removed) != sorted(self.removed):
            raise ValueError("order must hold the removed blocks")
        return self
