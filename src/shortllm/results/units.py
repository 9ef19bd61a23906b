"""units.json: width against depth pruning at the same number of parameters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.results.record import ModelInfo, Record, ResultFile


class Candidate(Record):
    """One way of removing the same number of parameters."""

    name: str = Field(description="criterion of depth or method of width; its checkpoint's name")
    unit: Literal["depth", "width"]
    parameters: int
    missed: float = Field(description="part by which it misses the number of the first one")
    healed: str | None = Field(default=None, description="name of the model after retraining")


UNITS_FILE = "units.json"


class UnitsComparison(ResultFile):
    """units.json: depth and width pruning at the same number of parameters.

    What the models can do and how fast they are stands in eval.json and bench.json beside it.
    """

    model: ModelInfo
    asked: dict[str, Any] = Field(description="the budget of depth, which sets the number")
    candidates: list[Candidate]
    retraining: dict[str, Any] | None = Field(
        default=None, description="what all were healed by, as asked"
    )
    versions: dict[str, str] = Field(default_factory=dict)
