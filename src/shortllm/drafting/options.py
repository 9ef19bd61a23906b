"""The options of `draft`, and draft.json: every number of blocks, what was measured, and the best.

Times are in units of the time that the intact model takes for one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from shortllm.errors import ResultFileError
from shortllm.format import counted, fixed, plain
from shortllm.healing.options import HealOptions
from shortllm.healing.options import MethodName as HealMethod
from shortllm.options import Flag, Nested, Options
from shortllm.pruning.budget import ProtectFirst, ProtectLast
from shortllm.recipe import HEAL, RETRAIN, by_method
from shortllm.records import ModelInfo, Record, ResultFile
from shortllm.retraining.options import MethodName as RetrainMethod
from shortllm.retraining.options import RetrainOptions
from shortllm.shown import Shown, data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

PLAIN = "draft"
"""Directory of the draft as it was cut out of the intact model, and its name in results."""

TRAINING_TEXTS = 256
"""Texts that are written for healing and training, unless it is said how many."""


UNFINISHED = "not finished: nothing was measured yet. Run the same command again"
"""What is said of the record of an interrupted call."""


class DraftOptions(Options):
    """How a draft is chosen: the text, the numbers of blocks, the lengths."""

    panel: ClassVar[str] = "Draft"

    prompts: Annotated[list[str], Flag(metavar="DATA", repeated=True)] = Field(
        default_factory=list,
        description="What the intact model writes to: conversations, of which it answers the first "
        "request, or texts, whose beginnings it continues; may be repeated. Default: built-in "
        "texts and requests.",
    )
    texts: int = Field(
        default=8,
        ge=2,
        description="Texts that it writes to prompts of each kind: every other one is to measure "
        "on, the others to choose by.",
    )
    new_tokens: int = Field(default=128, ge=2, description="Most tokens that it writes of each.")
    temperature: float = Field(
        default=0.0, ge=0, description="Of the sampling; 0 takes the likeliest token."
    )
    remove: int | None = Field(
        default=None,
        ge=1,
        description="Number of blocks to remove. Default: as many as make the fastest draft.",
    )
    least: float = Field(default=0.1, gt=0, lt=1, description="Least part of the blocks to try.")
    most: float = Field(default=0.6, gt=0, lt=1, description="Most part of the blocks to try.")
    protect_first: ProtectFirst = None
    protect_last: ProtectLast = None
    period_aligned: bool = Field(
        default=False, description="Remove only whole periods where the kinds of blocks repeat."
    )
    draft_tokens: int = Field(
        default=8, ge=1, description="Most tokens that are drafted at a time."
    )
    measured: int = Field(
        default=4, ge=1, description="Numbers of blocks that are measured, not predicted alone."
    )
    runs: int = Field(default=2, ge=1, description="Measured runs of each, in turn.")
    write: int | None = Field(
        default=None,
        ge=2,
        description="Further texts that the intact model writes, for --heal and --retrain. "
        f"Default: {TRAINING_TEXTS}.",
    )
    seed: Annotated[int, Flag(hidden=True)] = Field(default=0, description="Seed of the sampling.")
    healing: Annotated[HealOptions | None, Nested(skip=True), HEAL] = Field(
        default=None,
        description="How to heal the draft without training, on the text that was written for it.",
    )
    retraining: Annotated[RetrainOptions | None, Nested(skip=True), RETRAIN] = Field(
        default=None,
        description="How to train the draft as it was cut, not healed, on the text that was "
        "written for it.",
    )

    @field_validator(
        "healing", mode="before", json_schema_input_type=HealOptions | HealMethod | None
    )
    @classmethod
    def _healing_by_name(cls, given: Any) -> Any:
        return by_method(given)

    @field_validator(
        "retraining", mode="before", json_schema_input_type=RetrainOptions | RetrainMethod | None
    )
    @classmethod
    def _retraining_by_name(cls, given: Any) -> Any:
        return by_method(given)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.least > self.most:
            raise ValueError(
                f"--least {self.least:g} is more than --most {self.most:g}. Give a lower one"
            )
        if self.remove is not None and (unused := {"least", "most"} & self.model_fields_set):
            raise ValueError(
                f"--{min(unused)} has no effect with --remove {self.remove}. Leave one out"
            )
        return self

    @property
    def recovers(self) -> bool:
        """Whether the draft is healed or trained."""
        return self.healing is not None or self.retraining is not None

    @property
    def heals_on_written(self) -> bool:
        """Whether the draft is healed on what the intact model writes for it."""
        if self.healing is None:
            return False
        text = self.healing.calibration
        return not text.texts and text.file is None

    @property
    def trains_on_written(self) -> bool:
        """Whether the draft is trained on that."""
        return self.retraining is not None and self.retraining.data is None

    @property
    def further_texts(self) -> int:
        """How many texts the intact model writes for them."""
        read = self.heals_on_written or self.trains_on_written
        return (self.write or TRAINING_TEXTS) if read else 0


Share = Annotated[float, Field(ge=0, le=1)]


class Accepted(Record):
    """What the intact model accepts of a draft's tokens on some text."""

    acceptance: Share = Field(description="probability that a drafted token is accepted, mean")
    tokens_per_step: list[float] = Field(
        description="by the number of drafted tokens, from 1: those accepted, and one more"
    )


class DraftSize(Record):
    """A number of blocks, and what a draft without them is expected to gain."""

    removed: list[int] = Field(description="ascending")
    chosen_on: Accepted = Field(description="on the texts to choose by")
    held_out: Accepted = Field(description="on the others")
    cost: float | None = Field(default=None, description="time of a drafted token")
    draft_tokens: int | None = Field(default=None, description="with the highest gain, predicted")
    predicted: float | None = Field(default=None, description="the gain")
    ideal: float | None = Field(
        default=None,
        description="that of Leviathan et al. for this acceptance and cost, at its own best length",
    )

    @property
    def remove(self) -> int:
        """How many blocks."""
        return len(self.removed)


class DraftCosts(Record):
    """Times on this machine, relative to that of one token of the intact model."""

    token_s: float = Field(description="seconds that the intact model takes for one token, alone")
    drafting: dict[int, float] = Field(description="removed blocks -> time of a drafted token")
    verifying: dict[int, float] = Field(
        description="drafted tokens -> time of a step without that of drafting them"
    )


class MeasuredDraft(Record):
    """A draft that helped the intact model to write the texts to measure on."""

    name: str = Field(description="'draft', 'healed' or 'retrained'")
    removed: list[int]
    draft_tokens: int
    predicted: float = Field(
        description="gain by the texts to choose by; of a recovered draft, as below"
    )
    predicted_here: float = Field(description="gain by what is accepted on these very texts")
    speedup: float = Field(
        description="tokens of a step over its median time, in units of the time that the model "
        "alone took for a token in the same turn"
    )
    tokens_per_s: float
    alone_tokens_per_s: float
    tokens_per_step: float
    kept: Share = Field(
        description="part of the drafted tokens that was kept; behind one that is not, none is"
    )
    near_ties: int = Field(
        default=0,
        description="texts that came out otherwise, where two tokens were equal up to rounding",
    )

    @property
    def remove(self) -> int:
        """How many blocks."""
        return len(self.removed)


class RecoveredDraft(Record):
    """A draft after healing or training."""

    name: str
    before: Accepted = Field(description="on the texts to measure on")
    after: Accepted
    fingerprint: str = Field(description="of the checkpoint")


class Drafting(Shown, ResultFile):
    """draft.json: which blocks a draft can do without, how many tokens it drafts, what it gains."""

    FILE: ClassVar[str] = "draft.json"

    model: ModelInfo
    criterion: str
    temperature: float
    prompts: list[str] = Field(description="what the intact model wrote to")
    texts: int
    new_tokens: int = Field(description="most tokens of a text")
    tokens: int = Field(description="tokens of all texts that the intact model wrote")
    sizes: list[DraftSize] = Field(description="ascending")
    costs: DraftCosts | None = None
    measured: list[MeasuredDraft] = Field(default_factory=list)
    recovered: list[RecoveredDraft] = Field(default_factory=list)
    dtype: str
    device_name: str
    threads: int
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _measured_belong_to_sizes(self) -> Self:
        sizes = {one.remove for one in self.sizes}
        if any(one.remove not in sizes for one in self.measured):
            raise ValueError("a draft was measured of a number of blocks that no size has")
        if self.measured and all(one.name != PLAIN for one in self.measured):
            raise ValueError(f"nothing measured is called {PLAIN!r}; the plain draft always is")
        return self

    @property
    def best(self) -> MeasuredDraft:
        """The one with the highest measured gain."""
        if not self.measured:
            raise ResultFileError(f"the draft of {self.model.id} is {UNFINISHED}")
        return max(self.measured, key=lambda one: one.speedup)

    @property
    def best_plain(self) -> MeasuredDraft:
        """The same of those that were neither healed nor trained."""
        plain = (one for one in self.measured if one.name == PLAIN)
        return max(plain, key=lambda one: one.speedup)

    @property
    def verdict(self) -> str:
        """Whether a draft is worth it, in one sentence."""
        best = self.best
        how = "" if best.name == PLAIN else f" and {best.name}"
        name = f"{counted(best.remove, 'block')} removed{how}"
        times = plain(fixed(best.speedup))
        tokens = counted(best.draft_tokens, "token")
        if best.speedup <= 1:
            return (
                f"no draft is worth it here: the best one ({name}, {tokens} at a time) runs at "
                f"{times} times the speed"
            )
        return (
            f"with {name} and {tokens} drafted at a time, text comes {times} times as fast, and "
            + ("it is the same text" if self.temperature == 0 else "from the same distribution")
        )

    def __str__(self) -> str:
        """'embedded: with 4 blocks removed and 3 tokens drafted at a time, text comes ...'."""
        return f"{self.model.id}: {self.verdict if self.measured else UNFINISHED}"

    def to_dataframe(self) -> DataFrame:
        """A row for each number of blocks.

        Columns: `model`; `remove`, how many blocks go, and `ratio`, that number over all;
        `removed`, which; `acceptance` of a drafted token on the texts to choose by, and
        `held_out_acceptance` on the others, in [0, 1]; `cost` of a drafted token, in tokens of the
        intact model; `draft_tokens`, the best number at a time; `predicted` and `ideal`, the gain
        in speed; `speedup`, the gain that was measured, none where it was not.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        return data_frame(self._rows(), whole=["draft_tokens"])

    def found(self, remove: int) -> MeasuredDraft | None:
        """What was measured of the draft without this many blocks, neither healed nor trained."""
        same = (one for one in self.measured if one.name == PLAIN and one.remove == remove)
        return next(same, None)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for one in self.sizes:
            found = self.found(one.remove)
            yield {
                "model": self.model.id,
                "remove": one.remove,
                "ratio": one.remove / self.model.blocks,
                "removed": one.removed,
                "acceptance": one.chosen_on.acceptance,
                "held_out_acceptance": one.held_out.acceptance,
                "cost": one.cost,
                "draft_tokens": one.draft_tokens,
                "predicted": one.predicted,
                "ideal": one.ideal,
                "speedup": found and found.speedup,
            }
