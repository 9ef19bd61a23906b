"""Options and records of the comparisons, and who wins that of criteria.

comparison.json: removals by several criteria, measured on the same text.
units.json: width against depth pruning at the same number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm import criteria
from shortllm.data.options import CalibrationOptions
from shortllm.evaluation.options import Difference, Perplexity, WindowBos, WindowLength
from shortllm.format import counted, listed, percent
from shortllm.options import Flag, Nested, Options
from shortllm.pruning.budget import ProtectFirst, ProtectLast
from shortllm.records import Cost, JsonObject, ModelInfo, Record, ResultFile
from shortllm.shown import Shown, data_frame
from shortllm.width_pruning.methods import METHODS

if TYPE_CHECKING:
    from pandas import DataFrame

DEPTH = ("ppl", "taylor")
"""Criteria of depth pruning that are compared with width pruning by default."""
WIDTH = METHODS.names()


class ComparisonText(Options):
    """The one text that criteria are compared on."""

    panel: ClassVar[str] = "Evaluation"

    data: str | None = Field(
        default=None,
        description="Text to measure on. Default: rows of --data that calibration did not use, or "
        "wikitext2.",
    )
    length: WindowLength = 128
    bos: WindowBos = None
    max_segments: int = Field(default=64, ge=1, description="Measure this many windows.")


class ComparisonOptions(Options):
    """Which criteria are compared, at which budgets, on which text."""

    panel: ClassVar[str] = "Comparison"

    criteria: Annotated[list[str], Flag(name="--criterion", metavar="NAME,NAME")] = Field(
        default_factory=criteria.compared, description="Criteria to compare."
    )
    texts: Annotated[list[str], Flag(name="--text", metavar="DATA", repeated=True)] = Field(
        default_factory=list,
        description="Compare texts to score on, each in the place of --data, e.g. --text c4 --text "
        "alpaca --text generated:alpaca; may be repeated. With --answers-only, only answers count "
        "where there are some.",
    )
    ratios: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Flag(metavar="0.1,0.2")] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5],
        min_length=1,
        description="Parts of the blocks to remove.",
    )
    random: int = Field(
        default=10,
        ge=1,
        description="Random removals of each size, which a criterion must beat.",
    )
    protect_first: ProtectFirst = None
    protect_last: ProtectLast = None
    calibration: CalibrationOptions = CalibrationOptions()
    evaluation: Annotated[
        ComparisonText,
        Nested(rename={"data": "eval_data", "length": "eval_length", "bos": "eval_bos"}),
    ] = ComparisonText()


class ComparedBudget(Record):
    """One column of a comparison: how many blocks go."""

    blocks: int
    ratios: list[float] = Field(description="the requested parts of the blocks that come to it")


class LeftOut(Record):
    """A ratio that no removal can meet."""

    ratio: float
    reason: str


class RemovedSet(Record):
    """One removal, and what the model can do without these blocks."""

    order: list[int] = Field(description="the removed blocks, the first to go first")
    nll: float | None = Field(description="mean NLL in nats per predicted token")
    perplexity: float | None
    stderr: float | None = Field(
        default=None, description="standard error of the perplexity, over segments"
    )
    behind: Difference | None = Field(
        default=None, description="from the lowest of the same budget, paired by segment"
    )


class Contender(Record):
    """One row of a comparison: what one criterion removes at each budget."""

    criterion: str
    text: str | None = Field(
        default=None, description="what it scored on, where texts are compared; null: the same"
    )
    options: JsonObject = Field(default_factory=dict)
    source: str = Field(description="where the criterion was published; 'baseline' for some")
    scores: str | None = Field(default=None, description="fingerprint of the scores used")
    sets: list[RemovedSet] = Field(description="one for each budget")

    @property
    def name(self) -> str:
        """The criterion, and the text where texts are compared: 'ppl on c4:train'."""
        return self.criterion if self.text is None else f"{self.criterion} on {self.text}"


class Comparison(Shown, ResultFile):
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
                raise ValueError(f"{one.criterion} must have a removal for each of {sizes} blocks")
        if not (self.budgets and self.criteria and self.random):
            raise ValueError("budgets, criteria and random must not be empty")
        return self

    def __str__(self) -> str:
        """'embedded: lowest perplexity: ppl at 2 of 3 budgets; taylor at 1'."""
        return f"{self.model.id}: lowest perplexity: {winners(self)}"

    def to_dataframe(self) -> DataFrame:
        """A row for each criterion and random draw at each budget.

        Columns: `model`; `criterion`; `text`, where texts are compared; `random`, whether it is a
        random draw; `blocks`, how many are removed, and `ratio`, that number over all; `removed`,
        the block numbers, the first to go first; `nll`, the mean loss of what is left in nats per
        token; `perplexity`, and its `stderr`; `behind_nll`, by how much the loss is above that of
        the best set of the same size, in nats per token, and `behind_stderr`. What could not be
        measured is none.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        contenders = [
            *((one, False) for one in self.criteria),
            *((one, True) for one in self.random),
        ]
        return data_frame(
            {
                "model": self.model.id,
                "criterion": one.criterion,
                "text": one.text,
                "random": random,
                "blocks": len(found.order),
                "ratio": len(found.order) / self.model.blocks,
                "removed": found.order,
                "nll": found.nll,
                "perplexity": found.perplexity,
                "stderr": found.stderr,
                "behind_nll": found.behind.nll if found.behind else None,
                "behind_stderr": found.behind.stderr if found.behind else None,
            }
            for one, random in contenders
            for found in one.sets
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One budget: what criteria and random draws reach. Infinity where there was no perplexity."""

    name: str
    """The requested ratios, e.g. '10 %', or '10/20 %' where both come to the same blocks."""
    blocks: int
    perplexities: list[float]
    """One for each criterion."""
    best: list[str]
    """The criteria with the lowest perplexity; several where they remove the same blocks."""
    random: list[float]
    """One for each draw."""

    @property
    def random_mean(self) -> float:
        """Mean perplexity of the random removals."""
        return sum(self.random) / len(self.random)

    @property
    def beat_mean(self) -> int:
        """Criteria below the mean of the draws."""
        return sum(value < self.random_mean for value in self.perplexities)

    @property
    def beat_all(self) -> int:
        """Criteria below every draw."""
        return sum(value < min(self.random) for value in self.perplexities)


def standings(comparison: Comparison) -> list[Standing]:
    """One for each budget."""
    found = []
    for place, budget in enumerate(comparison.budgets):
        reached = _perplexities(comparison.criteria, place)
        contenders = zip(comparison.criteria, reached, strict=True)
        least = [one.name for one, value in contenders if value == min(reached)]
        found.append(
            Standing(
                name=f"{'/'.join(f'{100 * ratio:.4g}' for ratio in budget.ratios)} %",
                blocks=budget.blocks,
                perplexities=reached,
                best=least if math.isfinite(min(reached)) else [],
                random=_perplexities(comparison.random, place),
            )
        )
    return found


def _perplexities(contenders: Sequence[Contender], place: int) -> list[float]:
    values = [one.sets[place].perplexity for one in contenders]
    return [math.inf if value is None else value for value in values]


def winners(comparison: Comparison) -> str:
    """Which criteria win most often: 'ppl at 2 of 3 budgets; taylor at 1'."""
    columns = standings(comparison)
    best = [name for column in columns for name in column.best]
    wins: dict[int, list[str]] = {}
    for name in sorted(set(best), key=lambda name: (-best.count(name), best.index(name))):
        wins.setdefault(best.count(name), []).append(name)
    won = [f"{listed(names)} at {number}" for number, names in wins.items()][:2]
    won[:1] = [f"{text} of {counted(len(columns), 'budget')}" for text in won[:1]]
    return "; ".join(won) or "none could be measured"


def verdict(comparison: Comparison) -> str:
    """Which criteria win most often, and whether they are better than chance, in two sentences."""
    columns, count = standings(comparison), len(comparison.criteria)
    beat = sorted({column.beat_mean for column in columns})
    some = str(beat[0]) if len(beat) == 1 else f"{beat[0]} to {beat[-1]}"
    return (
        f"Lowest perplexity: {winners(comparison)}. At each budget {some} "
        f"of {count} criteria are better than the mean of {len(comparison.random)} random removals."
    )


class Candidate(Record):
    """One way of removing the same number of parameters."""

    name: str = Field(description="criterion of depth or method of width; its checkpoint's name")
    unit: Literal["depth", "width"]
    parameters: int
    missed: float = Field(description="part by which it misses the number of the first one")
    healed: str | None = Field(
        default=None,
        description="name of the model healed without training: depth by the recipe's method, "
        "width by the repair of its output projections",
    )
    retrained: str | None = Field(default=None, description="name of the model after retraining")


UNITS_FILE = "units.json"


class UnitsComparison(Shown, ResultFile):
    """units.json: depth and width pruning at the same number of parameters.

    Quality and speed of the models are in eval.json and bench.json next to it.
    """

    model: ModelInfo
    asked: JsonObject = Field(description="the budget of depth, which sets the number")
    candidates: list[Candidate] = Field(min_length=1)
    healing: JsonObject | None = Field(
        default=None, description="how those of depth were healed without training, as requested"
    )
    retraining: JsonObject | None = Field(
        default=None, description="how all were retrained, as requested"
    )
    versions: dict[str, str] = Field(default_factory=dict)

    def __str__(self) -> str:
        """'embedded: ppl (depth), flap (width) with 12 % fewer parameters'."""
        names = ", ".join(f"{one.name} ({one.unit})" for one in self.candidates)
        saved = percent(1 - self.candidates[0].parameters / self.model.parameters)
        return f"{self.model.id}: {names} with {saved} fewer parameters"

    def to_dataframe(self) -> DataFrame:
        """A row for each method.

        Columns: `name` of the criterion or method; `unit`, depth or width; `parameters` that are
        left; `missed`, the part by which that misses the number of the first one; `healed` and
        `retrained`, the names of the repaired models in eval.json and bench.json (none without).

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        return data_frame(one.model_dump() for one in self.candidates)
