"""scores.json, plan.json and target.json: importances, the removed blocks, and their number."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from shortllm.checkpoint.hub import EMBEDDED, is_gguf
from shortllm.criteria.search import Search
from shortllm.errors import ResultFileError
from shortllm.format import counted
from shortllm.pruning.budget import TARGETS
from shortllm.records import Cost, DerivedRecord, JsonObject, ModelInfo, Record, ResultFile
from shortllm.shown import Shown, data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

WITHOUT_PLAN = "Or name the blocks themselves, as in --blocks 3,4,8"
"""What to do where there is no plan."""

SHOWN_BLOCKS = 5
"""Least important blocks that scores name in one line."""


def removal_order(importance: Sequence[float], protected: Collection[int] = ()) -> list[int]:
    """Unprotected blocks, least important first; of equals the later first."""
    free = set(range(len(importance))) - set(protected)
    return sorted(free, key=lambda block: (importance[block], -block))


class BlockScores(Shown, ResultFile):
    """scores.json: one importance per block of the original model; higher = keep."""

    model: ModelInfo
    criterion: str
    options: JsonObject = Field(default_factory=dict)
    importance: list[float]
    values: list[float] = Field(
        description="the criterion's raw numbers, e.g. perplexity without the block"
    )
    intact: float | None = Field(default=None, description="the raw number of the intact model")
    delta_nll: list[float] | None = Field(
        default=None,
        description="mean NLL without the block minus that of the intact model, in nats per token",
    )
    samples: list[list[float]] | None = Field(
        default=None,
        description="for each block the criterion's number of each calibration sample, whose plain "
        "mean is the criterion's: in nats by `ppl` and `kl`, of an item by `task`",
    )
    stderr: list[float] | None = Field(
        default=None,
        description="for each block the standard error of the importance, over samples; what is "
        "hard in a text is hard without any block, so blocks differ more clearly than these say",
    )
    delta_stderr: list[float] | None = Field(
        default=None, description="standard error of delta_nll, paired by sample"
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
            ("stderr", self.stderr),
            ("delta_stderr", self.delta_stderr),
        ):
            if numbers is not None and len(numbers) != count:
                raise ValueError(f"{name} has {len(numbers)} entries, and the model {count} blocks")
        of_samples = self.samples if self.samples is not None else [[]] * count
        if len(of_samples) != count or len(set(map(len, of_samples))) > 1:
            raise ValueError(f"samples must have equally many numbers for each of {count} blocks")
        lengths = [len(starts) for starts in self.spans or ()]
        if lengths != list(range(count, 0, -1))[: len(lengths)]:
            raise ValueError(f"spans must have one entry for each start in {count} blocks")
        for name, blocks in (("order", self.order or []), ("removed", self.removed or [])):
            if len(set(blocks)) != len(blocks) or not set(blocks) <= set(range(count)):
                raise ValueError(f"{name} must hold block numbers below {count}, once each")
        if self.removed is not None and sorted(self.order or self.removed) != sorted(self.removed):
            raise ValueError("order must hold the removed blocks")
        return self

    @property
    def ranks(self) -> dict[int, int]:
        """The place of each block in the removal order, from 1."""
        return {block: place for place, block in enumerate(removal_order(self.importance), 1)}

    def __str__(self) -> str:
        """'embedded: 12 blocks by ppl, least important first: 7, 5, 6, 4, 8, ...'."""
        order = removal_order(self.importance)
        first = order[:SHOWN_BLOCKS]
        return (
            f"{self.model.id}: {counted(self.model.blocks, 'block')} by {self.criterion}, least "
            f"important first: {', '.join(map(str, first))}{', ...' * (len(order) > len(first))}"
        )

    def to_dataframe(self) -> DataFrame:
        """A row for each block.

        Columns: `model` and `criterion`; `block`, counted from 0; `importance`, higher = keep;
        `value`, the criterion's raw number, e.g. the perplexity without the block; `stderr`, the
        standard error of the importance over samples; `delta_nll`, by how much the loss rises
        without it, in nats per token (none where not measured), and `delta_stderr`, its standard
        error; `rank`, 1 = least important.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        ranks, none = self.ranks, itertools.repeat(None)
        deltas = zip(self.delta_nll or none, self.delta_stderr or none, strict=False)
        columns = zip(self.importance, self.values, self.stderr or none, deltas, strict=False)
        return data_frame(
            {
                "model": self.model.id,
                "criterion": self.criterion,
                "block": block,
                "importance": importance,
                "value": value,
                "stderr": stderr,
                "delta_nll": delta,
                "delta_stderr": delta_stderr,
                "rank": ranks[block],
            }
            for block, (importance, value, stderr, (delta, delta_stderr)) in enumerate(columns)
        )


class Size(Record):
    """How much, in blocks and in parameters."""

    blocks: int
    block_ratio: float
    parameters: int
    parameter_ratio: float


class PrunePlan(Shown, ResultFile):
    """plan.json: which blocks go, in which order, and why."""

    model: ModelInfo
    criterion: str | None = Field(description="null where the blocks were given by hand")
    kept: list[int]
    removed: list[int] = Field(description="ascending")
    protected: list[int] = Field(description="blocks the plan was not allowed to remove")
    order: list[int] = Field(description="removal order, least important first")
    asked: JsonObject = Field(
        description="the budget as asked, e.g. {'remove': 3} or {'ratio': 0.25}"
    )
    reached: Size = Field(description="what the removal takes away")
    reason: str = Field(description="one sentence for a reader")
    near_ties: list[int] = Field(
        default_factory=list,
        description="removed blocks, and kept ones, whose order by the scores may be chance",
    )
    scores: str | None = Field(default=None, description="fingerprint of the scores used")

    @model_validator(mode="after")
    def _is_a_partition(self) -> Self:
        """Every block is either kept or removed, once, and something is kept."""
        for name, blocks in (("kept", self.kept), ("removed", self.removed)):
            if blocks != sorted(set(blocks)):
                raise ValueError(f"{name} must list block numbers once each, ascending")
        numbers = list(range(self.model.blocks))
        if sorted(self.kept + self.removed) != numbers or not self.kept:
            raise ValueError(f"kept and removed must share out the {self.model.blocks} blocks")
        if sorted(self.order) != self.removed:
            raise ValueError("order must hold the removed blocks")
        if not set(self.protected) <= set(numbers) - set(self.removed):
            raise ValueError("protected must hold blocks that stay")
        if self.reached.blocks != len(self.removed):
            raise ValueError(f"reached speaks of {self.reached.blocks} removed blocks")
        return self

    @property
    def statuses(self) -> list[Literal["kept", "removed", "protected"]]:
        """What happens to each block; protected ones are kept."""
        removed, protected = set(self.removed), set(self.protected)
        return [
            "removed" if block in removed else "protected" if block in protected else "kept"
            for block in range(self.model.blocks)
        ]

    def __str__(self) -> str:
        """'embedded: 12 -> 9 blocks, without 4, 5, 7 (18.1% of the parameters)'."""
        return (
            f"{self.model.id}: {self.model.blocks} -> {counted(len(self.kept), 'block')}, without "
            f"{', '.join(map(str, self.removed))} ({self.reached.parameter_ratio:.1%} of the "
            "parameters)"
        )

    def to_dataframe(self) -> DataFrame:
        """A row for each block of the original.

        Columns: `model`; `block`, counted from 0; `status`: kept, removed, or protected (kept too);
        `order`, the place in the removal order, from 1 (none where it stays); `new_block`, the
        number in the shortened model (none where it goes); `parameters` of the block.

        Returns:
            A pandas data frame.
        Raises:
            ShortLLMError: pandas is not installed.
        """
        place = {block: number for number, block in enumerate(self.order, start=1)}
        new = {block: number for number, block in enumerate(self.kept)}
        parameters = dict(enumerate(self.model.parameters_per_block))
        rows = (
            {
                "model": self.model.id,
                "block": block,
                "status": status,
                "order": place.get(block),
                "new_block": new.get(block),
                "parameters": parameters.get(block),
            }
            for block, status in enumerate(self.statuses)
        )
        return data_frame(rows, whole=["order", "new_block", "parameters"])


class Pruning(DerivedRecord):
    """prune.json: which blocks were removed from a checkpoint."""

    FILE: ClassVar[str] = "prune.json"

    criterion: str | None = Field(description="null if the blocks were named")
    kept: list[int] = Field(description="block numbers of the source, ascending")
    removed: list[int] = Field(description="block numbers of the source, ascending")


def scores_path(path: Path) -> Path:
    """A file of scores, or the only one of a run directory."""
    several = sorted(path.glob("scores-*.json"))
    file = path / "scores.json" if path.is_dir() else path
    known = file.exists() or several
    if is_gguf(path) or not known and (str(path) == EMBEDDED or (path / "config.json").exists()):
        raise ResultFileError(
            f"{path} is a model. Score it first: shortllm score {path} --out DIR, then shortllm "
            "plan DIR"
        )
    if not known:
        raise ResultFileError(
            f"there are no scores in {path}. Score first: shortllm score MODEL --out {path}"
        )
    if not file.exists():
        raise ResultFileError(
            f"{path} contains scores by several criteria. Give one: {', '.join(map(str, several))}"
        )
    return file


def load_plan(path: Path) -> PrunePlan:
    """A plan.json, or that of a run directory."""
    file = path / "plan.json" if path.is_dir() else path
    if not file.exists():
        raise ResultFileError(
            f"there is no plan in {path}. Make one first: shortllm plan SCORES --out "
            f"{path if path.suffix == '.json' else path / 'plan.json'}. {WITHOUT_PLAN}"
        )
    try:
        return PrunePlan.load(file)
    except ResultFileError as error:
        raise ResultFileError(
            f"{error}. A plan is the file plan.json that `shortllm plan` writes: the blocks to "
            f"remove, and why. {WITHOUT_PLAN}"
        ) from error


class DepthSpeed(Record):
    """How fast a model is with its last blocks bypassed."""

    blocks: int = Field(description="blocks that ran")
    latency_s: float = Field(description="median")
    speedup: float = Field(description="over the intact model")


TARGET_FILE = "target.json"


class Target(ResultFile):
    """target.json: the number of blocks that a target came to."""

    model: ModelInfo
    asked: dict[str, float] = Field(description="e.g. {'target_speedup': 1.3}")
    remove: int = Field(description="blocks to remove")
    expected: float = Field(
        description="speed-up by a straight line; parameters or bytes that are left, at most"
    )
    reached: float = Field(description="the same, verified: measured again, or as expected")
    dtype: str | None = Field(default=None, description="type that bytes were counted in")
    depths: list[DepthSpeed] = Field(default_factory=list, description="what was measured")

    @model_validator(mode="after")
    def _is_one_target(self) -> Self:
        """One amount was requested, of a known kind."""
        if len(self.asked) != 1 or not set(self.asked) <= set(TARGETS):
            raise ValueError(f"asked must hold one of {', '.join(TARGETS)}")
        return self

    @property
    def described(self) -> str:
        """One line for a reader."""
        [(name, value)] = self.asked.items()
        removed = f"{self.remove} of {self.model.blocks} blocks removed"
        if name == "target_speedup":
            return f"speed-up {value:g}: {removed}, {self.reached:.3g} measured"
        if name == "target_params":
            return f"{value:,.0f} parameters: {removed}, at most {self.reached:,.0f} left"
        return f"{value / 2**30:.3g} GiB: {removed}, at most {self.reached / 2**30:.3g} GiB left"

    @property
    def is_met(self) -> bool:
        """Whether the verified size or speed meets the target."""
        [(name, value)] = self.asked.items()
        return self.reached >= value if name == "target_speedup" else self.reached <= value
