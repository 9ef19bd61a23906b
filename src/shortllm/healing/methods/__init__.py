"""The methods of healing without training and their registry: one decorated function in one file.

A method gets a `Task` and returns `Healed`: new weights for projections of the source, which then
computes without the removed blocks. To write them to a checkpoint, measure the result and check it
is not its concern. Method files load torch only when their function runs: the help of a command
lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shortllm.errors import ShortLLMError
from shortllm.registry import MethodRegistry, RegisteredMethod, import_modules
from shortllm.runtime import ALONE, Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.checkpoint.source import Checkpoint
    from shortllm.healing.folding import Fold
    from shortllm.healing.gain import Scalable
    from shortllm.healing.options import HealedGap, HealOptions
    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a method gets."""

    decoder: Decoder
    """The source, with all its blocks."""
    checkpoint: Checkpoint
    """Its files."""
    removed: Collection[int]
    """Blocks of the source that the shortened model lacks."""
    ids_BT: Tensor
    """Calibration ids."""
    held_out: int
    """How many samples, the last ones, are for choices between solutions, not for solving."""
    ranks: Ranks = ALONE
    """The processes that share the samples; sums are those of all."""
    options: HealOptions
    memory: StreamMemory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Healed:
    """What a method returns."""

    gaps: list[HealedGap]
    folds: dict[int, Fold]
    """New weights by the source's block number."""
    gains: dict[int, float] = field(default_factory=dict)
    """What the hidden state behind a block is multiplied by."""
    scalable: Mapping[int, Scalable] = field(default_factory=dict)
    """How to write both: the modules that change, and what of the blocks behind is divided."""

    def applied(self, decoder: Decoder) -> AbstractContextManager[None]:
        """Within the context, the source computes with what was changed."""
        from shortllm.healing.folding import folded_into

        return folded_into(decoder, self.folds, self.gains)


@dataclass(frozen=True, kw_only=True)
class HealingMethod(RegisteredMethod):
    """A registered method."""

    check: Callable[[Checkpoint, Decoder], None]
    """Refuses a model that the method cannot heal, before anything heavy."""


METHODS = MethodRegistry[HealingMethod]("healing method", ShortLLMError)

import_modules(__name__, __path__)
