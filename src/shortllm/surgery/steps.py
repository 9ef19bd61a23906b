"""What config.json says of the steps that led to a model, under the key `shortllm`.

Needs no torch: a command refuses a model that was not shortened before it loads anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from shortllm.errors import CheckpointError
from shortllm.records import MAX_BLOCKS, Record, validation_message

PROVENANCE = "shortllm"
"""Key in config.json for the origin of a shortened checkpoint."""


class Step(Record):
    """What was removed from which model, and what was done to the rest."""

    model_config = ConfigDict(extra="ignore")

    version: str = ""
    source: str = ""
    source_fingerprint: str | None = None
    """Of a directory; earlier versions wrote its path, and no hash."""
    revision: str | None = None
    source_blocks: int = Field(ge=1, le=MAX_BLOCKS)
    removed_blocks: list[int]
    criterion: str | None = None
    paper: str | None = None
    merged: dict[str, Any] | None = None
    sublayers: dict[str, list[int]] = Field(default_factory=dict)
    width: Done | None = None
    healed: Done | None = None
    retrained: Done | None = None
    quantized: Done | None = None
    prediction_heads: Literal["kept", "dropped"] | None = None

    @model_validator(mode="after")
    def _blocks_are_of_the_source(self) -> Self:
        blocks = set(self.removed_blocks)
        if len(blocks) < len(self.removed_blocks) or not blocks < set(range(self.source_blocks)):
            raise ValueError(f"the removed blocks are not some of {self.source_blocks}")
        return self

    @property
    def trainings(self) -> list[Done]:
        """All retrainings, the first one first."""
        found, one = list[Done](), self.retrained
        while one is not None:
            found.insert(0, one)
            one = one.before
        return found


class Done(Record):
    """What a method did to a model; each kind of method has some of the fields."""

    model_config = ConfigDict(extra="ignore")

    method: str = ""
    paper: str | None = None
    ratio: float | None = None
    data: str = ""
    blocks: list[int] = Field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    scheme: str = ""
    before: Done | None = None


def steps_of(model: str, config: Mapping[str, Any]) -> list[Step]:
    """The steps that led to a model with this config.json, the first one first."""
    found = list[Step]()
    entry = config.get(PROVENANCE)
    while isinstance(entry, dict) and "removed_blocks" in entry:
        try:
            found.insert(0, Step.model_validate(entry))
        except ValidationError as error:
            raise _damaged(model, validation_message(error, Step)) from error
        entry = entry.get("parent")
    for before, step in pairwise(found):
        if step.source_blocks != before.source_blocks - len(before.removed_blocks):
            raise _damaged(
                model, f"{step.source_blocks} blocks, where the step before left another number"
            )
    return found


def derived_steps(model: str, config: Mapping[str, Any]) -> list[Step]:
    """The same of a model that is known to be derived from another one."""
    steps = steps_of(model, config)
    if not steps:
        raise CheckpointError(
            f"{model} does not say from which model it was shortened: its config.json has "
            f"no removed blocks under '{PROVENANCE}'. Give a checkpoint that `shortllm prune` wrote"
        )
    return steps


def advised(error: CheckpointError, flag: str) -> CheckpointError:
    """The same error with the advice to name the original model."""
    return CheckpointError(f"{error}. Name the original model with {flag}")


def _damaged(model: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{model}: the entry '{PROVENANCE}' of its config.json is damaged ({why}). Delete the "
        "entry, or write the checkpoint again"
    )


def kept_after(steps: Sequence[Step]) -> list[int]:
    """The numbers in the original of the blocks that are left after some steps."""
    kept = list(range(steps[0].source_blocks))
    for step in steps:
        removed = set(step.removed_blocks)
        kept = [block for place, block in enumerate(kept) if place not in removed]
    return kept
