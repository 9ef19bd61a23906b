"""What eval.json has of the probe: shares of right answers, paired by exercise, and repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pydantic import Field

from shortllm.evaluation.statistics import standard_error
from shortllm.records import Record

CLEAR = 2.0
"""Standard errors from which a change is stated."""


class Share(Record):
    """How many exercises were solved."""

    share: float = Field(description="in [0, 1]")
    stderr: float | None = Field(description="its standard error, over exercises")
    outcomes: str = Field(description="1 or 0 for each exercise, in order")

    @staticmethod
    def of(solved: Sequence[bool]) -> Share:
        """The share of solved exercises."""
        values = [float(one) for one in solved]
        return Share(
            share=fmean(values),
            stderr=standard_error(values),
            outcomes="".join(str(int(one)) for one in solved),
        )


class CapabilityScore(Record):
    """One capability of one model."""

    capability: str
    items: int
    written: Share = Field(
        description="greedy decoding writes exactly the right answer, and ends it"
    )
    chosen: Share = Field(description="the right answer is the likeliest of four; by chance 0.25")


class Answers(Record):
    """Open answers, which say nothing of what is right."""

    texts: list[str] = Field(description="written greedily")
    new_tokens: int = Field(description="most tokens of each")
    repeated: list[float] = Field(
        description="of each answer, the share of its 4-grams of tokens that it already had before"
    )
    distinct: float = Field(description="different 2-grams of tokens as a share of all 2-grams")


class Probe(Record):
    """What one model can do."""

    version: str
    items_fingerprint: str = Field(description="of all exercises and requests")
    capabilities: list[CapabilityScore]
    repetition: float | None = Field(
        default=None,
        description="mean share of repeated 4-grams in open answers, in [0, 1]; null without them",
    )
    answers: Answers | None = Field(
        default=None, description="null for a streamed model, which does not generate"
    )


@dataclass(frozen=True, slots=True)
class Change:
    """One number of two models."""

    name: str
    before: float
    after: float
    stderr: float | None
    """Of the paired difference."""

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.stderr is not None and abs(self.after - self.before) > CLEAR * self.stderr

    @staticmethod
    def between(name: str, before: Sequence[float], after: Sequence[float]) -> Change:
        """The change of a mean over the same exercises."""
        differences = [now - then for then, now in zip(before, after, strict=True)]
        return Change(name, fmean(before), fmean(after), standard_error(differences))


def changes(before: Probe, after: Probe) -> list[Change]:
    """Of each capability the change of what is written; none where the exercises differ."""
    if before.items_fingerprint != after.items_fingerprint:
        return []
    return [
        Change.between(one.capability, _values(one.written), _values(other.written))
        for one, other in zip(before.capabilities, after.capabilities, strict=True)
    ]


def change_of_repetition(before: Probe, after: Probe) -> Change | None:
    """How much more a model repeats itself; None where the answers are not known."""
    if before.items_fingerprint != after.items_fingerprint:
        return None
    if before.answers is None or after.answers is None:
        return None
    return Change.between("repetition", before.answers.repeated, after.answers.repeated)


def _values(share: Share) -> list[float]:
    return [float(one) for one in share.outcomes]
