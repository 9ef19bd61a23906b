"""The criteria that choose sublayers and their registry: one decorated function in one file each.

A criterion gets a `Task` and returns `Ranking`: the sublayers to remove, in order. Its file loads
torch only when the function runs: the help of a command lists all criteria.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shortllm.errors import CriterionError
from shortllm.registry import MethodRegistry, RegisteredMethod, import_modules

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.journal import Journal
    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory
    from shortllm.sublayers.structure import Outputs, Sublayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a criterion gets."""

    decoder: Decoder
    outputs: Outputs
    """Output projections of the sublayers of each block."""
    candidates: Sequence[Sublayer]
    """Sublayers that may be removed."""
    remove: int
    """How many to remove."""
    ids_BT: Tensor
    """Calibration ids."""
    memory: StreamMemory
    journal: Journal
    """Where to save finished rounds, so that an interrupted choice resumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What a criterion returns."""

    order: list[tuple[Sublayer, float]]
    """The sublayers to remove, in order, each with its value."""
    intact: float | None = None
    """The value of the intact model, if there is one."""


@dataclass(frozen=True, kw_only=True)
class SublayerCriterion(RegisteredMethod):
    """A registered criterion."""

    value: str
    """What its value is, as the heading of a column."""


CRITERIA = MethodRegistry[SublayerCriterion]("sublayer criterion", CriterionError)

import_modules(__name__, __path__)
