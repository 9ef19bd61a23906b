"""The methods of width pruning and their registry: one decorated function in one file each.

A method gets a `Task` and returns `Chosen`: which heads and neurons to remove from each block. To
find them, cut them out of the files and check the result is not its concern. Importance: *higher =
keep*, for every method. Adding one: docs/add_a_baseline.md.

Method files load torch only when their function runs: the help of a command lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shortllm.errors import ShortLLMError
from shortllm.registry import MethodRegistry, RegisteredMethod, import_modules

if TYPE_CHECKING:
    from torch import Tensor

    from shortllm.healing.folding import Fold
    from shortllm.model.decoder import Decoder
    from shortllm.model.hidden_states import StreamMemory
    from shortllm.width_pruning.groups import BlockGroups, Removed
    from shortllm.width_pruning.options import RepairedProjection, WidthOptions


@dataclass(slots=True, kw_only=True)
class Task:
    """What a method gets: the model, the text, and how much to remove."""

    decoder: Decoder
    ids_BT: Tensor | None
    """Calibration ids; None where the method looks at no text."""
    groups: Mapping[int, BlockGroups]
    """Heads and neurons of the blocks to make narrower."""
    options: WidthOptions
    """Every default filled in."""
    counts: Mapping[int, tuple[int, int]]
    """Block -> how many units of attention and how many neurons to remove; empty for a method that
    ranks all blocks in one list."""
    memory: StreamMemory

    def ids(self) -> Tensor:
        """Calibration ids of a method that needs text."""
        assert self.ids_BT is not None
        return self.ids_BT


@dataclass(slots=True, eq=False)
class BlockImportance:
    """One number for each unit of both sublayers, float64 `[U]`."""

    heads: Tensor
    neurons: Tensor


@dataclass(slots=True, kw_only=True)
class Chosen:
    """What to remove from each block, and why."""

    removed: dict[int, Removed]
    importance: dict[int, BlockImportance]
    biases: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """For each block what to add to the outputs of its output projections, float64 `[D]`."""
    folds: dict[int, Fold] = field(default_factory=dict)
    """For each block new weights of its output projections, for all their inputs; from `repair`."""
    repairs: dict[int, list[RepairedProjection]] = field(default_factory=dict)
    """What the record says of these."""


@dataclass(frozen=True, kw_only=True)
class WidthMethod(RegisteredMethod):
    """A registered method."""

    needs_text: Callable[[WidthOptions], bool] = lambda options: True
    """Whether it looks at calibration text, by its filled-in options."""
    sample_length: int | None = None
    """Tokens per calibration sample, if it is not the usual number."""
    protects_ends: bool = False
    """Whether it keeps the first and last blocks whole by default."""
    one_list: bool = False
    """Whether it ranks the units of all blocks in one list, unless all blocks must stay alike."""


METHODS = MethodRegistry[WidthMethod]("width method", ShortLLMError)

import_modules(__name__, __path__)
