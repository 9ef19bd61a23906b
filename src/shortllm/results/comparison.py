"""comparison.json: removals by several criteria, measured on the same text."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm.results.evaluation import Perplexity
from shortllm.results.record import Cost, ModelInfo, Record, ResultFile


class ComparedBudget(Record):
    """One column of a comparison: how many blocks go."""

    blocks: int
    ratios: list[float] = Field(description="the parts of the blocks asked for that come to it")


class LeftOut(Record):
    """A ratio that no removal can meet."""

    ratio: float
    reason: str


class RemovedSet(Record):
    """One removal, and what the model can do without these blocks."""

    order: list[int] = Field(description="the removed blocks, the first to go first")
    nll: float | None = Field(description="mean NLL in nats per predicted token")
    perplexity: float | None


class Contender(Record):
    """One row of a comparison: what one criterion removes at each budget."""

    criterion: str
    options: dict[str, Any] = Field(default_factory=dict)
    source: str = Field(description="where the criterion was published; 'baseline' for some")
    scores: str | None = Field(default=None, description="fingerprint of the scores used")
    sets: list[RemovedSet] = Field(description="one for each budget")


class Comparison(ResultFile):
    """comparison.json: removals by several criteria, all measured on the same text."""

    model: ModelInfo
    protected: list[int] = Field(description="blocks that no removal was allowed to touch")
    budgets: list[ComparedBudget] = Field(description="ascending")
    left_out: list[LeftOut] = Field(default_factory=list)
    criteria: list[Contender]
    random: list[Contender] = Field(description="seeded draws, what any criterion must beat")
    intact: Perplexity = Field(description="of the intact model; the protocol of all")
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    models: int = Field(description="different shortened models that were measured")
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = Field(default=None, description="of the measurement, without the scoring")

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        """Every contender has a set of the right size for each budget."""
        sizes = [budget.blocks for budget in self.budgets]
        for one in (*self.criteria, *self.random):
            if [len(removed.order) for removed in one.sets] != sizes:
                raise ValueError(f"{one.criterion} must hold a removal for each of {sizes} blocks")
        if not (self.budgets and self.criteria and self.random):
            raise ValueError("budgets, criteria and random must not be empty")
        return self
