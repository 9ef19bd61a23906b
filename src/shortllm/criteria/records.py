"""How a searched set of blocks came about: part of scores.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shortllm.records import Record


class CandidateSet(Record):
    """One removal that a search began with, chose from, or found."""

    criterion: str
    removed: list[int] = Field(description="ascending")
    value: float | None = Field(
        description="on the search samples: perplexity, or KL(intact || without) in nats per token"
    )
    held_out: float | None = Field(default=None, description="perplexity on the held-out samples")


class NotTried(Record):
    """A criterion that has no removal of the requested kind."""

    criterion: str
    reason: str


class Search(Record):
    """How a searched set of blocks came about."""

    fitness: Literal["ppl", "kl"]
    candidates: list[CandidateSet] = Field(description="in the order requested")
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
