"""Every choice of a removal of sublayers in one record.

sublayers.json: which sublayers went, why, and what became of them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from shortllm.errors import BudgetError, CriterionError
from shortllm.protection import protected_in
from shortllm.records import Cost, ModelInfo, Record, ResultFile
from shortllm.sublayers.structure import PARTS, Sublayer

SublayerCriterion = Literal["sublayer-ppl", "sublayer-influence"]

CRITERIA = ("sublayer-ppl", "sublayer-influence")


class SublayerOptions(Record):
    """Which sublayers go: named, or so many by a criterion."""

    criterion: SublayerCriterion | None = Field(
        default=None, description="rule that chooses; null where sublayers are named"
    )
    remove: int | None = Field(default=None, description="number of sublayers that go")
    parts: Literal["joint", "attention", "mlp"] = Field(
        default="joint", description="what may go: both kinds in one list, or one kind alone"
    )
    attention: list[int] = Field(
        default_factory=list, description="blocks whose attention goes, by name"
    )
    mlp: list[int] = Field(default_factory=list, description="blocks whose MLP goes, by name")
    protect_first: int | None = Field(
        default=None, description="leading blocks kept whole; default 4, at most a quarter"
    )
    protect_last: int | None = Field(
        default=None, description="trailing blocks kept whole; default 2, at most a quarter"
    )

    def named(self) -> list[Sublayer]:
        """The sublayers that are named, ascending."""
        found: list[Sublayer] = [(b, "attention") for b in self.attention]
        return sorted([*found, *((b, "mlp") for b in self.mlp)])

    def candidates(self, model: ModelInfo) -> list[Sublayer]:
        """What may go, ascending: the named ones, or those of blocks that are not protected.

        Raises:
            CriterionError: neither or both of a criterion and names.
            BudgetError: names or a number that the model cannot meet.
        """
        if self.named():
            return self._named_of(model)
        if self.criterion is None or self.remove is None:
            raise CriterionError(
                "nothing says which sublayers go. Give --criterion sublayer-ppl (or "
                "sublayer-influence) with --remove 4, or name blocks with --attention 3,4 and "
                "--mlp 7"
            )
        protected = set(protected_in(model, self.protect_first, self.protect_last))
        kinds = PARTS if self.parts == "joint" else (self.parts,)
        found = [(b, part) for b in range(model.blocks) if b not in protected for part in kinds]
        most = min(len(found), 2 * model.blocks - 1)
        if not 0 < self.remove <= most:
            raise BudgetError(
                f"cannot remove {self.remove} sublayers: {len(found)} may go "
                f"({', '.join(kinds)} of {model.blocks - len(protected)} blocks that are not "
                f"protected). Ask for 1 to {most}"
                + (", or pass --protect-first 0 --protect-last 0" if protected else "")
            )
        return found

    def _named_of(self, model: ModelInfo) -> list[Sublayer]:
        if self.criterion is not None or self.remove is not None:
            raise CriterionError(
                "--attention and --mlp name what goes, so that --criterion and --remove have no "
                "use. Leave out the one or the other"
            )
        for flag, blocks in (("--attention", self.attention), ("--mlp", self.mlp)):
            outside = [b for b in blocks if not 0 <= b < model.blocks]
            if outside:
                raise BudgetError(
                    f"{flag}: there is no block {outside[0]}: the model's blocks are 0 to "
                    f"{model.blocks - 1}"
                )
            if len(set(blocks)) != len(blocks):
                raise BudgetError(f"{flag} names a block twice: {','.join(map(str, blocks))}")
        if len(self.named()) == 2 * model.blocks:
            raise BudgetError("every sublayer is named. Something must stay: name fewer")
        return self.named()


RECORD = "sublayers.json"


class DroppedSublayer(Record):
    """One sublayer that went."""

    block: int = Field(description="in the source")
    part: Literal["attention", "mlp"]
    value: float | None = Field(
        description="perplexity without it and those before it, or 1 - cos of what it does to the "
        "stream; null where it was named"
    )


class SublayerDrop(ResultFile):
    """Attentions and MLPs removed from a checkpoint."""

    model: ModelInfo = Field(description="the checkpoint before")
    criterion: str | None = Field(description="null where the sublayers were named")
    options: dict[str, Any]
    dropped: list[DroppedSublayer] = Field(description="in the order in which they went")
    intact: float | None = Field(default=None, description="perplexity of the intact model")
    removed_blocks: list[int] = Field(
        description="blocks of the source that lost both, and are gone from the checkpoint"
    )
    zeroed_parameters: int = Field(description="stored as zeros: they take their space and time")
    parameters: int = Field(description="of all stored tensors, zeros included")
    bytes: int
    calibration: str | None = Field(
        default=None, description="tokens_fingerprint of the calibration"
    )
    dtype: str = Field(description="computation type of the scoring pass")
    versions: dict[str, str] = Field(default_factory=dict)
    cost: Cost | None = None

    def blocks(self, part: str) -> list[int]:
        """Blocks of the source that lost this part, ascending."""
        return sorted(one.block for one in self.dropped if one.part == part)
