"""What is compared: criteria and ratios fitted to a model, and the one text that measures.

comparison.json: removals by several criteria, measured on the same text.

units.json: width against depth pruning at the same number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm import criteria
from shortllm.criteria.selection import ResolvedCriterion, resolve
from shortllm.data.options import CalibrationOptions
from shortllm.errors import BudgetError, CriterionError
from shortllm.evaluation.options import Perplexity
from shortllm.options import Flag, Nested, Options
from shortllm.pruning.budget import Budget, most_blocks, removal_options
from shortllm.records import Cost, ModelInfo, Record, ResultFile

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)

RANDOM_DRAWS = 10

SEGMENTS = 64
"""Segments of the text that are measured on unless told otherwise."""

FLOOR = "random"


class ComparisonText(Options):
    """The one text that criteria are compared on."""

    panel: ClassVar[str] = "Evaluation"

    data: str | None = Field(
        default=None,
        description="Text to measure on. Default: rows of --data that calibration did not use, or "
        "wikitext2.",
    )
    length: int = Field(
        default=128, ge=2, description="Tokens per window; 2048 is the usual protocol."
    )
    bos: Literal["first", "every", "none"] | None = Field(
        default=None,
        description="Add BOS before the first window or before every one. Default: first; every "
        "for Gemma models.",
    )
    max_segments: int = Field(default=SEGMENTS, ge=1, description="Measure this many windows.")


class ComparisonOptions(Options):
    """Which criteria are compared, at which budgets, on which text."""

    panel: ClassVar[str] = "Comparison"

    criteria: Annotated[list[str], Flag(name="--criterion", metavar="NAME,NAME")] = Field(
        default_factory=criteria.compared, description="Criteria to compare."
    )
    ratios: Annotated[list[float], Flag(metavar="0.1,0.2")] = Field(
        default=list(RATIOS), description="Parts of the blocks to remove."
    )
    random: int = Field(
        default=RANDOM_DRAWS,
        ge=1,
        description="Random removals of each size, which a criterion must beat.",
    )
    protect_first: int | None = Field(
        default=None,
        description="Keep this many blocks at the start. Default: 4, at most a quarter of all.",
    )
    protect_last: int | None = Field(
        default=None,
        description="Keep this many blocks at the end. Default: 2, at most a quarter of all.",
    )
    calibration: CalibrationOptions = CalibrationOptions()
    evaluation: Annotated[
        ComparisonText,
        Nested(rename={"data": "eval_data", "length": "eval_length", "bos": "eval_bos"}),
    ] = ComparisonText()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is compared, checked against the model."""

    asked: list[ResolvedCriterion]
    ratios: list[float]
    budgets: list[ComparedBudget]
    left_out: list[LeftOut]
    draws: int
    """Number of random removals at each budget."""
    protect_first: int | None = None
    protect_last: int | None = None

    def budget(self, blocks: int) -> Budget:
        """The budget of a plan that removes so many blocks."""
        return Budget(
            remove=blocks, protect_first=self.protect_first, protect_last=self.protect_last
        )

    def protected(self, count: int) -> list[int]:
        """Blocks of a model of `count` blocks that no removal may touch."""
        return self.budget(1).protected(count)


def prepare_question(
    model: ModelInfo,
    asked: Sequence[ResolvedCriterion],
    ratios: Sequence[float],
    *,
    draws: int = RANDOM_DRAWS,
    protect_first: int | None = None,
    protect_last: int | None = None,
) -> Question:
    """Fit criteria and ratios to a model.

    Ratios that come to the same number of blocks are one budget; those that no removal can meet are
    left out with the reason. A criterion that removes blocks itself gets the largest budget.

    Raises:
        BudgetError: a ratio that is none, none that can be met, or no random draw.
        CriterionError: `random` among the criteria, or an option that follows from the budgets.
    """
    if draws < 1:
        raise BudgetError(f"{draws} random removals are no floor. Give --random 1 or more")
    budgets: dict[int, list[float]] = {}
    left_out: list[LeftOut] = []
    ratios = sorted(set(ratios))
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise BudgetError(f"--ratios {ratio} is not between 0 and 1. Give e.g. 0.1,0.2,0.3")
        budget = Budget(ratio=ratio, protect_first=protect_first, protect_last=protect_last)
        budget.protected(model.blocks)
        try:
            budgets.setdefault(most_blocks(budget, model), []).append(ratio)
        except BudgetError as error:
            left_out.append(LeftOut(ratio=ratio, reason=str(error)))
    if not budgets:
        reason = left_out[0].reason if left_out else "give one or more --ratios, e.g. 0.1,0.2"
        raise BudgetError(f"there is no removal to compare: {reason}")
    largest = Budget(remove=max(budgets), protect_first=protect_first, protect_last=protect_last)
    return Question(
        asked=[_fitted(one, largest, model, budgets=len(budgets)) for one in asked],
        ratios=ratios,
        budgets=[ComparedBudget(blocks=n, ratios=found) for n, found in budgets.items()],
        left_out=left_out,
        draws=draws,
        protect_first=protect_first,
        protect_last=protect_last,
    )


def _fitted(
    asked: ResolvedCriterion, largest: Budget, model: ModelInfo, *, budgets: int
) -> ResolvedCriterion:
    """A criterion that removes blocks itself with the limits of the comparison."""
    if asked.name == FLOOR:
        raise CriterionError(
            f"'{FLOOR}' is part of every comparison. Leave it out of --criterion, and say how many "
            "draws with --random 10"
        )
    if asked.needs == "sets" and budgets > 1:
        raise CriterionError(
            f"'{asked.name}' searches for the best removal of one size, and the --ratios come to "
            f"{budgets}. Give one of them, or leave {asked.name} out"
        )
    limits = removal_options(asked, largest, model)
    for name in limits:
        if asked.options[name] != asked.criterion.defaults[name]:
            raise CriterionError(
                f"{asked.name}.{name} follows from --ratios, --protect-first and --protect-last "
                "here. Leave the option out"
            )
    return resolve(asked.name, asked.options | limits) if limits else asked


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
